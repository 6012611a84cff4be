"""What a packed step reports: tokens, the share of rows left out, and how far the sampler's probabilities are off."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recipes.processes import gathered


@dataclass
class StepMeter:
    """Counts over one accumulation window of this process."""

    began: float | None = None
    computed: int = 0  # tokens of packed forwards with a gradient
    real: int = 0  # prompt and completion tokens of all rows, a prompt counted for each of its completions
    rows: int = 0
    left_out: int = 0

    def begin(self) -> None:
        """A window begins."""
        self.began = time.perf_counter()
        self.computed = self.real = self.rows = self.left_out = 0

    def add(self, *, computed: int, real: int, rows: int, left_out: int) -> None:
        """The counts of one bin."""
        self.computed += computed
        self.real += real
        self.rows += rows
        self.left_out += left_out

    def metrics(self) -> dict[str, float]:
        """Of all processes together.

        Seconds run from the first micro-batch to the last backward, sampling included, the optimizer not.
        """
        assert self.began is not None
        seconds = time.perf_counter() - self.began
        own = self.computed, self.real, self.rows, self.left_out, seconds
        *counts, seconds_by_process = zip(*gathered(own), strict=True)
        computed, real, rows, left_out = map(sum, counts)
        return {
            "step/tokens_computed": float(computed),
            "step/tokens_real": float(real),
            "step/left_out": left_out / max(1, rows),
            "step/tokens_per_second": real / max(seconds_by_process),
        }


@dataclass
class SamplingGap:
    """TRL's metrics of sampler against trainer, over the tokens whose old log-probabilities were computed."""

    differences: list[Tensor] = field(default_factory=list)
    ratios: list[Tensor] = field(default_factory=list)

    def add(self, difference: Tensor, ratio: Tensor) -> None:
        """One-dimensional: absolute differences in nats, importance ratios."""
        self.differences.append(difference)
        self.ratios.append(ratio)

    def take(self, accelerator: Any) -> dict[str, float]:
        """The metrics since the last call, over all processes; empty if nothing was added."""
        if not self.ratios:
            return {}
        difference, ratio = torch.cat(self.differences), torch.cat(self.ratios)
        difference = difference[~difference.isnan()]
        self.differences.clear()
        self.ratios.clear()
        nothing = torch.zeros(1, device=ratio.device)
        difference, ratio = (x.float() if x.numel() else nothing for x in (difference, ratio))

        def over_processes(value: Tensor) -> Tensor:
            return accelerator.gather(value)

        name = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
        return {
            f"{name[0]}/mean": over_processes(difference.mean()).mean().item(),
            f"{name[0]}/max": over_processes(difference.max()).max().item(),
            f"{name[1]}/min": over_processes(ratio.min()).min().item(),
            f"{name[1]}/mean": over_processes(ratio.mean()).mean().item(),
            f"{name[1]}/max": over_processes(ratio.max()).max().item(),
        }


def importance_ratio(
    old: Tensor,  # (B, K)
    sampled: Tensor,  # (B, K), NaN where the sampler gave none
    mask: Tensor,  # (B, K)
    mode: str,
    low: float | None,
    high: float | None,
) -> Tensor:
    """What TRL multiplies a loss by where another engine sampled: (B, K), or (B, 1) by sequence.

    ``mode`` is TRL's ``vllm_importance_sampling_mode``: the ratio of a token or of a sequence, cut to ``low`` and
    ``high`` (truncate), or 0 outside of them (mask).
    """
    level, treatment = mode.split("_")
    difference = ((old - sampled) * mask).nan_to_num(nan=0.0)
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    if treatment == "truncate":
        return ratio.clamp(min=low, max=high)
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        outside |= ratio < low
    if high is not None:
        outside |= ratio > high
    return ratio.masked_fill(outside, 0.0)
