"""A patched transformers model, compared with itself before the patch."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.utils import convert_outputs_to_fp32
from datasets import Dataset
from grpo_runs import SMALL, TOKENIZER, configurations
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from memhead.integrations import trl as memhead_trl
from memhead.integrations.transformers import patch, unpatch


def load(path, dtype=torch.float64):
    set_seed(3)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def batch(rows=3, length=9):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 18, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[2, 6:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def losses_and_gradients(model, inputs):
    output = model(**inputs)
    trained = [p for p in model.parameters() if p.requires_grad]
    return output, torch.autograd.grad(output.loss, trained, allow_unused=True)


def assert_patch_changes_nothing(model, inputs):
    plain, plain_grads = losses_and_gradients(model, inputs)
    handle = patch(model, chunk=(5, 4))
    ours, grads = losses_and_gradients(model, inputs)
    unpatch(model)
    assert plain.logits is not None
    assert ours.logits is None
    assert handle.calls == 1
    # The model rounds its logits to float32 before its loss; ours stay in float64.
    torch.testing.assert_close(ours.loss.double(), plain.loss.double(), rtol=1e-6, atol=1e-6)
    for a, b in zip(grads, plain_grads, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", configurations())
def test_loss_and_gradients_of_every_architecture(checkpoints, name):
    assert_patch_changes_nothing(load(checkpoints[name]), batch())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("hyperclovax", {"logits_scaling": 0.4}),
        ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 2.0}),
        (
            "falcon_h1",
            {"lm_head_multiplier": 0.3, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8}
            | {"mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4},
        ),
    ],
)
def test_other_names_of_scale_and_softcap(name, settings):
    config = AutoConfig.for_model(name, **SMALL | {"num_key_value_heads": 1} | settings)
    assert_patch_changes_nothing(AutoModelForCausalLM.from_config(config, dtype=torch.float64), batch())


@pytest.mark.parametrize(
    "further",
    [
        {"num_items_in_batch": 50},
        {"num_items_in_batch": torch.tensor(50)},
        {"shift_labels": batch()["labels"].roll(-1, 1)},
        {"output_hidden_states": True},
        {"position_ids": torch.arange(9)[None]},
    ],
    ids=lambda further: next(iter(further)),
)
def test_arguments_of_forward(checkpoints, further):
    assert_patch_changes_nothing(load(checkpoints["llama"]), batch() | further)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("check", [True, False])
def test_the_models_mode_and_gradients_are_left_as_they_were(checkpoints, mode, check):
    """The comparison at the start is made without dropout; training goes on with it."""
    model = load(checkpoints["llama"])
    model.train(mode)
    model.model.layers[0].mlp.eval()  # a part of it that someone froze
    before = [module.training for module in model.modules()]
    handle = patch(model, check=check)
    assert [module.training for module in model.modules()] == before
    assert (handle.calls, handle.rows) == (0, 0)
    assert all(parameter.grad is None for parameter in model.parameters())
    model(**batch()).loss.backward()
    assert (handle.calls, handle.rows) == (1, 27)
    unpatch(model)
    assert [module.training for module in model.modules()] == before


def test_a_refused_model_is_left_as_it_was(checkpoints, monkeypatch):
    from memhead.integrations import transformers as integration

    model = load(checkpoints["cohere-scale-tied"])
    model.train()
    monkeypatch.setattr(integration, "head_options", lambda config: integration.HeadOptions(None, 1.0))
    with pytest.raises(ValueError, match="treats its logits in a way that memhead does not know"):
        patch(model)
    assert model.training
    assert "forward" not in vars(model)


def test_dropout_is_on_while_it_trains(checkpoints):
    model = load(checkpoints["llama"])
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    patch(model)
    losses = {round(float(model(**batch()).loss.detach()), 9) for _ in range(4)}
    assert len(losses) == 4


def test_inputs_by_position_and_as_embeddings(checkpoints):
    model, inputs = load(checkpoints["llama"]), batch()
    plain = model(**inputs).loss
    patch(model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embedded = model.get_input_embeddings()(ids)
    for loss in (
        model(ids, mask, labels=inputs["labels"]).loss,
        model(inputs_embeds=embedded, labels=inputs["labels"]).loss,
        model(ids, labels=inputs["labels"], return_dict=False)[0],
    ):
        torch.testing.assert_close(loss.double(), plain.double(), rtol=1e-6, atol=1e-6)


def test_generation_is_untouched(checkpoints):
    model = load(checkpoints["llama"])
    ids = batch()["input_ids"]
    before = model.generate(ids, max_new_tokens=6, do_sample=False)
    logits = model(ids).logits
    handle = patch(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), before)
    assert torch.equal(model(ids).logits, logits)
    assert handle.calls == 0


def test_unpatch_restores(checkpoints):
    model = load(checkpoints["llama"])
    with patch(model):
        assert "forward" in vars(model)
        with pytest.raises(ValueError, match="patched already"):
            patch(model)
    assert "forward" not in vars(model)
    unpatch(model)
    assert model(**batch()).logits is not None


def test_an_earlier_handle_leaves_a_later_patch_alone(checkpoints):
    model = load(checkpoints["llama"])
    earlier = patch(model)
    unpatch(model)
    later = patch(model)
    earlier.uninstall()
    assert model(**batch()).logits is None
    later.uninstall()
    assert model(**batch()).logits is not None


def test_a_patch_that_mixed_precision_has_wrapped(checkpoints):
    """As accelerate's ``prepare`` and so Trainer with ``bf16=True``: it is known to be there, and comes off."""
    model = load(checkpoints["llama"], torch.float32)
    handle = patch(model)
    model.forward = types.MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    assert model(**batch()).logits is None
    with pytest.raises(ValueError, match="patched already"):
        patch(model)
    handle.uninstall()
    assert model(**batch()).logits is not None


def test_a_copy_has_its_own_weights(checkpoints):
    model = load(checkpoints["llama"])
    patch(model)
    for copied in (copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)):
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert not copied(batch()["input_ids"]).logits.any()
        output = copied(**batch())
        assert output.logits is None
        torch.testing.assert_close(output.loss.double(), torch.tensor(model.config.vocab_size).double().log())


def test_a_pickled_model_is_not_patched(checkpoints):
    model = load(checkpoints["llama"])
    patch(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded(**batch()).logits is not None
    with patch(loaded):
        assert loaded(**batch()).logits is None


def test_a_model_that_cannot_be_patched_stays_as_it_was():
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    settings = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    config = Llama4TextConfig(**sizes, **settings, intermediate_size_mlp=32, num_local_experts=2)
    model = Llama4ForCausalLM(config)
    with pytest.raises(ValueError, match="no backbone of the name 'language_model'"):
        patch(model)
    assert model(**batch()).logits is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_with_another_term_is_refused_in_any_precision(checkpoints, dtype):
    model = load(checkpoints["llama"], dtype)
    plain = type(model).forward

    class Regularised(type(model)):
        """A model that adds its own small term to the loss."""

        def forward(self, *args, **kwargs):
            output = plain(self, *args, **kwargs)
            if output.loss is not None:
                output.loss = output.loss * 1.01
            return output

    Regularised.forward.__signature__ = inspect.signature(plain)
    model.__class__ = Regularised
    with pytest.raises(ValueError, match="computes a loss of"):
        patch(model)


def _sharded_gradients(rank, store, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh, ids = init_device_mesh("cpu", (2,)), batch(4)["input_ids"][:2]
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    for model in (load(path), get_peft_model(load(path), lora).get_base_model()):
        expected = losses_and_gradients(model, {"input_ids": ids, "labels": ids})[1]
        fully_shard(model.lm_head, mesh=mesh)  # by itself, so that nobody has gathered it when we need it
        fully_shard(model, mesh=mesh)
        patch(model)
        for _ in range(2):
            model(input_ids=ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter, grad in zip(trained, expected, strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), 2 * grad, rtol=1e-5, atol=1e-7)
    dist.destroy_process_group()


def test_a_sharded_head(checkpoints, tmp_path):
    """FSDP2 over two processes: the head's gradient is the mean of theirs, like every other."""
    how = "forkserver" if sys.platform == "linux" else "spawn"
    mp.set_forkserver_preload(["trl.trainer.sft_trainer", "peft", "datasets"])  # what each would import
    arguments = tmp_path / "store", checkpoints["llama"]
    mp.start_processes(_sharded_gradients, args=arguments, nprocs=2, start_method=how)


EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "glm4_moe": {"moe_intermediate_size": 16, "n_routed_experts": 4, "head_dim": 8},
}


def mixture_of_experts(name, **settings):
    config = AutoConfig.for_model(
        name, **SMALL | {"num_key_value_heads": 1, "num_experts_per_tok": 2} | EXPERTS[name] | settings
    )
    set_seed(1)
    # transformers' grouped product takes no float64; its loop over experts does.
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager")


class TestRouterLoss:
    @pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe"])
    def test_is_added_as_the_model_itself_does(self, name):
        model = mixture_of_experts(name, output_router_logits=True, router_aux_loss_coef=0.5)
        inputs = batch()
        inputs["attention_mask"][1, 7:] = 0
        assert_patch_changes_nothing(model, inputs)
        plain = model(**inputs)
        patch(model)
        ours = model(**inputs)
        torch.testing.assert_close(ours.aux_loss, plain.aux_loss)
        for a, b in zip(ours.router_logits, plain.router_logits, strict=True):
            torch.testing.assert_close(a, b)
        without = model(**inputs, output_router_logits=False)
        torch.testing.assert_close(ours.loss - without.loss, 0.5 * plain.aux_loss.to(ours.loss.dtype))
        gates = [p for parameter, p in model.named_parameters() if "mlp.gate" in parameter]
        assert gates
        assert all(grad.any() for grad in torch.autograd.grad(ours.aux_loss, gates))

    @pytest.mark.parametrize("name", EXPERTS)
    def test_is_left_out_unless_asked_for(self, name):
        assert_patch_changes_nothing(mixture_of_experts(name), batch())

    def test_of_a_model_that_has_none(self):
        assert_patch_changes_nothing(mixture_of_experts("glm4_moe", output_router_logits=True), batch())

    def test_in_trainer(self, tmp_path):
        results = []
        for patched in (False, True):
            model = mixture_of_experts("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
            if patched:
                patch(model)
            arguments = TrainingArguments(str(tmp_path), **SETTINGS)
            results.append(run(Trainer(model, arguments, data_collator=collate, train_dataset=examples())))
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
        for a, b in zip(results[1][1], results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

    def test_asked_for_by_a_call_alone_is_refused(self):
        model = mixture_of_experts("mixtral")
        patch(model)
        with pytest.raises(ValueError, match=r"config\.output_router_logits=True before patch"):
            model(**batch(), output_router_logits=True)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj"]], ids=["head", "attention"])
def test_lora(checkpoints, targets):
    lora = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    assert_patch_changes_nothing(get_peft_model(load(checkpoints["llama"]), lora), batch())


def test_no_label_counts(checkpoints):
    """As in transformers: NaN without a number of items, 0 with one."""
    model, inputs = load(checkpoints["llama"]), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    patch(model)
    assert model(**inputs).loss.isnan()
    loss = model(**inputs, num_items_in_batch=4).loss
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_nearer_to_the_truth(checkpoints, dtype):
    exact = load(checkpoints["llama"], dtype).double()(**batch()).loss.item()
    model = load(checkpoints["llama"], dtype)
    plain = model(**batch()).loss.item()
    patch(model)
    assert abs(model(**batch()).loss.item() - exact) <= 2 * abs(plain - exact) + 1e-3


class TestRefusals:
    def test_logits_to_keep(self, checkpoints):
        model = load(checkpoints["llama"])
        patch(model)
        with pytest.raises(ValueError, match="logits_to_keep=2"):
            model(**batch(), logits_to_keep=2)

    def test_a_head_that_does_something_unknown(self, checkpoints):
        model = load(checkpoints["llama"])
        model.lm_head.register_forward_hook(lambda *args: 2 * args[-1])
        with pytest.raises(ValueError, match="treats its logits in a way that memhead does not know"):
            patch(model)
        assert "forward" not in vars(model)

    @pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
    def test_something_around_the_model(self, checkpoints, wrap):
        model = load(checkpoints["llama"])
        with pytest.raises(ValueError, match="is not a model of transformers; patch the model inside it"):
            patch(wrap(model))
        assert "forward" not in vars(model)

    def test_a_quantised_head(self, checkpoints):
        model = load(checkpoints["llama"])
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(99, 1, dtype=torch.uint8), requires_grad=False)
        with pytest.raises(ValueError, match=r"quantised output embedding, with a weight of torch\.uint8"):
            patch(model)

    def test_other_losses(self, checkpoints):
        model = load(checkpoints["llama"])
        model.loss_type = "ForMaskedLM"
        with pytest.raises(ValueError, match="loss_type='ForMaskedLM'"):
            patch(model)


TEXTS = ["12+34=46", "7*8=56", "9-5=4", "3+3+3=9", "81-9=72", "6*7=42", "1+1=2", "99-1=98"]


def examples():
    rows = [TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id] for text in TEXTS]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def collate(features):
    length = max(len(f["input_ids"]) for f in features)

    def padded(key, fill):
        return torch.tensor([f[key] + [fill] * (length - len(f[key])) for f in features])

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": padded("labels", -100)}


SETTINGS = {
    "max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
    "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
    "logging_steps": 1, "lr_scheduler_type": "constant",
}  # fmt: skip


def run(trainer):
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [p.detach().clone() for p in trainer.model.parameters()]


def trainer_run(path, folder, patched):
    """Five steps of transformers' Trainer, which passes the number of items of the whole accumulation."""
    model = load(path)
    handle = patch(model) if patched else None
    arguments = TrainingArguments(str(folder), **SETTINGS, eval_strategy="no")
    trainer = Trainer(
        model, arguments, data_collator=collate, train_dataset=examples(), eval_dataset=examples()
    )
    result = run(trainer)
    evaluated = trainer.evaluate()["eval_loss"]
    assert handle is None or handle.calls >= 10
    return *result, evaluated


def test_trainer(checkpoints, tmp_path):
    plain, ours = (trainer_run(checkpoints["llama"], tmp_path, patched) for patched in (False, True))
    assert ours[0] == pytest.approx(plain[0], rel=1e-5)
    assert ours[2] == pytest.approx(plain[2], rel=1e-5)
    for a, b in zip(ours[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_sft_trainer(checkpoints, tmp_path):
    """TRL's SFTTrainer uses the same slot as its GRPO trainer; a patched model in it does no harm."""
    results = []
    for impl in ("full", "memhead"):
        model = load(checkpoints["llama"])
        if impl == "memhead":
            patch(model)
        with memhead_trl.install(impl) as handle:
            trainer = SFTTrainer(
                model,
                args=SFTConfig(str(tmp_path), **SETTINGS, gradient_checkpointing=False),
                train_dataset=Dataset.from_dict({"text": TEXTS}),
                processing_class=TOKENIZER,
            )
            results.append(run(trainer))
        assert handle.calls >= 10
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    for a, b in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_bare_loop(checkpoints):
    results = []
    for patched in (False, True):
        model = load(checkpoints["gemma2-softcap"])
        if patched:
            patch(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(10):
            loss = model(**batch()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[1][-1] < results[1][0]
