"""Attention over packed rows, through transformers' registry: no model's code is touched.

    CPU    one group per row, or a part of one that is long, and a dense mask, which the model's own attention accepts
    CUDA   all groups in one row, torch's varlen_attn: a segment's keys are its prompt's, gathered, and its own

The layout travels with the call as a keyword argument, not in a global: gradient checkpointing runs the attention again
during the backward, long after the forward has returned.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from recipes.models.attention import put_before, take_away, underlying
from recipes.training.packing import Packed, VarlenKeys

PREFIX = "packed_"
# Architectures with windows: of some kinds of layers, or one for all layers, whatever kinds a configuration names. Of
# others the models have no use for either.
_BY_KIND = ("gemma2", "gemma3_text", "qwen2", "qwen3", "smollm3")
_ALL_LAYERS_ALIKE = ("mistral", "phi3")
PACKED_ARGUMENT = "packed_keys"  # the keyword argument that carries VarlenKeys to the attention


def varlen_available(device: torch.device, *, half: bool) -> bool:
    """Whether torch has variable-length attention here: torch >= 2.10, compute capability 8 and later, 16 bits."""
    if not half or device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters


def use_varlen(model: Any) -> None:
    """Let ``model``'s attention take packed rows; every other call goes to the attention it had."""
    put_before(model, PREFIX, _packed)


def leave_varlen(model: Any) -> None:
    """Undo :func:`use_varlen`."""
    take_away(model, PREFIX)


def masks(packed: Packed, config: Any, dtype: torch.dtype) -> Any:
    """The ``attention_mask`` with one group per row: (R, 1, L, L), by kind of layer where there are two.

    Args:
        packed: on the model's device.
        config: of the text model: its kinds of layers and its window.
        dtype: of the mask that eager attention adds; the others take booleans.
    """
    slot = torch.arange(packed.source.shape[1], device=packed.source.device)
    segment = packed.segments
    same = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)
    sees = same & (slot[:, None] >= slot[None, :])  # (R, L, L): query, key

    def ready(sees: Tensor) -> Tensor:
        if underlying(config) == "eager":
            return torch.zeros((), dtype=dtype).masked_fill(~sees[:, None], torch.finfo(dtype).min)
        return sees[:, None]

    window = getattr(config, "sliding_window", None)
    if window is None or config.model_type not in (*_BY_KIND, *_ALL_LAYERS_ALIKE):
        return ready(sees)
    distance = packed.positions[:, :, None] - packed.positions[:, None, :]
    near = ready(sees & (distance < window))
    if config.model_type in _ALL_LAYERS_ALIKE:
        return near
    return {kind: near if kind == "sliding_attention" else ready(sees) for kind in set(config.layer_types)}


def no_mask(device: torch.device) -> Tensor:
    """A mask of four dimensions, which models pass on unchanged instead of making one; varlen ignores it."""
    return torch.zeros(1, 1, 1, 1, device=device)


def _packed(query: Tensor, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any]) -> Tensor | None:
    keys = options.pop(PACKED_ARGUMENT, None)
    return None if keys is None else varlen_attention(query, key, value, keys, **options)


def varlen_attention(
    query: Tensor,  # (1, heads, T, D)
    key: Tensor,  # (1, key heads, T, D)
    value: Tensor,  # (1, key heads, T, D)
    keys: VarlenKeys,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **ignored: Any,
) -> Tensor:
    """(1, T, heads, D). Causal from the bottom right: a segment's last query sees all of its keys."""
    from torch.nn.attention.varlen import varlen_attn

    if torch.is_autocast_enabled(query.device.type):  # which knows torch's own attention, but not this one
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows = query[0].transpose(0, 1).contiguous()  # (T, heads, D)
    seen_keys, seen_values = (gather(x[0].transpose(0, 1), keys) for x in (key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    out: Any = varlen_attn(  # a tensor, unless more is asked for
        rows, seen_keys, seen_values, keys.query_ends, keys.key_ends, keys.longest_query, keys.longest_keys,
        scale=scaling, window_size=window,
    )  # fmt: skip
    return out[None]


def gather(tokens: Tensor, keys: VarlenKeys) -> Tensor:
    """``tokens`` (T, heads, D), each as often as segments see it: (T_k, heads, D).

    The gradient of a token is the sum over its copies, in float32 where they have 16 bits, and in the same order every
    time; that of torch's own ``index_select`` rounds after each addition, and atomics leave the order to chance.
    """
    gathered: Tensor = _Gather.apply(tokens, keys)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, keys: VarlenKeys) -> Tensor:
        ctx.keys = keys
        return tokens.index_select(0, keys.keys)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # (T_k, heads, D)
        keys = ctx.keys
        # A bag is summed by one thread a column, in float32, and rounded once.
        summed = embedding_bag(keys.copies, gradient.flatten(1), keys.copies_begin, mode="sum")
        return summed.view(-1, *gradient.shape[1:]), None
