"""Memory of the device that a sleeping vLLM has given back, and that the caching allocator still counts as allocated.

vLLM's sleep unmaps its pools below PyTorch, which does not learn of it: on an H100 the allocator reported 58 GiB in a
backward pass that had 9, the rest being a cache asleep. The bytes are read from the device around each call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


class Asleep:
    """Bytes given back: now, and the least since `begin`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.now = self.least = 0

    def begin(self) -> None:
        """A stretch begins."""
        self.least = self.now

    def watch(self, engine: Any) -> None:
        """Count what `engine.sleep` gives back and `engine.wake_up` takes. engine: vLLM's LLM."""
        for name in ("sleep", "wake_up"):
            setattr(engine, name, self._counted(getattr(engine, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def counted(*args: Any, **options: Any) -> Any:
            before = self._beside_the_allocator()
            result = method(*args, **options)
            # The engine sleeps before anyone watches: what its first waking takes was given back earlier.
            self.now = max(0, self.now + self._beside_the_allocator() - before)
            self.least = min(self.least, self.now)
            return result

        return counted

    def _beside_the_allocator(self) -> int:
        """Free bytes and those that the allocator counts: it grows by what it does not know to be free."""
        return torch.cuda.mem_get_info(self._device)[0] + torch.cuda.memory_reserved(self._device)


def sleeping_engine(trainer: Any) -> Any:
    """The trainer's vLLM in this process, if it sleeps while the model trains; else None."""
    generation = getattr(trainer, "vllm_generation", None)
    engine = getattr(generation, "llm", None) or getattr(trainer, "llm", None)
    return engine if hasattr(engine, "wake_up") else None
