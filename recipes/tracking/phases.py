"""Time and memory of a trainer's phases, by wrapping the methods of the one trainer object.

Nothing is subclassed, since Unsloth writes its own trainer class, with the same methods. A phase is

    generation   sampling the completions
    rewards      the reward functions
    scoring      log-probabilities without gradient: old policy and reference
    forward      forward pass and loss
    backward     gradients
    optimizer    the optimizer's step

and `other` is the rest of the step. On CUDA the device is synchronised at both ends of a phase, so that no phase
counts another's time.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from recipes.tracking.meters import Meter, persistent_tensors

Counter = Callable[[str], Callable[..., None] | None]
PHASES = ("generation", "rewards", "scoring", "forward", "backward", "optimizer", "other")
PLANNED = {  # phase -> the plan's name of the phase in whose height it counts
    "generation": "generation",
    "scoring": "scoring without gradient",
    "forward": "forward, loss and backward",
    "backward": "forward, loss and backward",
    "optimizer": "optimizer",
}
_METHODS = {  # method of the trainer -> its phase
    "_generate": "generation",
    "_calculate_rewards": "rewards",
    "_get_per_token_logps_and_entropies": "scoring",
    "compute_loss": "forward",
}
_ALSO_OF_THE_LOSS = "_get_per_token_logps_and_entropies"
_METHODS_OF_PACKED = {  # of recipes.training.packed_step, which TRL's step lacks
    "_score_before_updates": "scoring",
    "_score_reference": "scoring",
}


@contextmanager
def in_phase(name: str) -> Iterator[None]:
    """What fails inside remembers the phase, as `phase_of` tells it; of phases within phases the inner one."""
    try:
        yield
    except BaseException as error:
        if not hasattr(error, "phase"):
            error.phase = name  # type: ignore[attr-defined]
        raise


def phase_of(error: BaseException) -> str | None:
    """The phase in which it was raised, None outside of every one."""
    return getattr(error, "phase", None)


class PhaseClock:
    """Seconds (summed) and MiB (maximum) by phase since the last `take`."""

    def __init__(self, device: torch.device, meter: Meter | None) -> None:
        self._device = device
        self._meter = meter
        self._seconds: dict[str, float] = defaultdict(float)
        self._peaks: dict[str, dict[str, float]] = defaultdict(dict)
        self._inside = False
        self._steps = 0
        self._step_began: float | None = None

    def begin_step(self, step: int, model: torch.nn.Module, optimizer: Any) -> None:
        """An optimizer step begins; `step` counts from 0."""
        if self._meter is not None:
            self._meter.begin_step(step, persistent_tensors(model, optimizer))
        self._step_began = time.perf_counter()

    def end_step(self) -> None:
        """The step is over: its time outside every phase is `other`."""
        if self._step_began is None:
            return
        self._seconds["step"] += time.perf_counter() - self._step_began
        self._steps += 1
        self._step_began = None

    @contextmanager
    def phase(self, name: str) -> Iterator[bool]:
        """Measures what runs inside; False where it does not. A phase within a phase belongs to the outer one."""
        if self._inside or self._step_began is None:
            yield False
            return
        with in_phase(name):
            yield from self._measured(name)

    def _measured(self, name: str) -> Iterator[bool]:
        self._inside = True
        figures: dict[str, float] = {}
        self._synchronize()
        began = time.perf_counter()
        try:
            if self._meter is None:
                yield True
            else:
                with self._meter.measure(figures):
                    yield True
            self._synchronize()
        finally:
            self._inside = False
            for figure, value in figures.items():
                peaks = self._peaks[name]
                peaks[figure] = max(peaks.get(figure, 0.0), value)
        self._seconds[name] += time.perf_counter() - began

    def peaks(self) -> dict[str, dict[str, float]]:
        """MiB by phase and figure since the last `take`, of a phase that ran out of memory too."""
        return {phase: dict(figures) for phase, figures in self._peaks.items()}

    def take(self) -> tuple[dict[str, float], dict[str, dict[str, float]], int]:
        """Seconds by phase, MiB by phase and figure, and the number of steps they cover; then starts again."""
        seconds, peaks, steps = dict(self._seconds), self.peaks(), self._steps
        if "step" in seconds:
            seconds["other"] = max(0.0, seconds.pop("step") - sum(seconds.values()))
        self._seconds.clear()
        self._peaks.clear()
        self._steps = 0
        return seconds, peaks, steps

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def attach(trainer: Any, clock: PhaseClock, counter: Counter = lambda _: None) -> None:
    """Wraps the trainer's methods so that each phase runs on the clock; the optimizer is `attach_optimizer`'s.

    counter: gives what is called after a phase's method, with its result and its arguments.
    Raises AttributeError, naming the method, for a trainer that lacks one of them.
    """
    for method, name in _METHODS.items():
        original = getattr(trainer, method, None)
        if original is None:
            raise AttributeError(
                f"{type(trainer).__name__} has no method {method!r}, so the phase {name!r} is unknown; "
                "install the versions of requirements.lock"
            )
        setattr(trainer, method, _timed(original, clock, name, counter(name)))
    for method, name in _METHODS_OF_PACKED.items():
        if hasattr(trainer, method):
            setattr(trainer, method, _timed(getattr(trainer, method), clock, name, counter(name)))
    trainer.accelerator.backward = _timed(trainer.accelerator.backward, clock, "backward")


def attach_optimizer(optimizer: Any, clock: PhaseClock) -> None:
    """Wraps `optimizer.step`, once the trainer has made its optimizer."""
    if not getattr(optimizer.step, "on_a_clock", False):
        optimizer.step = _timed(optimizer.step, clock, "optimizer")


def _timed(
    original: Callable, clock: PhaseClock, name: str, count: Callable[..., None] | None = None
) -> Callable:
    """`original`, measured as the phase `name`. Of a method that the loss calls too, only calls without gradient."""
    shared = getattr(original, "__name__", "") == _ALSO_OF_THE_LOSS

    @functools.wraps(original)  # with its attributes: the scheduler looks for one on optimizer.step
    def timed(*args: Any, **kwargs: Any) -> Any:
        if shared and torch.is_grad_enabled():
            return original(*args, **kwargs)
        with clock.phase(name) as measured:
            result = original(*args, **kwargs)
        if measured and count is not None:
            count(result, *args, **kwargs)
        return result

    timed.on_a_clock = True  # type: ignore[attr-defined]
    return timed
