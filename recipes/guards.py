"""Callbacks of the trainer: a training step that went past memhead stops the run, Ctrl-C ends it in order,
and the accuracy is measured now and then."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from transformers import TrainerCallback


class Calls(Protocol):
    """The part of an installed head that is looked at: how often it was called."""

    calls: int


class HeadBypassed(RuntimeError):
    """A training step was taken and the head was never called."""


class BypassGuard(TrainerCallback):
    """Raises `HeadBypassed` at the end of an optimizer step during which `handle.calls` did not grow.

    A bypass is silent in TRL and in Unsloth: training goes on, with other memory and perhaps other numbers.
    """

    def __init__(self, handle: Calls) -> None:
        self._handle = handle
        self._before = handle.calls

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the count."""
        self._before = self._handle.calls

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the count."""
        if self._handle.calls == self._before:
            raise HeadBypassed(
                f"training step {state.global_step} never reached memhead: its log-probabilities were computed by "
                "something else; remove what bypasses it (Liger kernels, another patch of the trainer; docs/loaders.md "
                "has Unsloth's options), or set head.impl: trl to train without memhead"
            )


class Interruption(TrainerCallback):
    """The first Ctrl-C lets the current step end, saves a checkpoint and stops; the second stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: Any = None

    def __enter__(self) -> Interruption:
        self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nStopping after this step (Ctrl-C again: at once).", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the trainer for a checkpoint and for the end."""
        if self.asked:
            control.should_save = True
            control.should_training_stop = True


class AccuracyEvery(TrainerCallback):
    """Hands `record(step, evaluate())` the accuracy after every so many steps, but for the last one."""

    def __init__(
        self, steps: int, evaluate: Callable[[], dict[str, Any]], record: Callable[[int, dict[str, Any]], Any]
    ) -> None:
        self._steps, self._evaluate, self._record = steps, evaluate, record

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure."""
        if state.global_step % self._steps == 0 and state.global_step < state.max_steps:
            self._record(state.global_step, self._evaluate())
