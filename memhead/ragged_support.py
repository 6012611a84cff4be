"""The supports of many rows, each as long as it is: what a trainer keeps between sampling and the last update.

    support = Support.find(hidden, weight, targets, Truncation(top_p=0.8))    # of the policy that sampled
    support.logprobs(hidden, weight, targets)                                 # of that one, or a later one

Most rows of a language model keep a handful of tokens and some keep thousands, so a rectangle of all rows would be as
wide as the widest. Rows of like size are computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memhead.logprobs import LinearLogprobs
from memhead.support import SupportTooLarge, supported_logprobs, truncation_support

_ROWS = 2048  # looked at together, to bound the rectangle that a search returns
_USUAL = 1024  # tokens: a row that keeps more is looked for again with room for the whole vocabulary


@dataclass(frozen=True)
class Truncation:
    """What a sampler cuts off; ``None`` where it does not. See :func:`memhead.support.truncation_support`."""

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


@dataclass(frozen=True)
class Support:
    """Of N rows: a row's tokens are ``tokens[begin : begin + size]``, the most likely first."""

    tokens: Tensor  # (M,) int32
    begin: Tensor  # (N,) int64
    size: Tensor  # (N,) int64

    @classmethod
    def find(
        cls,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        targets: Tensor,  # (N,) drawn, and so in the support
        truncation: Truncation,
        **head: Any,
    ) -> Support:
        """From the hidden states of the policy that sampled.

        Args:
            hidden: see :func:`memhead.support.truncation_support`.
            weight: likewise.
            targets: there ``include``.
            truncation: there ``top_k``, ``top_p``, ``min_p``.
            head: ``bias``, ``temperature``, ``softcap``, ``logit_scale`` of the same.

        Raises:
            ValueError: see there.
        """
        parts = [
            _find(hidden[start : start + _ROWS], weight, targets[start : start + _ROWS], truncation, head)
            for start in range(0, len(hidden), _ROWS)
        ]
        kept = [ids >= 0 for ids in parts]
        size = _cat([keep.sum(1) for keep in kept], targets)
        tokens = _cat([ids[keep].int() for ids, keep in zip(parts, kept, strict=True)], targets.int())
        return cls(tokens, size.cumsum(0) - size, size)

    def __len__(self) -> int:
        return len(self.size)

    def rows(self, index: Tensor | slice) -> Support:
        """Those rows, of the same tokens."""
        return Support(self.tokens, self.begin[index], self.size[index])

    @classmethod
    def joined(cls, parts: Sequence[Support]) -> Support:
        """The rows of all parts, one after the other. There must be at least one part."""
        offsets = [0]
        for part in parts[:-1]:
            offsets.append(offsets[-1] + len(part.tokens))
        begins = [part.begin + offset for part, offset in zip(parts, offsets, strict=True)]
        return cls(
            torch.cat([part.tokens for part in parts]),
            torch.cat(begins),
            torch.cat([part.size for part in parts]),
        )

    def scattered(self, place: Tensor, number: int) -> Support:
        """`number` rows, of which row ``place[i]`` is row i of these; the others have no tokens."""
        begin, size = (x.new_zeros(number).index_copy(0, place, x) for x in (self.begin, self.size))
        return Support(self.tokens, begin, size)

    def padded(self) -> Tensor:
        """As a rectangle, (N, widest) int64, padded with -1; it has one column at least."""
        widest = max(1, int(self.size.max())) if len(self) else 1
        place = torch.arange(widest, device=self.size.device)
        inside = place < self.size[:, None]
        found = torch.full(inside.shape, -1, device=inside.device)
        found[inside] = self.tokens[(self.begin[:, None] + place)[inside]].long()
        return found

    def logprobs(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool = False, **head: Any
    ) -> LinearLogprobs:
        """:func:`memhead.support.supported_logprobs` of the rows, which are as many as these.

        A row that has no tokens, since it was not looked at, has its target alone: a log-probability of 0.
        """
        if len(hidden) != len(self):
            raise ValueError(f"hidden has {len(hidden)} rows, the support {len(self)}")
        found: list[list[Tensor]] = []
        order: list[Tensor] = []
        doubling = self.size.clamp(min=1).double().log2().ceil()  # sizes up to 1, 2, 4, 8, …
        for kind in doubling.unique().tolist():
            index = (doubling == kind).nonzero()[:, 0]
            rows, drawn = self.rows(index), targets[index]
            ids = rows.padded()
            ids[:, 0] = torch.where(rows.size == 0, drawn, ids[:, 0])
            part = supported_logprobs(hidden[index], weight, drawn, ids, entropy=entropy, **head)
            order.append(index)
            found.append([x for x in part if x is not None])
        if not found:
            return supported_logprobs(hidden, weight, targets, self.padded(), entropy=entropy, **head)
        back = torch.cat(order).argsort()
        return LinearLogprobs(*(torch.cat(column)[back] for column in zip(*found, strict=True)))


def _find(
    hidden: Tensor, weight: Tensor, targets: Tensor, truncation: Truncation, head: dict[str, Any]
) -> Tensor:
    options = {**vars(truncation), **head, "include": targets}
    try:
        return truncation_support(hidden, weight, max_size=_USUAL, **options)
    except SupportTooLarge:
        return truncation_support(hidden, weight, max_size=weight.shape[0], **options)


def _cat(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else like.new_empty(0)
