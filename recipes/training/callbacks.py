"""Callbacks of the trainer: a training step that went past memhead stops the run, Ctrl-C and SIGTERM end it in
order, the accuracy is measured now and then, and what a step's figures mean is said."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from memhead.integrations.handle import Handle
from recipes.processes import anywhere
from recipes.rewards.signs import Signs
from recipes.training.checkpoints import steps_of_generation


class BypassGuard(TrainerCallback):
    """Raises memhead's `HeadBypassed` at the end of an optimizer step that never called the installed head."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation's calls are none of the step's."""
        self._handle.watch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask."""
        self._handle.expect_calls(f"training step {state.global_step}")


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """What comes before the trainer's steps ends by SIGTERM and the like as by Ctrl-C; it would die on the spot."""
    with _handled_by(_ctrl_c(signal.getsignal(signal.SIGINT))):
        yield


def _ctrl_c(handler: Any) -> Callable[[int, FrameType | None], Any]:
    """What that handler of SIGINT does; where it is ignored, what Python does."""
    return handler if callable(handler) else signal.default_int_handler


@contextmanager
def last_words() -> Iterator[None]:
    """SIGTERM and the like change nothing where no handler of the body's own has them: the run is at its end.

    Of several processes one that fails has the launcher send SIGTERM to the others, which may be about to say why.
    """
    with _handled_by(lambda number, frame: None):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in _announcing_the_end()}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def _announcing_the_end() -> list[signal.Signals]:
    """SIGTERM; SIGHUP of a terminal that is closed, which nohup ignores; SIGXCPU of a limit on processor time."""
    known = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP", "SIGXCPU")]
    return [number for number in known if number is not None and signal.getsignal(number) != signal.SIG_IGN]


class Interruption(TrainerCallback):
    """Ctrl-C, SIGTERM or SIGHUP lets the current step end, saves a checkpoint and stops; a Ctrl-C then stops at once.

    Where a generation serves several steps it goes on to the generation's end, where a checkpoint can be written.

    SIGTERM is how schedulers, containers and Colab announce the end. Some send it twice, to the process and to its
    group, so it never means "at once".
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, *_announcing_the_end()):
            self._previous[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked = True
            print("\nStopping after this step (Ctrl-C from now on: at once).", flush=True)
        elif number == signal.SIGINT:
            _ctrl_c(self._previous[signal.SIGINT])(number, frame)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the trainer for a checkpoint and for the end, in all processes if one was asked."""
        self.asked = anywhere(self.asked)
        if self.asked and state.global_step % steps_of_generation(args) == 0:
            control.should_save = True
            control.should_training_stop = True


class AccuracyEvery(TrainerCallback):
    """Hands `record(step, evaluate())` the accuracy after every so many steps, but for the one that is the last."""

    def __init__(
        self, steps: int, evaluate: Callable[[], dict[str, Any]], record: Callable[[int, dict[str, Any]], Any]
    ) -> None:
        self._steps, self._evaluate, self._record = steps, evaluate, record

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, unless training ends here: after the last step, or since someone asked and waits."""
        if state.global_step % self._steps == 0 and not control.should_training_stop:
            self._record(state.global_step, self._evaluate())


class SaySigns(TrainerCallback):
    """Prints, once each, what figures mean that look wrong: a constant reward, equal groups, cut completions."""

    def __init__(self) -> None:
        self._signs = Signs()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Read what was logged."""
        if state.is_world_process_zero:
            for sentence in self._signs.read(state.global_step, logs):
                print(sentence, flush=True)
