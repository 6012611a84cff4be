"""A time limit on other people's code, in this thread.

A separate thread could not be stopped, and functions such as math-verify's set alarms, which only the main thread may
do. So two clocks run: a timer sends the main thread a signal, which also ends a sleep or a read and leaves SIGALRM to
the code itself; and the kernel's alarm, since a call that never releases the interpreter, such as an endless regular
expression, keeps the timer waiting. Code that sets its own alarm replaces that one.

    with time_limit(3.0):
        verdict = judge(text)

One call inside C that never looks for signals cannot be ended this way.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNAL = getattr(signal, "SIGUSR1", None)  # Windows has no such signal, and so no limit
_AGAIN = 1.0  # seconds until code that caught the first signal and went on gets another


class TimeLimitReached(BaseException):
    """The time is up. Not an Exception, so that the code's own `except Exception` does not swallow it."""


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

    started = time.monotonic()
    previous = {number: signal.signal(number, reached) for number in (_SIGNAL, signal.SIGALRM)}
    # The second clock runs a little longer: what ends at the first needs no second signal.
    outer = signal.setitimer(signal.ITIMER_REAL, seconds + 0.05, _AGAIN)
    timer = threading.Timer(seconds, signal.pthread_kill, (main.ident, _SIGNAL))
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            ended = True
    finally:
        ended = True  # a signal that is still on its way must not hit the code after this
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        timer.cancel()
        timer.join()
        for number, handler in previous.items():
            signal.signal(number, handler)
        if outer[0]:  # an alarm that was set before goes on
            left = outer[0] - (time.monotonic() - started)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), outer[1])
