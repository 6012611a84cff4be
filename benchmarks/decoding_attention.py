"""Attention of one query over a static cache, without copies of the keys: two ways, to be measured.

With fewer key heads than query heads and a mask, torch's attention on a GPU wants keys and values repeated for every
query head, and its kernel is made for many queries: 80 % of a decoding step of SmolLM2-135M on an H100.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "decoding_"


def use_for_decoding(model: Any, decode: Callable[..., Tensor]) -> None:
    """Let ``model``'s attention take single queries by ``decode``; every other call goes to the attention it had."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        before = config._attn_implementation
        ALL_ATTENTION_FUNCTIONS.register(PREFIX + before, _decoding_or(before, decode))
        ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + before, ALL_MASK_ATTENTION_FUNCTIONS[before])
        config._attn_implementation = PREFIX + before


def _decoding_or(before: str, decode: Callable[..., Tensor]) -> Any:
    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if query.shape[2] == 1 and attention_mask is not None and attention_mask.dtype == torch.bool:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return decode(query, key, value, attention_mask, scale).transpose(1, 2), None
        own = ALL_ATTENTION_FUNCTIONS.get_interface(before, _eager(module))
        return own(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)

    return attention


def _eager(module: torch.nn.Module) -> Any:
    return getattr(inspect.getmodule(type(module)), "eager_attention_forward", None)


def by_sums(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scale: float) -> Tensor:
    """(B, heads, 1, D); products and sums in float32 that a compiler fuses.

    Args:
        query: (B, heads, 1, D).
        key, value: (B, key heads, L, D).
        sees: (B or 1, 1, 1, L) bool.
    """
    grouped = query.to(value.dtype).view(len(query), key.shape[1], -1, 1, query.shape[-1]).float()
    scores = (grouped * key.float()[:, :, None]).sum(-1) * scale  # (B, key heads, group, L)
    probabilities = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    read = (probabilities[..., None] * value.float()[:, :, None]).sum(-2)  # (B, key heads, group, D)
    return read.to(value.dtype).view_as(query)


def by_products(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scale: float) -> Tensor:
    """The same by batched products of matrices; scores and probabilities are rounded to the values' dtype."""
    grouped = query.to(value.dtype).view(len(query), key.shape[1], -1, query.shape[-1])
    scores = (grouped @ key.transpose(2, 3)).float() * scale  # (B, key heads, group, L)
    probabilities = scores.masked_fill(~sees, -torch.inf).softmax(-1).to(value.dtype)
    return (probabilities @ value).view_as(query)


WAYS: dict[str, Callable[..., Tensor]] = {"sums": by_sums, "products": by_products}
