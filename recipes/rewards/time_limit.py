"""A time limit on other people's code, in this thread.

A separate thread could not be stopped, and functions such as math-verify's set alarms, which only the main thread may
do. So two clocks run: a timer sends the main thread a signal, which also ends a sleep or a read and leaves SIGALRM to
the code itself; and the kernel's alarm, since a call that never releases the interpreter, such as an endless regular
expression, keeps the timer waiting. Code that sets its own alarm replaces that one.

    with time_limit(3.0):
        verdict = judge(text)

Code that swallows the exception again and again, as a loop of retries with a bare `except` does, is interrupted at its
next line, which is that of its handler, outside of its `try`. What catches that too, in a loop around its loop, and a
call inside C that never looks for signals, cannot be ended this way: recipes.rewards.stuck.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNAL = getattr(signal, "SIGUSR1", None)  # Windows has no such signal, and so no limit
_LATER = 0.2  # of the second clock
_AGAIN = 0.3  # seconds until code that caught the first signal and went on gets another


class TimeLimitReached(BaseException):
    """The time is up. Not an Exception, so that the code's own `except Exception` does not swallow it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitReached in the body after `seconds`. Outside the main thread there is no limit."""
    main = threading.main_thread()
    if _SIGNAL is None or threading.current_thread() is not main or main.ident is None:
        yield
        return
    ended, told = False, 0
    tracing = sys.gettrace()

    def reached(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if ended:
            return
        told += 1
        if told > 2:
            _interrupt_at_next_line(frame)
        raise TimeLimitReached

    started = time.monotonic()
    previous = {number: signal.signal(number, reached) for number in (_SIGNAL, signal.SIGALRM)}
    # What ends at the first clock needs no second signal.
    outer = signal.setitimer(signal.ITIMER_REAL, seconds + _LATER, _AGAIN)
    timer = threading.Timer(seconds, signal.pthread_kill, (main.ident, _SIGNAL))
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # no memory for its stack: the alarm is left, a little later
        timer.start()
    try:
        try:
            yield
        finally:
            ended = True
    finally:
        ended = True  # a signal that is still on its way must not hit the code after this
        sys.settrace(tracing)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        timer.cancel()
        if timer.ident is not None:
            timer.join()
        for number, handler in previous.items():
            signal.signal(number, handler)
        if outer[0]:  # an alarm that was set before goes on
            left = outer[0] - (time.monotonic() - started)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), outer[1])


def _interrupt_at_next_line(frame: FrameType | None) -> None:
    """Raise TimeLimitReached in `frame`, or what called it up to the limit, wherever the next line runs."""

    def at_line(inner: FrameType, event: str, argument: Any) -> Any:
        if event == "line":  # the arrival of the exception at the `try` is an event too
            raise TimeLimitReached
        return at_line

    while frame is not None and frame.f_code.co_filename not in (__file__, contextlib.__file__):
        frame.f_trace = at_line
        frame = frame.f_back
    sys.settrace(at_line)
