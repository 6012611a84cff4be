"""A time limit on other people's code, in this thread.

A thread of its own could not be stopped, and functions such as math-verify's set alarms, which only the main
thread may do. So a timer sends the main thread a signal, which also ends a sleep or a read; SIGALRM stays free
for the code itself. One call inside C that never returns to Python (an enormous power) cannot be ended this way.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNAL = getattr(signal, "SIGUSR1", None)  # Windows has none, and no limit


class TimeLimitReached(BaseException):
    """The time is up. No Exception, so that the code's own `except Exception` does not swallow it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitReached in the body after `seconds`. Outside the main thread there is no limit."""
    main = threading.main_thread()
    if _SIGNAL is None or threading.current_thread() is not main or main.ident is None:
        yield
        return
    ended = False

    def reached(number: int, frame: FrameType | None) -> None:
        if not ended:
            raise TimeLimitReached

    previous = signal.signal(_SIGNAL, reached)
    timer = threading.Timer(seconds, signal.pthread_kill, (main.ident, _SIGNAL))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        ended = True  # a signal on its way must not hit what comes after
        timer.cancel()
        timer.join()
        signal.signal(_SIGNAL, previous)
