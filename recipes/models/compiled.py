"""A model's layers by torch.compile: fewer and larger kernels, where launching many small ones is what takes time.

One layer is compiled for all of them, for any length, and only where a model trains and keeps no cache: the warm start,
old log-probabilities, the loss. Sampling keeps its own way (static_cache.py), evaluations and the head check the plain
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer

from recipes.problems import visible

Forward = Callable[..., Any]


def compile_layers(model: torch.nn.Module, backend: str | Forward = "inductor") -> None:
    """Let every layer of ``model`` run compiled while it trains, where no cache is kept.

    Nothing is compiled before a layer is first called; where that fails it is said, and all run as they came. Copies of
    the model have plain layers. Chains of elementwise operations are computed in float32 and rounded once, where
    PyTorch rounds after each, and the backward computes them again, where PyTorch keeps them.

    backend: of ``torch.compile``.
    """

    def give_up(error: Exception) -> None:
        make_plain(model)
        inner = getattr(error, "inner_exception", error)  # of a backend
        reason = visible(str(inner).partition("\n")[0])
        print(f"layers: torch.compile fails here, so they run as they came: {reason}", flush=True)

    for layer in _layers(model):
        # Where torch.nn.Module.compile keeps it, which copying and pickling leave out.
        layer._compiled_call_impl = _in_training(layer, backend, give_up)  # type: ignore[assignment]


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether `compile_layers` has been here."""
    return any(layer._compiled_call_impl is not None for layer in _layers(model))


def make_plain(model: torch.nn.Module) -> None:
    """Undo `compile_layers`."""
    for layer in _layers(model):
        layer._compiled_call_impl = None


@contextmanager
def plain_layers(model: torch.nn.Module) -> Iterator[None]:
    """Within it the layers run as they came."""
    kept = [(layer, layer._compiled_call_impl) for layer in _layers(model)]
    try:
        make_plain(model)
        yield
    finally:
        for layer, compiled in kept:
            layer._compiled_call_impl = compiled


def _layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _in_training(
    layer: torch.nn.Module, backend: str | Forward, give_up: Callable[[Exception], None]
) -> Forward:
    plain = layer._call_impl
    compiled = torch.compile(plain, dynamic=True, backend=backend)

    @wraps(plain)
    def call(hidden: Tensor, *rest: Any, **options: Any) -> Any:
        cached = options.get("past_key_values") is not None
        if cached or not layer.training or torch.compiler.is_compiling():
            return plain(hidden, *rest, **options)
        wanted = torch.is_grad_enabled()
        # The same graph with a gradient and without, here and below, so that a ratio that should be 1 is 1 to the bit.
        with torch.enable_grad():
            below = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
            try:
                found = compiled(below, *rest, **options)
            except TorchDynamoException as error:
                # Before anything was computed: no C compiler, no kernel for this card, a fault of the compiler.
                give_up(error)
                found = plain(below, *rest, **options)
        return found if wanted else tree_map_only(Tensor, Tensor.detach, found)

    return call
