"""A model's layers by torch.compile: fewer and larger kernels, where launching many small ones is what takes time.

One layer is compiled for all of them, for any length, and only for forwards that keep no cache: the warm start, old
log-probabilities, the loss. Sampling keeps its own way (static_cache.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

Forward = Callable[..., Any]


def compile_layers(model: torch.nn.Module, backend: str = "inductor") -> int:
    """Let every layer of ``model`` run compiled where no cache is kept, and say how many there are.

    Nothing is compiled before a layer is first called. Copies of the model, and what is saved of it, have layers as
    they came. Elementwise chains are computed in float32 and rounded once, where PyTorch rounds after each operation.

    backend: of ``torch.compile``.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        # Where torch.nn.Module.compile keeps it, which copying and pickling leave out.
        layer._compiled_call_impl = _without_cache(layer._call_impl, backend)  # type: ignore[assignment]
    return len(layers)


def _without_cache(call: Forward, backend: str) -> Forward:
    compiled = torch.compile(call, dynamic=True, backend=backend)

    @wraps(call)
    def either(hidden: Tensor, *rest: Any, **options: Any) -> Any:
        if options.get("past_key_values") is not None or torch.compiler.is_compiling():
            return call(hidden, *rest, **options)
        if torch.is_grad_enabled():
            return compiled(
                hidden if hidden.requires_grad else hidden.detach().requires_grad_(), *rest, **options
            )
        # The same kernels with and without a gradient, so that a ratio that should be 1 is 1 to the bit.
        with torch.enable_grad():
            return compiled(hidden.detach().requires_grad_(), *rest, **options).detach()

    return either
