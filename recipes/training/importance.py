"""Where another engine has sampled: what TRL multiplies the loss by, and how far the two are from each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Correction(NamedTuple):
    """TRL's ``vllm_importance_sampling_mode``, and the ends that it cuts at.

    The ratio is that of a token or of a sequence, cut to the ends (truncate), or 0 outside of them (mask).
    """

    mode: str
    low: float | None
    high: float | None

    @classmethod
    def of(cls, trainer: Any) -> Correction | None:
        """A trainer's; None where nothing is corrected."""
        if not (trainer.use_vllm and trainer.vllm_importance_sampling_correction):
            return None
        return cls(
            trainer.vllm_importance_sampling_mode,
            trainer.vllm_importance_sampling_clip_min,
            trainer.vllm_importance_sampling_clip_max,
        )

    @property
    def by_sequence(self) -> bool:
        """Whether a row has one ratio."""
        return self.mode.startswith("sequence")

    def ratio(
        self,
        old: Tensor,  # (B, K)
        sampled: Tensor,  # (B, K), NaN where the sampler gave none
        mask: Tensor,  # (B, K)
    ) -> Tensor:
        """(B, K), or (B, 1) by sequence."""
        difference = ((old - sampled) * mask).nan_to_num(nan=0.0)
        if self.by_sequence:
            difference = difference.sum(-1, keepdim=True)
        ratio = difference.exp()
        if self.mode.endswith("truncate"):
            return ratio.clamp(min=self.low, max=self.high)
        outside = torch.zeros_like(ratio, dtype=torch.bool)
        if self.low is not None:
            outside |= ratio < self.low
        if self.high is not None:
            outside |= ratio > self.high
        return ratio.masked_fill(outside, 0.0)


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
