"""Attention of one query over a static cache, without copies of the keys.

With fewer key heads than query heads and a mask, torch's attention on a GPU wants keys and values repeated for every
query head, and its kernel is made for many queries: 80 % of a decoding step of SmolLM2-135M on an H100. Written as
products and sums that a compiler fuses, a step reads the cache once.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "decoding_"


def use_for_decoding(model: Any) -> None:
    """Let ``model``'s attention take single queries this way; every other call goes to the attention it had."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        before = config._attn_implementation
        if before.startswith(PREFIX) or not before.endswith("sdpa"):  # others have masks of another kind
            continue
        ALL_ATTENTION_FUNCTIONS.register(PREFIX + before, _decoding_or(before))
        ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + before, ALL_MASK_ATTENTION_FUNCTIONS[before])
        config._attn_implementation = PREFIX + before


def _decoding_or(before: str) -> Any:
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
        alone = query.shape[2] == 1 and not torch.is_grad_enabled() and not dropout
        if alone and attention_mask is not None and attention_mask.dtype == torch.bool:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return decode(query, key, value, attention_mask, scale).transpose(1, 2), None
        own = ALL_ATTENTION_FUNCTIONS.get_interface(before, _eager(module))
        return own(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)

    return attention


def _eager(module: torch.nn.Module) -> Any:
    return getattr(inspect.getmodule(type(module)), "eager_attention_forward", None)


def decode(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scale: float) -> Tensor:
    """(B, heads, 1, D) in the values' dtype; scores, probabilities and sums in float32 or better.

    Args:
        query: (B, heads, 1, D).
        key, value: (B, key heads, L, D).
        sees: (B or 1, 1, 1, L) bool. A query that sees nothing gets zeros.
    """
    batch, heads, _, size = query.shape
    wide = torch.promote_types(value.dtype, torch.float32)
    grouped = (
        query.to(value.dtype).view(batch, key.shape[1], -1, 1, size).to(wide)
    )  # (B, key heads, group, 1, D)
    scores = (grouped * key.to(wide)[:, :, None]).sum(-1) * scale  # (B, key heads, group, L)
    probabilities = scores.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num(0.0)
    read = (probabilities[..., None] * value.to(wide)[:, :, None]).sum(-2)  # (B, key heads, group, D)
    return read.to(value.dtype).view(batch, heads, 1, size)
