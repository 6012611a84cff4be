"""For every field of TRL's GRPOConfig that a configuration may set: it arrives by its name, and moves no other."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from transformers.debug_utils import DebugOption

from recipes.config import load
from recipes.config.grpo import grpo_section, import_grpo_config
from recipes.config.load import ConfigError, load_config

FIELDS = grpo_section(import_grpo_config("")).model_fields
VALUES: dict[str, Any] = {  # where the next value that comes to mind would be refused, or would do nothing alone
    "num_generations": 4, "generation_batch_size": 16, "steps_per_generation": 3, "gradient_accumulation_steps": 3,
    "per_device_train_batch_size": 16, "loss_type": "grpo", "optim_target_modules": "q_proj",
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"power": 2.0}, "optim_args": "a=1",
    "optim": "adamw_torch", "max_completion_length": 64, "num_generations_eval": 2,
    "vllm_importance_sampling_clip_max": 4.0, "top_p": 0.5, "top_entropy_quantile": 0.5,
    "include_num_input_tokens_seen": "all",
    "log_level": "info", "log_level_replica": "info", "hub_strategy": "end", "train_sampling_strategy": "sequential",
    "include_for_metrics": ["loss"], "vllm_gpu_memory_utilization": 0.5, "hub_revision": "x", "adam_beta1": 0.8,
    "adam_beta2": 0.9, "liger_kernel_config": {"rope": True}, "project": "mine", "trackio_static_space_id": "space",
    "accelerator_config": {"split_batches": True}, "use_cpu": True, "debug": "underflow_overflow",
    "dataloader_pin_memory": False,
    "torch_compile_backend": "eager", "torch_compile_mode": "default",
}  # fmt: skip
ALONG: dict[str, dict[str, Any]] = {  # what TRL itself makes of a field beside keeping it
    "per_device_train_batch_size": {"generation_batch_size": 16},
    "gradient_accumulation_steps": {"generation_batch_size": 24, "steps_per_generation": 3},
    "generation_batch_size": {"steps_per_generation": 2},
    "steps_per_generation": {"generation_batch_size": 24},
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"mixed_precision": "fp16"},
    "push_to_hub": {
        "hub_model_id": "run"
    },  # ours: the run's name, where TRL would take the checkpoints' folder
    "torch_compile": {"torch_compile_backend": "inductor"},
    "torch_compile_backend": {"torch_compile": True},
    "torch_compile_mode": {"torch_compile": True, "torch_compile_backend": "inductor"},
    "load_best_model_at_end": {"metric_for_best_model": "loss", "greater_is_better": False},
    "metric_for_best_model": {"greater_is_better": True},
}
TOGETHER: dict[str, list[str]] = {  # refused alone
    "sync_ref_model": ["grpo.beta=0.1"],
    "dataloader_persistent_workers": ["grpo.dataloader_num_workers=2"],
    "dataloader_prefetch_factor": ["grpo.dataloader_num_workers=2"],
    "lr_scheduler_kwargs": ["grpo.lr_scheduler_type=polynomial"],
    "log_completions_hub_repo": ["tracking.print_completions=1"],
}
ELSEWHERE = {  # what TRL refuses on a machine like this one, and says so
    "tf32": "requires Ampere",
    "ddp_backend": "process group",
    "fsdp": "Unknown `fsdp` option",
}


@pytest.fixture
def plain(tmp_path, without_unsloth):
    path = tmp_path / "run.yaml"
    path.write_text("model: {loader: transformers, name: some/model}\ntask: {name: countdown}\n")
    return path


def another(name, field):
    """A value of the field's kind that is not its default."""
    if name in VALUES:
        return VALUES[name]
    kinds = [kind for kind in (*get_args(field.annotation), field.annotation) if kind is not type(None)]
    for kind in kinds:
        if get_origin(kind) is Literal:
            return next(
                value for value in get_args(kind) if value != field.default and not isinstance(value, bool)
            )
        if isinstance(kind, type) and issubclass(kind, Enum):
            return next(value.value for value in kind if value.value != field.default)
    if bool in kinds:
        return not field.default
    if int in kinds:
        return (field.default or 0) + 2
    if float in kinds:
        return (field.default or 0.0) + 0.25
    if str in kinds:
        return "something"
    return (
        {"some": "thing"} if dict in kinds or any(get_origin(kind) is dict for kind in kinds) else ["thing"]
    )


DERIVED = {
    "distributed_state",
    "deepspeed_plugin",
    "hf_deepspeed_config",
}  # objects that TRL makes for itself


ONE_VALUE = {"remove_unused_columns"}


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - ONE_VALUE))
def test_a_field_of_trl_arrives_by_its_name_and_moves_no_other(plain, name):
    value, together = another(name, FIELDS[name]), TOGETHER.get(name, [])
    changed = load_config(plain, [*together, f"grpo.{name}={json.dumps(value)}"])
    if name in ELSEWHERE:
        with pytest.raises(ConfigError, match=ELSEWHERE[name]):
            changed.grpo_config("x")
        return
    before, after = (vars(config.grpo_config("x")) for config in (load_config(plain, together), changed))
    found = {key: after[key] for key in after if after[key] != before[key] and key not in DERIVED}
    if value == before[name]:  # on a machine without a GPU it is so already
        assert name in ("use_cpu", "dataloader_pin_memory")
        return
    given = found.pop(name)
    assert (given.to_dict()["split_batches"] if name == "accelerator_config" else given) == (
        True if name == "accelerator_config" else [DebugOption(value)] if name == "debug" else value
    )
    assert found == ALONG.get(name, {})


CPU = {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}


@pytest.mark.parametrize(
    ("dtype", "given", "cuda", "bfloat16", "fields"),
    [
        ("auto", {}, False, True, CPU),
        ("bfloat16", {}, False, True, CPU),
        ("auto", {"bf16": True}, False, True, {"use_cpu": True, "dataloader_pin_memory": False}),
        ("auto", {"use_cpu": True}, True, True, {"bf16": False, "dataloader_pin_memory": False}),
        ("auto", {}, True, True, {"fp16": False, "bf16": True}),
        ("auto", {}, True, False, {"fp16": True, "bf16": False}),
        ("float16", {}, True, True, {"fp16": True, "bf16": False}),
        ("auto", {"bf16": False}, True, True, {}),
        ("auto", {"fp16": True}, True, True, {"bf16": False}),
    ],
)
def test_the_precision_that_a_machine_gets_unless_told_otherwise(
    monkeypatch, dtype, given, cuda, bfloat16, fields
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    assert load._precision(dtype, given, cuda) == fields


def test_products_on_a_cpu_are_the_weights_unless_asked_otherwise(plain, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = load_config(plain).grpo_config("x")
    assert (arguments.bf16, arguments.fp16, arguments.use_cpu) == (False, False, True)
