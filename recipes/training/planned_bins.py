"""The bins of the packed step in a script of your own: as told, as planned, or of a micro-batch's slots.

They are planned once, after the first completions are sampled and before the first loss. By then the prompts have been
seen, from whatever they come, and all that the plan does not count is on the GPU: a reward model, vLLM's share. A later
prompt may be longer: a bin then holds fewer completions, and a micro-batch is never divided anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from recipes.plan.plan import RESERVE, measure, planned_tokens
from recipes.plan.script import setting_of, unknown
from recipes.plan.setting import Setting

# Of the plan's parts, when the first loss is about to come.
_THERE = ("parameters", "reference model", "adapter and saved modules")
AS_TOLD = "as told, a micro-batch at least"


@dataclass(frozen=True)
class Bins:
    """tokens: of a bin; None for as many as a micro-batch has slots when padded. why: it is these."""

    tokens: int | None
    why: str

    def __str__(self) -> str:
        """In words."""
        if self.tokens is None:
            return f"bins of a micro-batch's slots: {self.why}"
        return f"bins of {self.tokens} tokens, {self.why}"


def bins_of(trainer: Any, told: int | None, prompt: int) -> Bins:
    """The bins that a trainer takes, where it is about to compute its first loss.

    Args:
        trainer: TRL's, with the packed step.
        told: tokens of a bin, by the script.
        prompt: tokens of the longest prompt seen.
    """
    if told is not None:
        return Bins(told, AS_TOLD)
    try:
        if (reason := next(unknown(trainer), None)) is not None:
            return Bins(None, reason)
        setting = setting_of(trainer, prompt)
    except Exception as error:  # of a model's own building, or an optimizer's; no reason for a script to end
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        return Bins(None, f"its memory could not be counted: {said}")
    if not setting.complete:
        return Bins(None, f"no formula covers the layers of {setting.shape.kind} with its attention")
    return Bins(planned_tokens(setting, room(trainer, setting)), "planned")


def room(trainer: Any, setting: Setting) -> int:
    """Bytes of the GPU that the plan may count on: those that are free, and what it counts and is there already.

    What torch's allocator keeps for later is given back before: what then is left of it are pieces, or a graph's.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(trainer.accelerator.device)
    parts = measure(setting).parts
    there = sum(parts[part] for part in _THERE)
    if trainer.optimizer.state:  # of a checkpoint; else it is made at the first update
        there += parts["optimizer"]
    return min(total, free + there + int(RESERVE))  # CUDA's context, which the plan counts as well
