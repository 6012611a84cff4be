"""Rows that a mask leaves out are not computed: they are taken out before, and put back as zeros after.

How many rows a mask keeps decides the size of every product, but a GPU can answer only once it has
worked through its queue, and then idles until the next launch arrives. :class:`KeptRows` therefore
launches the first rows before it asks, so that the answer arrives while the GPU works on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Stands for the count of kept rows where the GPU was not asked: all are computed, those left out as blanks.
ALL = -1


def kept_rows(mask: Tensor | None) -> Tensor | None:
    """Indices of the rows that the mask (N,) keeps, or None where it keeps all. Synchronises a GPU."""
    if mask is None:
        return None
    kept = mask.nonzero().squeeze(1)
    return None if len(kept) == len(mask) else kept


def select(kept: Tensor | None, *tensors: Tensor | None) -> Any:
    """The kept rows of each tensor (N, *)."""
    return [x if x is None or kept is None else x.index_select(0, kept) for x in tensors]


def put_back(kept: Tensor | slice | None, rows: Tensor, num_rows: int) -> Tensor:
    """Kept rows at the place they came from among ``num_rows``, zeros elsewhere."""
    if kept is None:
        return rows
    return _put(rows, kept, rows.new_zeros((num_rows, *rows.shape[1:])))


def _put(rows: Tensor, kept: Tensor | slice, into: Tensor) -> Tensor:
    if not isinstance(kept, slice):
        return into.index_copy_(0, kept, rows)
    if into[kept].data_ptr() != rows.data_ptr():
        into[kept] = rows
    return into


class Part(NamedTuple):
    """Some of N rows, worked on together."""

    which: Tensor | slice | None = None  # None: all
    real: Tensor | None = None  # (R,) bool: those among them that the mask keeps; None: all

    def take(self, x: Tensor | None, blank: float = 0) -> Any:
        """These rows of x (N, *), ``blank`` where the mask does not keep them."""
        if x is None:
            return None
        if self.which is not None:
            x = x[self.which] if isinstance(self.which, slice) else x.index_select(0, self.which)
        if self.real is None:
            return x
        return torch.where(_along(self.real, x), x, blank)

    def place(self, into: Tensor | None) -> Tensor | None:
        """These rows of ``into`` (N, *), where results need no copy by :meth:`put`; None where they are scattered."""
        return into[self.which] if into is not None and isinstance(self.which, slice) else None

    def put(self, rows: Tensor, num_rows: int, into: Tensor | None) -> Tensor:
        """Results (R, *) at their place among ``num_rows``, beside those of other parts, zeros elsewhere."""
        if self.real is not None:
            rows = rows.masked_fill_(~_along(self.real, rows), 0)
        if into is None or self.which is None:
            return put_back(self.which, rows, num_rows)
        return _put(rows, self.which, into)


def _along(real: Tensor, x: Tensor) -> Tensor:
    """A mask (R,) in the shape that it takes beside x (R, *)."""
    return real.view(-1, *[1] * (x.dim() - 1))


class KeptRows:
    """The rows that a mask (N,) keeps, in parts; the first ``unasked`` are launched before a GPU is asked how many."""

    def __init__(self, mask: Tensor | None, unasked: int | None) -> None:
        self.mask, self.unasked = mask, unasked
        # How many rows are kept, or ALL: for the backward pass, on the CPU, where reading it never waits.
        self.count = ALL

    def parts(self) -> Iterator[Part]:
        """The parts to compute, one after another; ``count`` is set after the last."""
        mask, first = self.mask, self.unasked
        if mask is None:
            yield Part()
        elif first is None:
            kept = kept_rows(mask)
            self.count = len(mask) if kept is None else len(kept)
            yield Part(kept)
        elif len(mask) <= first:
            yield Part(None, mask)
        else:
            order = _kept_first(mask)
            answer = _Answer(mask.sum())
            yield Part(order[:first], mask[order[:first]])
            self.count = answer.wait()
            if self.count == len(mask):
                yield Part(slice(first, None))
            elif self.count > first:
                yield Part(order[first : self.count])


def known_part(mask: Tensor, count: int) -> Part:
    """The rows that the mask (N,) keeps, given the count that :class:`KeptRows` found."""
    if count == len(mask):
        return Part()
    return Part(None, mask) if count == ALL else Part(_kept_first(mask)[:count])


def _kept_first(mask: Tensor) -> Tensor:
    """Indices of all rows (N,), those that the mask keeps before the others, each in their order."""
    return (~mask).to(torch.uint8).argsort(stable=True)


class _Answer:
    """A number on its way from the device."""

    def __init__(self, number: Tensor) -> None:
        self.number = number.to("cpu", non_blocking=True)
        self.sent = torch.Event(number.device) if number.device.type != "cpu" else None
        if self.sent is not None:
            self.sent.record()

    def wait(self) -> int:
        if self.sent is not None:
            self.sent.synchronize()
        return int(self.number)
