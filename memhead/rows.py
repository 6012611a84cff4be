"""Rows that a mask leaves out are not computed: they are taken away before, and put back as zeros after."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def kept_rows(mask: Tensor | None) -> Tensor | None:
    """Indices of the rows that the mask (N,) keeps, or None where it keeps all. Synchronises a GPU."""
    if mask is None:
        return None
    kept = mask.nonzero().squeeze(1)
    return None if len(kept) == len(mask) else kept


def select(kept: Tensor | None, *tensors: Tensor | None) -> Any:
    """The kept rows of each tensor (N, *)."""
    return [x if x is None or kept is None else x.index_select(0, kept) for x in tensors]


def put_back(kept: Tensor | None, rows: Tensor, num_rows: int) -> Tensor:
    """Kept rows at the place they came from among ``num_rows``, zeros elsewhere."""
    return rows if kept is None else rows.new_zeros((num_rows, *rows.shape[1:])).index_copy_(0, kept, rows)
