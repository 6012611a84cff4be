"""LoRA on ``lm_head`` in TRL's trainers.

TRL hands its head ``lm_head.weight`` alone, so it refuses a head that carries an adapter. With
memhead in its slot the adapter can be taken into account: :func:`allow_lora_head` lifts the refusal
for plain LoRA, and lets the slot know which module's weight it is given.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torch import nn

TRAINERS = ("grpo", "rloo", "dpo", "kto", "sft")

_head: ContextVar[nn.Module | None] = ContextVar("memhead_current_head", default=None)


def current_head() -> nn.Module | None:
    """The output embedding of the model whose fused forward is running, adapter layers and all."""
    return _head.get()


@contextmanager
def scoring_with(head: nn.Module) -> Iterator[None]:
    """Name the module whose weight the slot is about to receive."""
    token = _head.set(head)
    try:
        yield
    finally:
        _head.reset(token)


def allow_lora_head() -> Callable[[], None]:
    """Lift TRL's refusal for heads that :mod:`memhead.integrations.peft` can compute.

    Returns:
        A function that puts everything back. Trainers made meanwhile keep working as long as memhead
        stays installed.
    """
    with ExitStack() as undo:  # an import that fails leaves nothing behind
        for name in TRAINERS:
            module = importlib.import_module(f"trl.trainer.{name}_trainer")
            if hasattr(module, "add_fused_lm_head"):
                _replace(undo, module, "add_fused_lm_head", _announcing)
            if hasattr(module, "BaseTunerLayer"):  # absent where PEFT is not installed
                _replace(undo, module, "BaseTunerLayer", _layers_to_refuse)
        return undo.pop_all().close


def _replace(undo: ExitStack, module: ModuleType, name: str, replacement: Callable[[Any], Any]) -> None:
    original = getattr(module, name)
    setattr(module, name, replacement(original))
    undo.callback(setattr, module, name, original)


def _layers_to_refuse(base: type) -> type:
    """A class whose instances are the adapter layers that the slot cannot compute."""
    from memhead.integrations.peft import is_supported

    class Refused(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, base) and not is_supported(instance)

    return Refused("BaseTunerLayer", (), {})


def _announcing(add_fused_lm_head: Callable[..., None]) -> Callable[..., None]:
    """TRL's patch of a model's forward, extended to say which module's weight it hands to the slot."""

    @functools.wraps(add_fused_lm_head)
    def add(model: Any, *args: Any, **kwargs: Any) -> None:
        add_fused_lm_head(model, *args, **kwargs)
        if kwargs.get("cast_lm_head_to_fp32") and hasattr(model.get_output_embeddings(), "base_layer"):
            raise ValueError(
                "cast_lm_head_to_fp32=True replaces the head's forward, and with it the adapter on lm_head; "
                "set it to False: memhead's logits are float32 anyway"
            )
        fused = model.forward.__func__  # of TRL's method; a copy of the model calls it for itself

        @functools.wraps(type(model).forward)  # generate() reads the signature
        def forward(self: Any, *forward_args: Any, **forward_kwargs: Any) -> Any:
            with scoring_with(self.get_output_embeddings()):
                return fused(self, *forward_args, **forward_kwargs)

        model.forward = types.MethodType(forward, model)

    return add
