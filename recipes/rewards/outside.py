"""A small process beside the run, for code that keeps the interpreter to itself: it ends the run, and says why.

    with seen_from_outside("reward my_rewards.brevity", seconds=140.0) as back:
        values = brevity(completions)

A regular expression matched in a thread or in an `async def`, or `sum` over what has no end, lets no other line of
Python run in the whole process: neither a signal's handler nor a thread. Only another process is left to notice. It is
told when a call begins and when it is back; one that is late is ended, and faulthandler prints where it was. Where a
call ends the run itself, by os._exit or a crash in C, this process is the one that is left to say so.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TICK = 0.25  # seconds; time in which the process beside was held up itself counts as one of them
_END = getattr(signal, "SIGUSR2", signal.SIGTERM)  # faulthandler's on its way to the default, which ends
_GONE = (
    "error: the run has ended inside of {}: by os._exit, by a crash of code in C, or because it was killed. --resume "
    "goes on from its last checkpoint, if it has one (run.save_every).\n"
)


class _Outside:
    """The process: started at the first call, and again if it dies. The end of its pipe ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def begin(self, whose: str, seconds: float) -> int:
        """Have the run ended in so many seconds, unless `end` comes first with the number that is returned."""
        number = next(self._numbers)
        self._tell({"number": number, "seconds": seconds, "whose": whose})
        return number

    def end(self, number: int) -> None:
        """The call of that number has come back. To say so twice does no harm."""
        self._tell({"number": number})

    def _tell(self, message: dict[str, Any]) -> None:
        with self._lock, suppress(OSError):  # if it has just died, the next call has another
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        if hasattr(faulthandler, "register"):  # not on Windows
            faulthandler.register(_END, file=2, chain=True)
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd=Path(__file__).resolve().parents[2],
            start_new_session=True,  # a terminal's Ctrl-C is not for it
        )


_outside = _Outside()


@contextmanager
def seen_from_outside(whose: str, seconds: float) -> Iterator[Callable[[], None]]:
    """End this process unless the body comes back within `seconds`, or calls the function that it is given."""
    number = _outside.begin(whose, seconds)
    try:
        yield lambda: _outside.end(number)
    finally:
        _outside.end(number)


@dataclass
class _Call:
    """One that has begun: the seconds that it has, and those that are left."""

    whose: str
    seconds: float
    left: float


def watch(run: psutil.Process | None) -> None:
    """Read from standard input what begins and ends, until it closes; end `run` when a call is late.

    None: it has ended before this process was there, and what it wrote until then is still to be read.
    """
    begun: dict[int, _Call] = {}
    unread = b""
    while True:
        ready, _, _ = select.select([0], [], [], TICK if begun else None)
        if ready:
            if not (part := os.read(0, 65536)):
                _say("".join(_GONE.format(call.whose) for call in begun.values()))
                return
            *lines, unread = (unread + part).split(b"\n")
            for message in map(json.loads, lines):
                _note(begun, **message)
        elif run is not None and run.status() != psutil.STATUS_STOPPED:  # one that is suspended is not late
            for call in begun.values():
                call.left -= TICK
                if call.left <= 0:
                    _end(run, call)
                    return


def _note(begun: dict[int, _Call], number: int, whose: str = "", seconds: float = 0.0) -> None:
    if whose:
        begun[number] = _Call(whose, seconds, seconds)
    else:
        begun.pop(number, None)


def _end(run: psutil.Process, call: _Call) -> None:
    text = (
        f"error: {call.whose} has not come back after {call.seconds:g} s, from code that keeps Python's interpreter "
        "to itself, so nothing could be saved: the run ends. --resume goes on from its last checkpoint, if it has "
        "one (run.save_every). This is where it was:\n"
    )
    _say(text)
    run.send_signal(_END)
    time.sleep(1.0)  # to print it
    run.kill()


def _say(text: str) -> None:
    with suppress(OSError):  # nobody may be reading
        os.write(2, text.encode())


if __name__ == "__main__":
    run = None
    with suppress(psutil.NoSuchProcess):  # it has ended by itself
        run = psutil.Process(int(sys.argv[1]))
    with suppress(psutil.NoSuchProcess):
        watch(run)
