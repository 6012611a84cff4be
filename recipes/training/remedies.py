"""What to change in a run that does not fit, as on the command line; what saves the most by its plan comes first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from recipes.config.load import RunConfig
from recipes.plan.plan import GIB, MIB, in_bins, measure
from recipes.plan.setting import Setting
from recipes.tracking.phases import PLANNED
from recipes.training.vllm_faults import other_share

LOADING = "loading the model"  # the phase of whatever is outside of every phase before training


def remedies(config: RunConfig, phase: str, setting: Setting | None) -> list[str]:
    """Settings to change; first those that by the plan save the most in this phase. setting: of it, if there is one."""
    if phase == LOADING:
        return _remedies_of_loading(config)
    own = {
        "warm start": (
            "run.warm_start.batch_size",
            config.run.warm_start and config.run.warm_start.batch_size,
        ),
        "evaluation": ("run.evaluation.batch_size", config.run.evaluation.batch_size),
    }
    key, size = own.get(phase, ("", 0))
    first = [f"{key}={size // 2}"] if size and size > 1 else []
    if setting is None:
        return [*first, *(text for text, _ in _changes(config, None))]
    name = PLANNED.get(phase.rpartition(": ")[2], "forward, loss and backward")
    before = measure(setting).phases[name]
    unplanned, saved = [], dict[str, int]()
    for text, other in _changes(config, setting):
        if other is None:
            unplanned.append(text)
        elif (gain := before - measure(other).phases[name]) > 0:
            saved[text] = gain
    ranked = sorted(saved, key=lambda text: -saved[text])
    return [*first, *(f"{text}  saves {gib(saved[text])} as planned" for text in ranked), *unplanned]


def _remedies_of_loading(config: RunConfig) -> list[str]:
    """Batches and lengths, which save in every other phase, save nothing in this one."""
    found = [other_share(config, "lower")] if config.own_vllm else []
    if config.lora is not None and torch.cuda.is_available() and not config.model.quantised:
        found.append("model.load_in_4bit=true")
    if config.model.dtype == "float32":
        found.append("model.dtype=bfloat16")
    return [*found, "more memory: end what else uses it, or take a larger device"]


def _changes(config: RunConfig, s: Setting | None) -> Iterator[tuple[str, Setting | None]]:
    """Each change as an override, and the resulting setting; None where that cannot be computed quickly."""
    grpo, model = config.grpo, config.model

    def changed(**values: Any) -> Setting | None:
        return None if s is None else replace(s, **values)

    if config.head.impl == "full":
        yield "head.impl=memhead", changed(head="memhead")
    if not model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", changed(checkpointing=True)
    size, steps = grpo["per_device_train_batch_size"], grpo["gradient_accumulation_steps"]
    if s is not None and s.bin_tokens is not None and s.bin_tokens > s.packed:
        budget = max(s.packed, s.bin_tokens // 2)  # a micro-batch is never divided
        yield f"step.token_budget={budget}", changed(bin_tokens=budget)
    elif size > 1:
        text = f"grpo.per_device_train_batch_size={size // 2} grpo.gradient_accumulation_steps={2 * steps}"
        smaller, told = changed(sequences=size // 2), config.step.token_budget
        if smaller and smaller.bin_tokens and (told is None or told > smaller.packed):
            # Bins would hold both halves again.
            text += f" step.token_budget={smaller.packed}"
        yield text, smaller and in_bins(config, smaller, 1)
    length = config.completion_length
    if length > 1:
        yield f"grpo.max_completion_length={length // 2}", changed(completion=length // 2)
    group = grpo["num_generations"]
    if s is not None and s.sampled > group and s.sampled % (2 * group) == 0:
        yield f"fewer completions sampled at a time ({s.sampled // 2})", changed(sampled=s.sampled // 2)
    if config.lora is None:
        yield "a lora section: adapters in place of every weight, its gradient and its optimizer state", None
    elif torch.cuda.is_available() and not config.model.quantised:
        yield "model.load_in_4bit=true", None


def gib(size: float) -> str:
    """Bytes for people: in GiB from a tenth of one on, else in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.2f} MiB"
