"""Attention of one query over a static cache, by two batched products, without copies of the cache.

With fewer key heads than query heads and a mask, torch's attention on a GPU takes keys and values repeated for every
query head, and its kernel is made for many queries: 80 % of a decoding step of SmolLM2-135M on an H100
(benchmarks/results/generation_h100.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recipes.models.attention import put_before

PREFIX = "decoding_"
# All but the first are in the mask, or no matter of attention.
_UNDERSTOOD = {"scaling", "sliding_window", "is_causal", "position_ids", "use_cache", "cache_position"}


def use_for_decoding(model: Any) -> None:
    """Let ``model``'s attention take single queries by :func:`decode`; every other call goes to what it had."""
    put_before(model, PREFIX, _decoding)


def _decoding(query: Tensor, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any]) -> Tensor | None:
    if not (_one_masked_query(query, mask) and _plain(options)):
        return None
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    return decode(query, key, value, mask, scale).transpose(1, 2)


def _one_masked_query(query: Tensor, mask: Any) -> bool:
    """Without a gradient, with sdpa's mask: booleans, four dimensions (flash attention's has two)."""
    return (
        query.shape[2] == 1
        and isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and mask.ndim == 4
        and not torch.is_grad_enabled()
    )


def _plain(options: dict[str, Any]) -> bool:
    """Whether nothing is asked for beyond softmax(scale · query · key) · value: no dropout, softcap or sinks."""
    others = (value for name, value in options.items() if name not in _UNDERSTOOD)
    return all(value is None or (isinstance(value, float | bool) and not value) for value in others)


def decode(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scale: float) -> Tensor:
    """(B, heads, 1, D) in the values' dtype, to which scores and probabilities are rounded; softmax in float32.

    Args:
        query: (B, heads, 1, D); those of one key head lie side by side.
        key, value: (B, key heads, L, D).
        sees: (B or 1, 1, 1, L) bool. A query that sees nothing reads zeros, as in torch's attention.
    """
    dtype = torch.float32 if value.dtype.itemsize < 4 else value.dtype
    grouped = query.to(value.dtype).view(len(query), key.shape[1], -1, query.shape[-1])
    scores = (grouped @ key.transpose(2, 3)).to(dtype) * scale  # (B, key heads, group, L)
    probabilities = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    probabilities = probabilities.masked_fill(~sees, 0.0).to(value.dtype)
    return (probabilities @ value).view_as(query)
