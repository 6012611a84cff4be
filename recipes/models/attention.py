"""A further way for a model's attention, through transformers' registry: no model's code is touched."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Of a query (B, heads, L, D), a key and a value (B, key heads, K, D), the mask and the options: the attention
# (B, L, heads, D), or None for a call that is not its own. It may take options that are its own away.
Way = Callable[[Tensor, Tensor, Tensor, Any, dict[str, Any]], Tensor | None]

_BEFORE: dict[
    str, str
] = {}  # by the name of an attention that something was put before, that of the attention


def put_before(model: Any, prefix: str, way: Way) -> None:
    """Ask ``way`` first; what it does not compute goes to the attention that the model had. Twice is once.

    prefix: of the attention's name in the text model's configuration from then on; :func:`take_away` has the same.
    """
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before.startswith(prefix):
        return
    name = prefix + before
    ALL_ATTENTION_FUNCTIONS.register(name, _first(way, before))
    if before in ALL_MASK_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    _BEFORE[name] = before
    config._attn_implementation = name


def underlying(config: Any) -> str:
    """The name of the attention that a configuration had before anything was put before it: whose masks it takes."""
    name: str = config._attn_implementation
    while name in _BEFORE:
        name = _BEFORE[name]
    return name


def take_away(model: Any, prefix: str) -> None:
    """Undo :func:`put_before`, if nothing else has been put before it since."""
    config = model.config.get_text_config()
    config._attn_implementation = config._attn_implementation.removeprefix(prefix)


def _first(way: Way, before: str) -> Any:
    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        found = way(query, key, value, attention_mask, options)
        if found is not None:
            return found, None
        own = ALL_ATTENTION_FUNCTIONS.get_interface(before, _eager(module))
        return own(module, query, key, value, attention_mask, **options)

    return attention


def _eager(module: torch.nn.Module) -> Any:
    """The plain attention in the file of the model's own code."""
    return getattr(inspect.getmodule(type(module)), "eager_attention_forward", None)
