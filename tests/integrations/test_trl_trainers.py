"""TRL's other trainers with a fused head – DPO, KTO, RLOO, SFT with packing – and mixtures of experts in all of them.

Compared with the same trainer on the model's own logits, past TRL's fused head and ours. In float64, where two runs
that compute the same thing stay together to the last digits, and a run that computes something else does not.
"""

from __future__ import annotations

import inspect
import random
import types
from typing import NamedTuple

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from grpo_runs import CHARACTERS, PROMPTS, SMALL, TOKENIZER, configurations, reward
from transformers import AutoModelForCausalLM, set_seed
from transformers.trainer_callback import PrinterCallback
from trl.trainer.utils import FusedCausalLMOutput

from memhead.integrations import trl as memhead_trl

STEPS = 3
EXPERTS = {
    "mixtral": transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **SMALL,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
}
HEADS = {name: configurations()[name] for name in ("llama", "qwen2-tied", "gemma2-softcap", "phi-bias")}


def texts(seed: int, count: int = 24) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(CHARACTERS, k=draw.randint(1, 9))) for _ in range(count)]


def dpo(**options):
    rows = {"prompt": PROMPTS[:24], "chosen": texts(1), "rejected": texts(2)}
    return trl.DPOTrainer, trl.DPOConfig, options, rows


def kto(**options):
    rows = {"prompt": PROMPTS[:24], "completion": texts(1), "label": [i % 3 > 0 for i in range(24)]}
    return trl.KTOTrainer, trl.KTOConfig, options, rows


def rloo(**options):
    sampling = {"num_generations": 4, "max_completion_length": 5, "temperature": 0.7}
    return trl.RLOOTrainer, trl.RLOOConfig, sampling | options, {"prompt": PROMPTS}


def sft(**options):
    packing = {"packing": True, "max_length": 16}
    return trl.SFTTrainer, trl.SFTConfig, packing | options, {"text": texts(3, count=96)}


def grpo(**options):
    sampling = {"num_generations": 4, "max_completion_length": 5, "beta": 0.04}
    return trl.GRPOTrainer, trl.GRPOConfig, sampling | options, {"prompt": PROMPTS}


CASES = {
    "dpo": dpo(),
    "dpo-wpo": dpo(use_weighting=True),
    "dpo-sft": dpo(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
    "kto": kto(),
    "kto-apo": kto(loss_type="apo_zero_unpaired"),
    "rloo": rloo(beta=0.05, num_iterations=2),
    "sft-packed": sft(),
    "sft-wrapped": sft(packing_strategy="wrapped"),
    "sft-dft": sft(loss_type="dft"),
}


class Run(NamedTuple):
    log: list[dict[str, float]]
    parameters: dict[str, torch.Tensor]
    calls: int


def on_own_logits(model, temperature: float) -> None:
    """The model's fused forward from what its own forward returns: all its logits, and its load-balancing loss."""
    own = types.MethodType(type(model).forward, model)

    def forward(self, *args, fused_lm_head=False, labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            return own(*args, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
        output = own(*args, **kwargs)
        logits, following = output.logits[:, :-1] / temperature, labels[:, 1:]
        mask = following != -100
        logp = logits.log_softmax(-1)
        chosen = logp.gather(2, following.clamp(min=0)[..., None]).squeeze(2)
        found = {
            "log_probs": chosen,
            "entropy": -(logp.exp() * logp).sum(-1),
            "log_sum_sq_probs": (2 * logp).logsumexp(-1),
            "mean_logits": logits.mean(-1),
            "is_top1": logits.argmax(-1) == following,
        }
        per_token = {name: value.masked_fill(~mask, 0) for name, value in found.items()}
        return FusedCausalLMOutput(
            loss=-per_token["log_probs"].sum() / mask.sum(),
            label_mask=mask,
            aux_loss=getattr(output, "aux_loss", None),
            **per_token,
        )

    forward.__signature__ = inspect.signature(own)  # generate() reads it
    model.forward = types.MethodType(forward, model)


def train(path, folder, impl, case, **overrides) -> Run:
    """Three steps; ``impl``: what install() knows, or "plain" for the model's own logits."""
    trainer_class, config_class, options, rows = case
    set_seed(0)
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 0.1,
        "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, "model_init_kwargs": {"dtype": torch.float64},
    }  # fmt: skip
    arguments = config_class(**{**settings, **options, **overrides})
    given = {"reward_funcs": reward} if trainer_class in (trl.RLOOTrainer, trl.GRPOTrainer) else {}
    with memhead_trl.install("full" if impl == "plain" else impl, chunk=(7, 5)) as handle:
        trainer = trainer_class(
            model=path,
            args=arguments,
            train_dataset=Dataset.from_dict(rows),
            processing_class=TOKENIZER,
            **given,
        )
        trainer.remove_callback(PrinterCallback)
        if impl == "plain":
            for model in (trainer.model, getattr(trainer, "ref_model", None)):
                if model is not None:
                    on_own_logits(model, getattr(trainer, "temperature", 1.0))
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
    after = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    moved = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert len(moved) > len(before) // 2
    return Run([entry for entry in trainer.state.log_history if "loss" in entry], after, handle.calls)


def assert_same(ours: Run, plain: Run) -> None:
    assert ours.calls > 0 == plain.calls
    assert len(ours.log) == len(plain.log) == STEPS
    timing = ("runtime", "per_second", "step_time", "_time")
    for a, b in zip(ours.log, plain.log, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            if not name.endswith(timing):
                assert a[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    for name, value in plain.parameters.items():
        torch.testing.assert_close(ours.parameters[name], value, rtol=0.0, atol=1e-8, msg=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Paths of the models by name."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in (HEADS | EXPERTS).items():
        set_seed(1)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_full_logits(saved, tmp_path, case):
    ours, plain = (train(str(saved / "llama"), tmp_path, impl, CASES[case]) for impl in ("memhead", "plain"))
    assert_same(ours, plain)
    assert max(entry["grad_norm"] for entry in ours.log) > 1e-2


@pytest.mark.parametrize("name", [name for name in HEADS if name != "llama"])
@pytest.mark.parametrize("case", ["dpo", "kto", "rloo", "sft-packed"])
def test_every_kind_of_head(saved, tmp_path, case, name):
    ours, plain = (train(str(saved / name), tmp_path, impl, CASES[case]) for impl in ("memhead", "plain"))
    assert_same(ours, plain)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("case", [grpo(), sft(), dpo()], ids=["grpo", "sft", "dpo"])
def test_mixtures_of_experts(saved, tmp_path, case, name):
    """With the load-balancing loss, which TRL's fused forward adds to the loss of the tokens."""
    path, wide = str(saved / name), {"dtype": torch.float64, "experts_implementation": "eager"}
    options = {"model_init_kwargs": wide, "router_aux_loss_coef": 0.3}  # grouped products know no float64
    ours, plain = (train(path, tmp_path, impl, case, **options) for impl in ("memhead", "plain"))
    assert_same(ours, plain)
    assert all(entry["aux_loss"] > 0 for entry in ours.log)
    alone = train(path, tmp_path, "memhead", case, **(options | {"router_aux_loss_coef": 0.0}))
    assert "aux_loss" not in alone.log[0]
    assert alone.log[0]["loss"] != pytest.approx(ours.log[0]["loss"], abs=1e-3)
