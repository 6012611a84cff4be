"""Ctrl-C, once: for every command line, from before what it needs is imported until its last sentence.

@stopped_in_a_line
def main(arguments): …
"""

from __future__ import annotations

import functools
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TypeVar

from recipes.processes import complain, count, leave_the_others

STOPPED = 130  # the exit status
_IN_ORDER = 2.0  # seconds after Ctrl-C in which one more does not cut short what is being said and closed
_Arguments = TypeVar("_Arguments")


@contextmanager
def ctrl_c_once() -> Iterator[None]:
    """One Ctrl-C raises KeyboardInterrupt; another within moments does nothing: it would cut short the last sentence.

    Or come while Python lets go of an object, which ends in a traceback of somebody else's. Outside the main thread,
    where no signal is handled, it changes nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    last = -math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() > last + _IN_ORDER:
            last = time.monotonic()
            raise KeyboardInterrupt

    # A shell has it ignored for a job in the background.
    takes = before != signal.SIG_IGN and threading.current_thread() is threading.main_thread()
    if takes:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if takes:
            signal.signal(signal.SIGINT, before)


def stopped_in_a_line(main: Callable[[_Arguments], int]) -> Callable[[_Arguments], int]:
    """The command line with a line and its status for a Ctrl-C that it says nothing of itself."""

    @functools.wraps(main)
    def stoppable(arguments: _Arguments) -> int:
        with ctrl_c_once():
            try:
                return main(arguments)
            except KeyboardInterrupt:
                complain("\nStopped; the same command begins again.")
                return STOPPED
            except Exception:
                if count() == 1:
                    raise
                sys.excepthook(*sys.exc_info())  # as Python would, and then take the group apart
                return 1

    return stoppable


def leave(status: int) -> NoReturn:
    """Ends the process. Everything is said and written: one more Ctrl-C ends nothing sooner."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Python marks a Ctrl-C that passed through an exec, as of a dataclass; under -m it then ends by that signal,
    # whatever became of it. The next exec takes the mark away.
    exec("")
    leave_the_others(status)
    sys.exit(status)
