"""The head's weight as the sweeps read it: tiles of vocabulary rows, and single rows.

A dense weight is sliced; a low-rank update is laid beside it tile by tile; a quantised weight
(:mod:`memhead.integrations.bitsandbytes`) is widened tile by tile. No weight-sized copy ever exists.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class WeightPart(NamedTuple):
    """Some of the H features of a weight that get a gradient of their own, and its dtype."""

    features: slice
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """The number of features."""
        return self.features.stop - self.features.start


class Weight(Protocol):
    """What the sweeps need of a head weight of shape (V, H)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H)."""
        ...

    @property
    def parts(self) -> tuple[WeightPart, ...]:
        """The tensors that the weight is made of, as far as they can be trained."""
        ...

    def views(self, dtype: torch.dtype) -> bool:
        """Whether tiles of ``dtype`` are views, and cost no memory however large."""
        ...

    def tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start:stop as a (stop - start, H) tensor of ``dtype``."""
        ...

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows at ``indices`` (R,) as an (R, H) tensor of ``dtype``."""
        ...


class DenseWeight:
    """A plain tensor (V, H); a tile is a view where the dtype already fits."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def parts(self) -> tuple[WeightPart, ...]:
        """See :class:`Weight`."""
        return (WeightPart(slice(0, self.weight.shape[1]), self.weight.dtype),)

    def views(self, dtype: torch.dtype) -> bool:
        """See :class:`Weight`."""
        return self.weight.dtype == dtype

    def tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`Weight`; a view where the dtype already fits."""
        return self.weight[start:stop].to(dtype)

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`Weight`."""
        return self.weight.index_select(0, indices).to(dtype)


class LowRankWeight:
    """``[W | B]`` (V, H + r), which multiplied by ``[h | s A h]`` gives ``W h + s B A h``: LoRA, unmerged."""

    def __init__(self, base: Weight, update: Tensor) -> None:
        self.base, self.update = base, DenseWeight(update)

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H + r)."""
        return self.base.shape[0], self.base.shape[1] + self.update.shape[1]

    @property
    def parts(self) -> tuple[WeightPart, ...]:
        """See :class:`Weight`; the update's is the last."""
        features = slice(self.base.shape[1], self.shape[1])
        return (*self.base.parts, WeightPart(features, self.update.weight.dtype))

    def views(self, dtype: torch.dtype) -> bool:
        """See :class:`Weight`."""
        return False

    def tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`Weight`."""
        return torch.cat((self.base.tile(start, stop, dtype), self.update.tile(start, stop, dtype)), 1)

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`Weight`."""
        return torch.cat((self.base.rows(indices, dtype), self.update.rows(indices, dtype)), 1)
