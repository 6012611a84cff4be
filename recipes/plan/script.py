"""The sizes of a trainer that a script of your own has made, as the plan takes them, or why they are not known.

A run's are in its configuration (`Setting.of`); here they are read off what is loaded: the model, its adapters, the
trainer's GRPOConfig. Whatever is not what a run could have is a reason not to plan.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import Trainer
from transformers.training_args import OptimizerNames

from memhead.integrations import trl as memhead_trl
from recipes.models.adapters import without_adapters
from recipes.models.attention import underlying
from recipes.plan.formulas import DTYPE_BYTES, Precision
from recipes.plan.setting import Setting
from recipes.plan.shapes import ModelShape, Trained, sizes
from recipes.processes import count

_AUTOCAST = {"no": False, "bf16": True, "fp16": True}  # by accelerate's mixed precision


def unknown(trainer: Any) -> Iterator[str]:
    """Why the memory of this trainer's step cannot be planned, a reason each; cheap to ask, and before `setting_of`.

    trainer: TRL's GRPOTrainer with the packed step, its optimizer made.
    """
    if trainer.accelerator.device.type != "cuda":
        yield "without a GPU none are planned"
    if not trainer._varlen:
        yield "torch's variable-length attention does not run here"
    if count() > 1:
        yield "none are planned for several processes"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        yield "none are planned for a model that FSDP or DeepSpeed takes apart"
    if trainer.args.max_completion_length is None:
        yield "completions have no longest length"
    if memhead_trl.installed() is None:
        yield "the head is not one of memhead.integrations.trl"
    yield from _of_the_optimizer(trainer)
    yield from _of_the_weights(trainer)


def _of_the_optimizer(trainer: Any) -> Iterator[str]:
    """One that a script has brought keeps what it likes; the plan counts those that `optim` names."""
    found = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate's is around it
    named, _ = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    if type(found) is not named:
        yield f"{type(found).__name__} is not the optimizer that optim={_optim(trainer)} names"


def _of_the_weights(trainer: Any) -> Iterator[str]:
    model, precision = without_adapters(trainer.model), trainer.accelerator.mixed_precision
    if precision not in _AUTOCAST:
        yield f"no formula covers {precision}"
    if len({p.device for p in model.parameters()}) > 1:
        yield "the model lies on several devices"
    dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in _base_dtypes(model))
    if len(dtypes) > 1 or not DTYPE_BYTES.keys() & set(dtypes):
        yield f"no formula covers weights in {' and '.join(dtypes)}"
    if getattr(model.config, "quantization_config", None) is None:
        return
    if not ModelShape.quantised_as(model.config):
        yield "no formula covers its quantisation"
    elif dtypes == ["float32"]:
        yield "no formula covers quantised weights beside others in float32"


def setting_of(trainer: Any, prompt: int) -> Setting:
    """What `Setting.of` gives for a run with these settings, if there is nothing `unknown`.

    prompt: tokens of the longest one. Raises what `recipes.plan.shapes.sizes` does, and what a model's building does.
    """
    arguments, model, head = trainer.args, trainer.model, memhead_trl.installed()
    assert head is not None
    # What Unsloth notes on its model: "unsloth" where layer inputs go to the main memory.
    checkpointing = getattr(model, "_unsloth_gradient_checkpointing", arguments.gradient_checkpointing)
    base, trained = without_adapters(model), Trained.counted(model)
    shape = _shape(base)
    return Setting(
        shape=shape,
        trained=trained,
        precision=_precision(trainer, base, shape.quantised),
        lora_rank=_rank(model) if trained.adapters else 0,
        optim=_optim(trainer),
        sequences=arguments.per_device_train_batch_size,
        sampled=arguments.per_device_train_batch_size * arguments.steps_per_generation,
        prompt=prompt,
        completion=arguments.max_completion_length,
        generations=trainer.num_generations,
        checkpointing=bool(checkpointing),
        offloaded=checkpointing == "unsloth",
        reference=trainer.ref_model is not None,
        head=head.impl,
        chunk_rows=head.chunk,
        device_type=trainer.accelerator.device.type,
        kept_cache=arguments.cache_implementation == "static" and not arguments.use_vllm,
    )


def _shape(model: Any) -> ModelShape:
    """Of the model as its configuration describes it, without adapters, and not packed in quantised bytes.

    Counted with an attention that runs on the meta device. Eager attention keeps its scores, which no formula counts.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    eager = underlying(text) == "eager"
    text._attn_implementation = "sdpa"
    shape, _ = sizes(config, None)
    return replace(shape, layer=None) if eager else shape


def _precision(trainer: Any, base: Any, quantised: str) -> Precision:
    (dtype,) = _base_dtypes(base)
    autocast = _AUTOCAST[trainer.accelerator.mixed_precision]
    adapters = [p.dtype.itemsize for name, p in base.named_parameters() if ".lora_" in name]
    return Precision(
        weights=dtype.itemsize,
        e=2,  # by autocast or by the weights: variable-length attention takes nothing else
        adapter=max(adapters, default=4),
        quantised=quantised,
        autocast=autocast,
    )


def _base_dtypes(model: Any) -> set[torch.dtype]:
    """Of the weights that are neither adapters nor quantised."""
    return {p.dtype for name, p in model.named_parameters() if ".lora_" not in name and p.is_floating_point()}


def _rank(model: Any) -> int:
    """The largest of the adapters': where layers have different ones, more is counted than is there."""
    adapters = model.peft_config.values()
    return max(rank for lora in adapters for rank in (lora.r, *(lora.rank_pattern or {}).values()))


def _optim(trainer: Any) -> str:
    return OptimizerNames(trainer.args.optim).value
