"""Where the packed step is not taken, and what is said."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig
from ready import ROOT
from rollouts import SMALL, configurations, model_of

from recipes.config.load import load_config
from recipes.training.packed_support import ARCHITECTURES, why_not
from recipes.training.packed_unsloth import PackedUnsloth, why_not_unsloths


def given(**changes: Any) -> dict[str, Any]:
    """A trainer's arguments that can be packed, but for `changes`."""
    plain = {
        "model": model_of("llama"),
        "args": SimpleNamespace(n_gpu=1),
        "train_dataset": Dataset.from_dict({"prompt": ["a"]}),
        "peft_config": None,
    }
    return plain | changes


def a_model(name: str, attention: str = "sdpa", **settings: Any) -> Any:
    """The little of a model that is looked at."""
    config = configurations()[name] if isinstance(name, str) else name
    config._attn_implementation = attention
    for key, value in settings.items():
        setattr(config, key, value)
    return SimpleNamespace(config=config)


def with_adapter(**settings: Any) -> Any:
    """One that came with the model, as from a checkpoint."""
    return SimpleNamespace(config=configurations()["llama"], peft_config={"default": LoraConfig(**settings)})


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("name", configurations())
def test_every_tested_architecture_is_packed(name, varlen):
    assert why_not(given(model=a_model(name)), varlen=varlen) is None
    assert {config.model_type for config in configurations().values()} == ARCHITECTURES


ZERO_3 = SimpleNamespace(zero_stage=3)
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": a_model(transformers.GPT2Config())}, "the architecture gpt2 is not among"),
        ({"model": a_model("llama", rope_parameters=DYNAMIC)}, r"its rotary positions \(dynamic\) depend"),
        ({"model": a_model("llama", attention_dropout=0.1)}, "attention_dropout is 0.1"),
        ({"model": a_model("phi", resid_pdrop=0.2)}, "resid_pdrop is 0.2"),
        ({"model": a_model("llama", output_router_logits=True)}, "a mixture of experts balances"),
        ({"model": a_model("llama", "flash_attention_2")}, "flash_attention_2 takes no dense mask"),
        ({"peft_config": LoraConfig(lora_dropout=0.05)}, "lora.dropout is 0.05"),
        ({"peft_config": LoraConfig(use_dora=True)}, "DoRA has not been tested"),
        (
            {"peft_config": LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5])},
            "an activated LoRA has not been tested",
        ),
        ({"peft_config": PrefixTuningConfig(num_virtual_tokens=2)}, "adapters of type .*PREFIX_TUNING may add"),
        ({"model": with_adapter(lora_dropout=0.1)}, "lora.dropout is 0.1"),
        ({"args": SimpleNamespace(n_gpu=4)}, "one process with 4 GPUs"),
        ({"args": SimpleNamespace(n_gpu=1, neftune_noise_alpha=5.0)}, "neftune_noise_alpha adds noise"),
        ({"args": SimpleNamespace(n_gpu=1, deepspeed_plugin=ZERO_3)}, "ZeRO-3 takes the model apart"),
        ({"tools": [print]}, "tools writes tokens"),
        ({"rollout_func": print}, "rollout_func writes tokens"),
        ({"environment_factory": print}, "environment_factory writes tokens"),
        ({"train_dataset": Dataset.from_dict({"prompt": ["a"], "image": [1]})}, "images take positions"),
        ({"train_dataset": Dataset.from_dict({"prompt": ["a"], "images": [[1]]})}, "images take positions"),
        ({"processing_class": object.__new__(transformers.ProcessorMixin)}, "images take positions"),
    ],
)  # fmt: skip
def test_what_is_not_packed_is_named(changes, reason):
    assert why_not(given(), varlen=False) is None
    found = why_not(given(**changes), varlen=False)
    assert found is not None
    assert re.match(reason, found), found


@pytest.mark.parametrize("override", [None, "lora.dropout=0.05", "grpo.neftune_noise_alpha=5"])
def test_the_plan_and_the_trainer_have_the_same_reasons(override):
    """The plan asks before there is a model; what it then counts is the step that will be taken."""
    config = load_config(ROOT / "configs" / "llama3.2_1b_gsm8k.yaml", [override] if override else [])
    args = SimpleNamespace(n_gpu=1, neftune_noise_alpha=config.grpo["neftune_noise_alpha"])
    said = why_not(given(args=args, peft_config=config.lora.peft_config()), varlen=False)
    assert next(config.against_packing(), None) == said
    assert config.packs is (said is None) is (override is None)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (a_model("gemma2", "eager"), "torch's variable-length attention has no softcap"),
        (a_model(transformers.LlamaConfig(**SMALL, head_dim=512)), "torch's variable-length .* at most 256, not 512"),
    ],
)  # fmt: skip
def test_what_variable_length_attention_does_not_compute_is_named(model, reason):
    assert re.match(reason, why_not(given(model=model), varlen=True))
    assert why_not(given(model=model), varlen=False) is None
    largest = a_model(transformers.LlamaConfig(**SMALL, head_dim=256))
    assert why_not(given(model=largest), varlen=True) is None


@pytest.mark.parametrize(
    ("model", "lora", "reason"),
    [
        (a_model("llama"), {}, None),
        (a_model("qwen3"), {}, None),
        (a_model("mistral"), {}, "has no sliding window"),
        (a_model("gemma2"), {}, "Unsloth's layers of gemma2"),
        (a_model("granite"), {}, "Unsloth's layers of granite"),
        (a_model("llama"), {"lora_dropout": 0.1}, "dropout"),
        (a_model("llama", attention_dropout=0.1), {}, "dropout"),
    ],
)
def test_what_is_packed_on_unsloths_layers(model, lora, reason):
    """What rules packing out elsewhere does so here; and what Unsloth's attention over such rows has no place for."""
    model.dtype, model.peft_config = torch.float32, {"default": LoraConfig(**lora)}
    cpu = SimpleNamespace(n_gpu=1, device=torch.device("cpu"), bf16=False, fp16=False)
    found = why_not_unsloths(given(model=model, args=cpu))
    assert found is None if reason is None else reason in found


def test_unsloths_gradient_checkpointing_is_left_alone():
    """TRL turns a model's off for scoring, and transformers' on after it."""
    trainer = SimpleNamespace(model=SimpleNamespace(is_gradient_checkpointing=True), args=None)
    with PackedUnsloth._without_gradient(trainer):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("words", "packs"), [([], False), (["step.impl=packed"], True), (["step.impl=trl"], False)]
)
def test_under_unsloth_the_packed_step_is_asked_for_by_name(without_unsloth, tmp_path, words, packs):
    """In the file that a run leaves, too: a rerun does what the run did."""
    config = load_config(ROOT / "configs" / "llama3.1_8b_gsm8k.yaml", words)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    for one in (config, load_config(tmp_path / "again.yaml")):
        assert (one.packs, one.unsloths_step) == (packs, not packs)
