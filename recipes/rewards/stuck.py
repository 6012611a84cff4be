"""The last resort against code that nothing inside the process ends: the run ends, and says why.

    with watched("reward my_rewards.brevity", seconds=20.0, keep=save):
        values = brevity(completions)

A time limit raises in the code, and code may catch everything, in loops within loops; an `async def` that never awaits
keeps the loop from which it would be cancelled; a call inside C may wait for ever without looking for signals. A thread
beside them needs the interpreter for a moment only, which all of these give it. A call inside C that keeps the
interpreter itself is out of its reach, and left to a process beside: recipes.rewards.outside.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from recipes.rewards.outside import seen_from_outside

PATIENCE = 60.0  # seconds past every limit: what is merely slow to come to an end is waited for
_WAITS = 6  # in which they are spent: time in which this thread was held up counts as one of them at most
_SAVING = 1800.0  # seconds for what `keep` does; the code may hold a lock that it needs


def nothing_to_keep() -> str:
    """For code that is called where no state is worth saving."""
    return ""


@contextmanager
def watched(whose: str, seconds: float, keep: Callable[[], str] = nothing_to_keep) -> Iterator[None]:
    """End the process with status 1 if the body has not come back PATIENCE after `seconds`.

    keep: saves what can be saved, in a thread of its own, and returns a sentence about it.
    """
    back = threading.Event()
    with seen_from_outside(whose, seconds + 2 * PATIENCE) as relieve:  # later than the thread, which can save

        def late() -> None:
            relieve()
            _end(whose, seconds, keep)

        with suppress(RuntimeError):  # no memory for its stack: the process beside is left, a little later
            threading.Thread(target=_watch, args=(back, seconds, late), daemon=True).start()
        try:
            yield
        finally:
            back.set()


def _watch(back: threading.Event, seconds: float, late: Callable[[], None]) -> None:
    if not (back.wait(seconds) or any(back.wait(PATIENCE / _WAITS) for _ in range(_WAITS))):
        late()


def _end(whose: str, seconds: float, keep: Callable[[], str]) -> None:
    _say(
        f"error: {whose} has not come back after {seconds + PATIENCE:g} s, and no exception ends it: the run ends. "
        "`except:` and `except BaseException:` catch its time limit, `except Exception:` lets it pass; "
        "an `async def` must await what takes long"
    )
    faulthandler.dump_traceback_later(_SAVING, exit=True)
    try:
        _say(keep())
    except Exception as error:  # whatever it is, the run ends
        _say(f"Nothing could be saved: {type(error).__name__}: {error}")
    sys.stdout.flush()
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(1)


def _say(text: str) -> None:
    """Past sys.stderr, whose lock the code may hold."""
    os.write(2, f"{text}\n".encode() if text else b"")
