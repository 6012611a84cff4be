"""What every integration's ``install`` returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from memhead.logprobs import LinearLogprobs
from memhead.ragged_support import Support, Truncation


@dataclass
class Truncated:
    """Calls of the head over the supports of a sampler that truncates.

    Attributes:
        truncation: what it cuts off.
        support: of all rows that will come, in their order; ``None`` where the rows are of the policy that sampled, and
            their supports are to be found.
        found: those, call by call.
    """

    truncation: Truncation
    support: Support | None = None
    found: list[Support] = field(default_factory=list)
    _taken: int = 0

    def score(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool, **head: Any
    ) -> LinearLogprobs:
        """The next rows: hidden (N, H), weight (V, H), targets (N,)."""
        if self.support is None:
            part = Support.find(hidden, weight, targets, self.truncation, **head)
            self.found.append(part)
        else:
            part = self.support.rows(slice(self._taken, self._taken + len(hidden)))
            self._taken += len(hidden)
        return part.logprobs(hidden, weight, targets, entropy=entropy, **head)


class HeadBypassed(RuntimeError):
    """Something was trained and the installed head never called."""


class Handle:
    """An installed head: how often it was called, and the way back.

    A bypass is silent: training goes on, with other memory and perhaps other numbers. So check after
    every step; a trainer's callback does it in two lines:

        def on_step_begin(self, args, state, control, **_): self.handle.watch()
        def on_step_end(self, args, state, control, **_): self.handle.expect_calls(f"step {state.global_step}")

    Attributes:
        impl: what computes.
        place: what it was put into, in words.
        chunk: the tile that it was told to take (TRL alone); ``None`` for memhead's own choice.
        calls: calls so far.
        rows: tokens scored so far.
        listener: while it is set, it is called with what each call of TRL's head was given.
        truncated: while it is set, log-probabilities are those of a truncating sampler (TRL alone).
    """

    def __init__(self, impl: str, restore: Callable[[], None], place: str = "") -> None:
        self.impl, self.place = impl, place
        self.chunk: int | tuple[int, int] | None = None
        self.calls = 0
        self.rows = 0
        self.listener: Callable[..., None] | None = None
        self.truncated: Truncated | None = None
        self._calls_seen = 0
        self._restore: Callable[[], None] | None = restore

    def __repr__(self) -> str:
        """What it did: where it is, how often it was called, and how to undo it."""
        done = f"{self.calls:,} calls, {self.rows:,} tokens so far"
        if self._restore is None:
            return f"<head {self.impl!r}: uninstalled, after {done}>"
        into = f" in {self.place}" if self.place else ""
        return f"<head {self.impl!r}{into}: {done}; uninstall() puts back what was there>"

    def count(self, rows: int) -> None:
        """Note one call that scored ``rows`` tokens."""
        self.calls += 1
        self.rows += rows

    def watch(self) -> None:
        """Count calls from here on; needed where calls are also made outside the steps that are checked."""
        self._calls_seen = self.calls

    def expect_calls(self, what: str) -> None:
        """Check that ``what`` ("training step 3") called the head, and count from here on.

        Raises:
            HeadBypassed: no call arrived since :meth:`watch`, or since the last check.
        """
        if self.calls == self._calls_seen:
            raise HeadBypassed(
                f"{what} never reached memhead: something else computed its log-probabilities; remove what "
                "bypasses the head (Liger kernels, another patch of the trainer), or uninstall memhead to do without"
            )
        self.watch()

    def uninstall(self) -> None:
        """Put back what was there before; a second call does nothing."""
        if self._restore is not None:
            self._restore()
            self._restore = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.uninstall()
