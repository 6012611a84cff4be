"""Half-precision weights computed with in float32, a part of the model at a time.

A model in float32 takes twice the memory of one in bfloat16, and a host that holds the one may not hold the other.

with in_float32(model):
    model(input_ids=tokens)          a layer's weights are float32 while that layer computes
merged = merged_once_rounded(model)  an adapter added to its base in float32, a layer at a time
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While `model` computes inside, each part's weights and buffers are float32; afterwards what they were."""
    handles = []
    for part, tensors in _parts(model):
        before: dict[Tensor, Tensor] = {}

        def widen(*_: Any, tensors: list[Tensor] = tensors, before: dict[Tensor, Tensor] = before) -> None:
            for tensor in tensors:
                before[tensor], tensor.data = tensor.data, tensor.data.float()

        def restore(*_: Any, before: dict[Tensor, Tensor] = before) -> None:
            while before:
                tensor, data = before.popitem()
                tensor.data = data

        handles.append(part.register_forward_pre_hook(widen))
        handles.append(part.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(module: nn.Module) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Modules with the half-precision tensors that they compute with: every layer of a stack whole, since modules in it
    may reach for one another's weights; and what lies around the stacks."""
    stacked = any(isinstance(inner, nn.ModuleList) for inner in module.modules())
    if isinstance(module, nn.ModuleList) or not stacked:
        for part in module if isinstance(module, nn.ModuleList) else [module]:
            yield part, _halves(part, recurse=True)
        return
    yield module, _halves(module, recurse=False)
    for child in module.children():
        yield from _parts(child)


def _halves(module: nn.Module, recurse: bool) -> list[Tensor]:
    tensors = [*module.parameters(recurse), *module.buffers(recurse)]
    return [tensor for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]


def merged_once_rounded(model: Any) -> Any:
    """The base of a PEFT model with its adapters merged in, each weight in the base's dtype and rounded to it once.

    PEFT in half precision rounds an adapter's product, and then the sum. Raises ValueError for NaN in a merged weight.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    named = model.get_base_model().named_parameters(remove_duplicate=False)  # tied ones may part
    dtypes = {_plain(name): weight.dtype for name, weight in named}
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        layer.merge = _widened(layer)
    merged = model.merge_and_unload(safe_merge=True)
    for name, weight in merged.named_parameters():
        weight.data = weight.to(dtypes[name])  # what is trained beside an adapter, in float32
    return merged


def _widened(layer: Any) -> Any:
    """PEFT's `merge` of a layer, in float32; the base's weights are then rounded to the dtype that they had."""
    merge = layer.merge

    @wraps(merge)
    def widened(*args: Any, **options: Any) -> None:
        weights = list(layer.get_base_layer().parameters())
        dtypes = [weight.dtype for weight in weights]
        layer.float()
        merge(*args, **options)
        for weight, dtype in zip(weights, dtypes, strict=True):
            weight.data = weight.data.to(dtype)

    return widened


def _plain(name: str) -> str:
    """Of a base weight that PEFT wraps, or keeps beside its trained copy, the name without that."""
    wrappers = {"base_layer", "original_module", "token_adapter"}
    return ".".join(part for part in name.split(".") if part not in wrappers)
