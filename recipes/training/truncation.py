"""Ratios that are unbiased although the sampler truncates (top-k, top-p, min-p).

A truncating sampler draws from the policy renormalised over a few tokens. The mean ratio of new to old probability is 1
only if both are renormalised over those same tokens: `memhead.support`. So the support of every completion token is
found once, where the policy that sampled is scored, and kept until the completions' last update. vLLM reports
log-probabilities over its own support, so the importance ratio of trainer to sampler needs the same.

    supported(trainer_class, truncation)    TRL's trainer with such ratios; the packed step keeps supports by itself
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memhead.integrations.handle import Truncated
from memhead.integrations.trl import installed
from memhead.ragged_support import Support, Truncation
from recipes.config.load import RunConfig

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Trainer
else:
    _Trainer = object

BEGIN, SIZE = (
    "support_begin",
    "support_size",
)  # (B, K): where each completion token's support lies in the rollout's


def truncation_of(config: RunConfig) -> Truncation | None:
    """What the run's sampler cuts off, where the run's head can follow it: memhead's, under TRL's trainer."""
    if config.head.impl != "memhead" or config.model.loader == "unsloth":
        return None
    grpo = config.grpo
    found = Truncation(
        top_k=grpo["top_k"] or None,
        top_p=grpo["top_p"] if grpo["top_p"] < 1.0 else None,
        min_p=grpo["min_p"] or None,
    )
    return None if found == Truncation() else found


def supported(trainer_class: type, truncation: Truncation | None) -> type:
    """The class itself without truncation."""
    if truncation is None:
        return trainer_class
    return type(
        f"Supported{trainer_class.__name__}", (SupportedRatios, trainer_class), {"truncation": truncation}
    )


class SupportedRatios(_Trainer):
    """To be put before TRL's trainer."""

    truncation: Truncation
    _support: Support | None = None  # of the rollout's real completion tokens, as TRL made it
    _sampling = False
    _of_the_loss: Truncated | None = None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """TRL's method. Where it scores the policy that sampled, the supports come with its tensors."""
        self._sampling = True
        self._support = None
        try:
            tensors = super()._generate_and_score_completions(inputs)
        finally:
            self._sampling = False
        if self._support is not None:
            mask = tensors["completion_mask"].bool()
            for name, values in ((BEGIN, self._support.begin), (SIZE, self._support.size)):
                tensors[name] = torch.zeros_like(mask, dtype=torch.long).masked_scatter(mask, values)
        return tensors

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        self._of_the_loss = Truncated(self.truncation, self._kept(inputs))
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._of_the_loss = None

    def _kept(self, inputs: Any) -> Support | None:
        """None where no update lies between sampling and loss: the supports are then found in the loss pass."""
        if BEGIN not in inputs:
            return None
        assert self._support is not None
        mask = inputs["completion_mask"].bool()
        return Support(self._support.tokens, inputs[BEGIN][mask], inputs[SIZE][mask])

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        truncated = Truncated(self.truncation) if self._sampling else self._of_the_loss
        with over_supports(truncated):
            scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._sampling and truncated is not None and truncated.found:
            self._support = Support.joined(truncated.found)
        return scores


@contextmanager
def over_supports(truncated: Truncated | None) -> Iterator[None]:
    """While it lasts, the installed head scores so; None: over the whole vocabulary."""
    handle = installed()
    if handle is None:
        yield
        return
    before, handle.truncated = handle.truncated, truncated
    try:
        yield
    finally:
        handle.truncated = before
