"""The arithmetic that a step cannot do without, in floating-point operations, and the tokens that it is counted from.

A multiplication and an addition are two operations. What a run computes twice by choice (activation checkpointing, the
head's logits in its backward) is not counted, nor is padding: the figures are a floor. docs/speed.md derives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from recipes.plan.shapes import ModelShape, Trained

_UNSEEN = 0.05  # share of the weights that may lie outside the matrices that are counted


@dataclass(frozen=True)
class Flow:
    """What goes through a model. pairs: of a token and one that its attention sees, summed over the tokens."""

    tokens: int = 0
    scored: int = 0  # of them, those whose next token's log-probability is computed
    pairs: int = 0

    def __add__(self, other: Flow) -> Flow:
        return Flow(self.tokens + other.tokens, self.scored + other.scored, self.pairs + other.pairs)

    def __mul__(self, times: int) -> Flow:
        return Flow(self.tokens * times, self.scored * times, self.pairs * times)

    @classmethod
    def of_lengths(cls, prompts: Sequence[int], completions: Sequence[int], groups: Sequence[int]) -> Flow:
        """Of completions, a prompt counted once for those of the same group. All three are as long."""
        first = dict(zip(groups, prompts, strict=True))
        whole = cls(sum(first.values()), 0, sum(p * p // 2 for p in first.values()))
        own = sum(completions)
        seen = sum(c * p + c * c // 2 for p, c in zip(prompts, completions, strict=True))
        return whole + cls(own, own, seen)

    @classmethod
    def packed(cls, prompts: Sequence[int], completions: Sequence[int], groups: Sequence[int]) -> Flow:
        """The same in packed rows, in which no completion has its last token: it predicts nothing."""
        flow = cls.of_lengths(prompts, [length - 1 for length in completions], groups)
        return replace(flow, scored=sum(completions))


@dataclass(frozen=True)
class Work:
    """A model's matrices, in weights. A token costs two operations a weight in a pass through it."""

    linear: int  # of the layers
    adapters: int
    head: int
    attention: int  # width of all heads side by side, summed over the layers
    frozen: bool  # the layers' weights get no gradient
    frozen_head: bool

    @classmethod
    def of(cls, shape: ModelShape, trained: Trained) -> Work | None:
        """None where the weights that a token meets are not known: of a mixture of experts."""
        head = shape.vocab * shape.hidden
        if shape.parameters - shape.linear - 2 * head > _UNSEEN * shape.linear:
            return None
        width = shape.hidden if shape.layer is None else shape.layer.attention_width
        return cls(
            linear=shape.linear,
            adapters=trained.adapters,
            head=head,
            attention=shape.layers * width,
            frozen=bool(trained.adapters),
            frozen_head=not trained.head,
        )

    def forward(self, flow: Flow) -> float:
        """Without gradient: sampling and scoring."""
        weights = self.linear + self.adapters
        return 2.0 * weights * flow.tokens + 2.0 * self.head * flow.scored + 4.0 * self.attention * flow.pairs

    def training(self, flow: Flow) -> float:
        """Forward and backward: one more product for the gradient of what comes in, one for that of a weight."""
        products = (2 if self.frozen else 3) * self.linear + 3 * self.adapters
        head = (2 if self.frozen_head else 3) * self.head
        return 2.0 * products * flow.tokens + 2.0 * head * flow.scored + 12.0 * self.attention * flow.pairs
