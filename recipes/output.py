"""Output that costs no run: `| head`, a terminal that is closed, a locale without this character.

    with lasting_output():
        print("46 → 63 %")

All that is printed is also in the run folder, so a run goes on without it. What libraries log, and the traceback of a
fault of our own, may quote a model's files: they control no terminal either.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from recipes.problems import visible

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # transformers writes some where there is no terminal, too


class _Lasting:
    """A stream whose writes do not fail: once nobody reads it any more, they go nowhere."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._busy = False
        self._late: list[str] = []  # what a signal's handler prints in the middle of a write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Of all that was written, as a stream says it."""
        if self._busy:
            self._late.append(text)
        else:
            with self._in_any_case():
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """What is left in the buffer goes the same way."""
        if self._busy:
            return
        with self._in_any_case():
            self._stream.flush()
        if self._late:
            late, self._late = "".join(self._late), []
            self.write(late)
            self.flush()

    @contextmanager
    def _in_any_case(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        except (OSError, ValueError):  # a closed pipe or terminal, or a stream that was closed
            with suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())  # for whoever writes past this, too
                os.close(nowhere)
        finally:
            self._busy = False


@contextmanager
def lasting_output() -> Iterator[None]:
    """Standard output and error do not fail in the body, and the first files it opens are not taken for them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed before the start: the next file that is opened would get its number
            os.open(os.devnull, os.O_RDWR)
    before, made = (sys.stdout, sys.stderr), logging.getLogRecordFactory()
    logging.setLogRecordFactory(_record)
    sys.excepthook = _traceback  # stays: Python prints the traceback after the body
    for stream in filter(None, before):
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = (_Lasting(stream) if stream else stream for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = before
        logging.setLogRecordFactory(made)


def _record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """A line of a library's log, escaped."""
    record = logging.LogRecord(*args, **kwargs)
    with suppress(Exception):  # as logging itself does with arguments that do not fit
        record.msg, record.args = visible(_COLOUR.sub("", record.getMessage())), ()
    return record


def _traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(visible("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
