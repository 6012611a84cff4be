"""An adapter on ``lm_head`` in TRL's trainer, compared with PEFT's own forward through full logits."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import trl.trainer.grpo_trainer
import trl.trainer.utils
from datasets import Dataset
from grpo_runs import (
    PROMPTS,
    TOKENIZER,
    PlainTrainer,
    RecordingTrainer,
    assert_same_trajectory,
    make_trainer,
    train,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from memhead.integrations import trl as memhead_trl
from memhead.integrations.peft import low_rank_update

WIDE = {"model_init_kwargs": {"dtype": torch.float64}}


def on_head(**settings) -> LoraConfig:
    """LoRA on the head and the attention, with a B that is not zero, so that the first step sees it."""
    settings = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["lm_head", "q_proj"],
        "task_type": "CAUSAL_LM",
    } | settings
    return LoraConfig(**settings, init_lora_weights=False)


def wrapped(path, **settings):
    """A PEFT model in float64 whose head TRL has patched, as its trainers do."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    model = get_peft_model(base, on_head(**settings))
    trl.trainer.grpo_trainer.add_fused_lm_head(base, outputs=("log_probs", "entropy"))
    return model


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gemma2-softcap", "granite-divisor"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_trajectory_is_that_of_plain_peft(checkpoints, tmp_path, name, beta):
    settings = {"lora": on_head(), "max_steps": 6, "num_iterations": 2, "beta": beta, "entropy_coef": 0.02}
    ours = train(checkpoints[name], tmp_path, **settings, **WIDE)
    plain = train(checkpoints[name], tmp_path, trainer=PlainTrainer, **settings, **WIDE)
    assert_same_trajectory(ours, plain, loss=1e-6, loss_floor=1e-6, parameters=1e-8)
    assert ours.calls > 0 == plain.calls
    start = train(checkpoints[name], tmp_path, **(settings | {"learning_rate": 0.0, "max_steps": 1}), **WIDE)
    of_head = [key for key in ours.parameters if "lm_head.lora" in key]
    assert len(of_head) == 2
    assert all((ours.parameters[key] - start.parameters[key]).abs().max() > 1e-3 for key in of_head)


def test_full_logits_baseline_honours_the_adapter_too(checkpoints, tmp_path):
    settings = {"lora": on_head(), "num_iterations": 2, **WIDE}
    full = train(checkpoints["llama"], tmp_path, "full", **settings)
    plain = train(checkpoints["llama"], tmp_path, trainer=PlainTrainer, **settings)
    assert_same_trajectory(full, plain, loss=1e-6, loss_floor=1e-6, parameters=1e-8)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_modules_to_save(checkpoints, tmp_path, tied):
    """A trainable copy of the head beside LoRA; the reference pass takes the original."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    name = "qwen2-tied" if tied else "llama"
    settings = {"lora": lora, "num_iterations": 2, "beta": 0.04, **WIDE}
    ours = train(checkpoints[name], tmp_path, **settings)
    plain = train(checkpoints[name], tmp_path, trainer=PlainTrainer, **settings)
    assert_same_trajectory(ours, plain, loss=1e-6, loss_floor=1e-6, parameters=1e-8)
    assert any("lm_head.modules_to_save" in key for key in ours.parameters)


def scores(model, fused: bool):
    """Log-probabilities and entropies (2, 7) of some tokens, and the gradient of a mixture of both."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 18, (2, 8), generator=generator)
    if fused:
        output = model(input_ids=ids, labels=ids, fused_lm_head=True)
        logprobs, entropy = output.log_probs, output.entropy
    else:
        logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        logprobs, entropy = logp.gather(2, ids[:, 1:, None]).squeeze(2), -(logp.exp() * logp).sum(-1)
    upstream = torch.randn(2, 2, 7, generator=generator, dtype=logprobs.dtype)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = (upstream[0] * logprobs + upstream[1] * entropy).sum()
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return logprobs.detach(), dict(zip(trained, grads, strict=True))


def assert_same_scores(model) -> dict:
    handle = memhead_trl.installed()
    before = handle.calls
    logprobs, grads = scores(model, fused=True)
    assert handle.calls == before + 1
    expected, expected_grads = scores(model, fused=False)
    torch.testing.assert_close(logprobs, expected, rtol=1e-9, atol=1e-9)
    for name, grad in expected_grads.items():
        if grad is None:
            assert grads[name] is None or not grads[name].any(), name
        else:
            torch.testing.assert_close(grads[name], grad, rtol=1e-8, atol=1e-9)
    return expected_grads


@pytest.fixture
def patched():
    """TRL's fused heads announce their module only where they were made under an installation."""
    with memhead_trl.install(chunk=(5, 4)):
        yield


@pytest.mark.usefixtures("patched")
class TestStatesOfTheAdapter:
    def test_active(self, checkpoints):
        grads = assert_same_scores(wrapped(checkpoints["llama"]))
        assert sum("lm_head.lora" in name for name in grads) == 2

    def test_rank_stabilised(self, checkpoints):
        assert_same_scores(wrapped(checkpoints["llama"], use_rslora=True))

    def test_disabled(self, checkpoints):
        model = wrapped(checkpoints["llama"])
        with model.disable_adapter(), torch.no_grad():
            ids = torch.arange(3, 11)[None]
            scored = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
            logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        torch.testing.assert_close(scored, logp.gather(2, ids[:, 1:, None]).squeeze(2))

    def test_disabled_while_it_is_merged(self, checkpoints):
        """As PEFT's own layer, which takes it out of the weight then."""
        model, ids = wrapped(checkpoints["llama"]), torch.arange(3, 11)[None]
        with model.disable_adapter(), torch.no_grad():
            logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
            model.merge_adapter()
            scored = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        torch.testing.assert_close(scored, logp.gather(2, ids[:, 1:, None]).squeeze(2))

    def test_merged(self, checkpoints):
        model = wrapped(checkpoints["llama"])
        model.merge_adapter()
        model.base_model.model.lm_head.base_layer.weight.requires_grad_()
        assert_same_scores(model)

    def test_two_active_adapters_of_different_rank(self, checkpoints):
        model = wrapped(checkpoints["llama"])
        model.add_adapter("second", on_head(r=2, lora_alpha=5))
        model.base_model.set_adapter(["default", "second"])
        grads = assert_same_scores(model)
        assert sum("lm_head.lora" in name for name in grads) == 4

    def test_the_other_adapter(self, checkpoints):
        model = wrapped(checkpoints["llama"])
        model.add_adapter("second", on_head(r=2))
        model.set_adapter("second")
        assert_same_scores(model)

    def test_an_adapter_that_leaves_the_head_alone(self, checkpoints):
        model = wrapped(checkpoints["llama"])
        model.add_adapter("second", on_head(target_modules=["q_proj"]))
        model.set_adapter("second")
        assert_same_scores(model)

    def test_dropout_is_applied_in_training_only(self, checkpoints):
        model = wrapped(checkpoints["llama"], lora_dropout=0.5, target_modules=["lm_head"])
        model.eval()
        assert_same_scores(model)
        assert low_rank_update(model.get_output_embeddings()).dropout == 0.0
        model.train()
        torch.manual_seed(0)
        draws = torch.stack([scores(model, fused=True)[0] for _ in range(500)])
        plain = torch.stack([scores(model, fused=False)[0] for _ in range(500)])
        assert draws.std(0).min() > 0
        for moment in (torch.mean, torch.std):
            torch.testing.assert_close(moment(draws, 0), moment(plain, 0), rtol=0.15, atol=0.25)

    def test_gradient_of_hidden(self, checkpoints):
        model = wrapped(checkpoints["llama"])
        head: nn.Module = model.get_output_embeddings()
        hidden = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
        targets = torch.arange(6)
        expected = head(hidden).log_softmax(-1).gather(1, targets[:, None]).sum()
        (by_plain,) = torch.autograd.grad(expected, hidden)
        from memhead import linear_logprobs

        ours = linear_logprobs(hidden, head.weight, targets, low_rank=low_rank_update(head)).logprobs.sum()
        torch.testing.assert_close(torch.autograd.grad(ours, hidden)[0], by_plain)


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_variants_are_refused_by_name(checkpoints, tmp_path, variant):
    lora = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM", **{variant: True})
    # The trainer itself says no, as without memhead: its message names lm_head.
    with memhead_trl.install(), pytest.raises(ValueError, match="lm_head"):
        make_trainer(checkpoints["llama"], tmp_path, lora=lora)
    base = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    head = get_peft_model(base, lora).get_output_embeddings()
    with pytest.raises(ValueError, match="Dora" if variant == "use_dora" else variant):
        low_rank_update(head)


def test_a_copy_of_a_trainers_model_has_its_own_weights(checkpoints, tmp_path):
    with memhead_trl.install():
        model = make_trainer(checkpoints["llama"], tmp_path).model
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        ids = torch.arange(3, 11)[None]
        loss = copied(input_ids=ids, labels=ids, fused_lm_head=True).loss
    torch.testing.assert_close(loss, torch.tensor(float(model.config.vocab_size)).log())


def test_several_adapters_with_dropout_are_refused(checkpoints):
    model = wrapped(checkpoints["llama"], lora_dropout=0.5)
    model.add_adapter("second", on_head(r=2))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"default.*second.*lora_dropout=0"):
        low_rank_update(model.get_output_embeddings())


def test_a_head_cast_to_float32_is_refused(checkpoints, tmp_path):
    with memhead_trl.install(), pytest.raises(ValueError, match="cast_lm_head_to_fp32=True"):
        make_trainer(checkpoints["llama"], tmp_path, lora=on_head(), cast_lm_head_to_fp32=True)


def test_trl_alone_refuses(checkpoints, tmp_path):
    for impl in (None, "trl"):
        with memhead_trl.install("trl" if impl else "memhead") as handle:
            if impl is None:
                handle.uninstall()
            with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
                make_trainer(checkpoints["llama"], tmp_path, lora=on_head(), trainer=RecordingTrainer)


@pytest.mark.parametrize("name", ["grpo", "rloo", "dpo", "kto", "sft"])
def test_in_every_trainer_that_has_such_a_head(checkpoints, name):
    """The refusal is lifted for what can be computed, and nothing else; and it is back afterwards."""
    module = importlib.import_module(f"trl.trainer.{name}_trainer")
    before = vars(module)["BaseTunerLayer"], vars(module)["add_fused_lm_head"]
    base = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    plain = get_peft_model(base, on_head()).get_output_embeddings()
    dora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(checkpoints["llama"]), on_head(use_dora=True)
    ).get_output_embeddings()
    with memhead_trl.install():
        assert not isinstance(plain, module.BaseTunerLayer)
        assert isinstance(dora, module.BaseTunerLayer)
        assert module.add_fused_lm_head is not before[1]
    assert isinstance(plain, module.BaseTunerLayer)
    assert (vars(module)["BaseTunerLayer"], vars(module)["add_fused_lm_head"]) == before


@pytest.mark.parametrize("name", ["RLOO", "KTO"])
def test_a_real_run_of_the_other_trainers(checkpoints, tmp_path, name):
    """One step each, in which the head's adapter is scored and moves."""
    if name == "RLOO":
        from grpo_runs import reward
        from trl import RLOOConfig as Config
        from trl import RLOOTrainer as Trainer

        own = {"num_generations": 2, "max_completion_length": 4}
        more = {"reward_funcs": reward}
        rows = {"prompt": PROMPTS[:8]}
    else:
        from trl import KTOConfig as Config
        from trl import KTOTrainer as Trainer

        own, more = {"max_length": 16}, {}
        rows = {"prompt": PROMPTS[:8], "completion": ["1+1", "22"] * 4, "label": [True, False] * 4}
    arguments = Config(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=0.1, report_to="none", use_cpu=True,
        bf16=False, save_strategy="no", disable_tqdm=True, **own,
    )  # fmt: skip
    with memhead_trl.install() as handle:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(checkpoints["llama"]),
            args=arguments,
            train_dataset=Dataset.from_dict(rows),
            processing_class=TOKENIZER,
            peft_config=on_head(),
            **more,
        )
        head = trainer.model.get_output_embeddings()
        before = head.lora_B["default"].weight.detach().clone()
        trainer.train()
        assert handle.calls > 0
    assert not torch.equal(head.lora_B["default"].weight, before)
