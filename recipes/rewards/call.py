"""One call of a reward function, whatever it does: its values, or a sentence about what is wrong with them.

    call(function, completions, columns, seconds)       the batch at once: a list of values, or a Fault
    isolate(function, completions, columns, seconds)    one by one, all within `seconds` again: a value or a Fault each

A reward function is other people's code: it may raise, exit, hang, return anything, or change its arguments. All of
that becomes a Fault. Only Ctrl-C passes through.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.rewards.time_limit import TimeLimitReached, time_limit

Reward = Callable[..., Any]
Values = list[float | None]
# Beside a greater reward float32 would not tell smaller ones apart, and at 1e19 its squares are infinite.
MAX_REWARD = 1e9
_REMEDY = "return a list with one finite number, or None, per completion"


@dataclass(frozen=True)
class Fault:
    """What is wrong, to be read after the function's name; `index`: the place of the completion, if known."""

    what: str
    index: int | None = None


def is_async(function: Reward) -> bool:
    """Whether a call has to be awaited: a coroutine function, a partial of one, or an object with such a `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def call(
    function: Reward, completions: Sequence[Any], columns: Mapping[str, Any], seconds: float
) -> Values | Fault:
    """The function's values for a batch. `columns`: the arguments beside `completions`, lists as long as it."""
    try:
        with time_limit(seconds):
            return _values(function(completions=list(completions), **_copied(columns)), len(completions))
    except TimeLimitReached:
        return _late(seconds)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit raises one that is not an Exception
        return Fault(said(error))


async def call_async(
    function: Reward, completions: Sequence[Any], columns: Mapping[str, Any], seconds: float
) -> Values | Fault:
    """The same for a coroutine function; the limit holds where it awaits."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            # In a task of its own: the function may cancel that.
            return await asyncio.ensure_future(_awaited(function, completions, columns))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise  # Ctrl-C
        # The function may raise a TimeoutError of its own.
        return _late(seconds) if limit.expired() else Fault(said(error))


async def _awaited(
    function: Reward, completions: Sequence[Any], columns: Mapping[str, Any]
) -> Values | Fault:
    """The values; a call of sys.exit is caught here, since out of a task it ends the event loop, and so the run."""
    try:
        return _values(await function(completions=list(completions), **_copied(columns)), len(completions))
    except SystemExit as error:
        return Fault(said(error))


def isolate(
    function: Reward, completions: Sequence[Any], columns: Mapping[str, Any], seconds: float
) -> list[float | Fault | None]:
    """Each completion alone, for an equal share of `seconds`: one that hangs costs the others nothing."""
    share = seconds / len(completions)
    alone = (call(function, *one, share) for one in _singles(completions, columns))
    return [_alone(found, seconds) for found in alone]


async def isolate_async(
    function: Reward, completions: Sequence[Any], columns: Mapping[str, Any], seconds: float
) -> list[float | Fault | None]:
    """The same for a coroutine function, of which all calls wait at the same time: each has the whole of `seconds`."""
    alone = (call_async(function, *one, seconds) for one in _singles(completions, columns))
    return [_alone(found, seconds) for found in await asyncio.gather(*alone)]


class Extras:
    """TRL's log_extra: what a function logs, a value for each of `count` completions, until all its calls are over.

    A call that fails and is repeated would give TRL more values than completions, each beside another one.
    """

    def __init__(self, count: int, names: Iterable[str] = ()) -> None:
        self._count = count
        self._kept: dict[str, list[Any]] = {name: [None] * count for name in names}

    def __call__(self, name: str, values: Any) -> None:
        """Keeps a column of the batch. Raises ValueError for another number of values."""
        given = list(values)
        if len(given) != self._count:
            raise ValueError(
                f"log_extra({show(name, 60)}, …) takes {self._count} values, one for each completion, not {len(given)}"
            )
        self._kept[str(name)] = given

    def at(self, index: int) -> Callable[[str, Any], None]:
        """The same for a call with one completion."""

        def log(name: str, values: Any) -> None:
            one = Extras(1)
            one(name, values)
            self._kept.setdefault(str(name), [None] * self._count)[index] = one._kept[str(name)][0]

        return log

    def pass_on(self, log: Callable[[str, list[Any]], None]) -> list[str]:
        """Gives TRL every column; returns their names, of which a later batch needs each again, if only as None."""
        for name, values in self._kept.items():
            log(name, values)
        return list(self._kept)


def row_at(columns: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
    """The row of one of `count` completions, from the columns that a reward is called with."""
    return {
        name: values[index]
        for name, values in columns.items()
        if isinstance(values, list) and len(values) == count
    }


def _singles(
    completions: Sequence[Any], columns: Mapping[str, Any]
) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    for index, completion in enumerate(completions):
        row = row_at(columns, index, len(completions))
        one = {**columns, **{name: [value] for name, value in row.items()}}
        if isinstance(extras := columns.get("log_extra"), Extras):
            one["log_extra"] = extras.at(index)
        yield [completion], one


def _alone(found: Values | Fault, seconds: float) -> float | Fault | None:
    if isinstance(found, list):
        return found[0]
    return _late(seconds) if found.what.startswith(_LATE) else found


def _copied(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the lists, so that a function that empties them takes nothing from the next."""
    copies: dict[str, Any] = {
        key: list(value) if isinstance(value, list) else value for key, value in columns.items()
    }
    if "log_metric" in copies:
        copies["log_metric"] = functools.partial(_log_number, copies["log_metric"])
    return copies


def _log_number(log: Callable[[str, float], None], name: str, value: Any) -> None:
    """TRL's log_metric. What is no number fails here, in the function that gave it, not where TRL takes the mean."""
    try:
        number = float(value)
    except Exception as error:  # __float__ may be anyone's code
        raise TypeError(f"log_metric({show(name, 60)}, …) takes a number, not {show(value, 100)}") from error
    log(str(name), number)


_LATE = "did not return within"


def _late(seconds: float) -> Fault:
    return Fault(f"{_LATE} {seconds:g} s (task.reward_seconds)")


def _values(given: Any, wanted: int) -> Values | Fault:
    if inspect.iscoroutine(given):
        given.close()
        return Fault("returned a coroutine; declare the function itself with async def")
    # These could be iterated, and would be misread.
    if isinstance(given, (str, bytes, bytearray, memoryview, Mapping, set, frozenset)):
        return Fault(f"returned {show(given)}; {_REMEDY}")
    try:
        iterator = iter(given)
    except TypeError:
        return Fault(f"returned {show(given)}; {_REMEDY}")
    found = list(itertools.islice(iterator, wanted + 1))  # a generator may have no end
    if len(found) != wanted:
        endless = len(found) > wanted and not hasattr(given, "__len__")
        count = (
            f"more than {wanted}" if endless else str(len(given) if hasattr(given, "__len__") else len(found))
        )
        return Fault(f"returned {count} values for {wanted} completion(s); return one for each")
    values: Values = []
    for index, value in enumerate(found):
        number = _number(value)
        if isinstance(number, str):
            return Fault(f"returned {number}; {_REMEDY}", index)
        values.append(number)
    return values


def _number(value: Any) -> float | str | None:
    """The value as a float, or how to show it if it cannot be a reward."""
    if value is None:
        return None
    if isinstance(value, (str, bytes)):
        return f"the text {show(value)}"
    if isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real):
        return show(value)  # numpy's would lose its imaginary part
    try:
        number = float(value)
    except Exception:  # __float__ may be anyone's code
        return show(value)
    if not math.isfinite(number):
        return f"{number}"
    if abs(number) > MAX_REWARD:
        return f"{number:g}, beside which float32 leaves no other reward a gradient (at most {MAX_REWARD:g})"
    return number


def said(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, SystemExit):
        return f"called sys.exit({show(error.code, 60)})"
    try:
        text = str(error)
    except (Exception, SystemExit):  # so may __str__
        text = ""
    return f"raised {type(error).__name__}: {one_line(text)}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 400
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


def show(value: Any, limit: int = 300) -> str:
    """A value in one line of at most `limit` characters, whatever its `__repr__` does."""
    try:
        text = repr(value[: limit + 1]) if isinstance(value, (str, bytes)) else _SHORT.repr(value)
    except Exception:  # 10**5000 has too many digits to be shown
        text = f"<{type(value).__name__}>"
    return one_line(text, limit)


def one_line(text: str, limit: int = 300) -> str:
    """Text for a terminal: one line, shortened, without control characters."""
    line = "".join(
        character if character.isprintable() else " " if character.isspace() else repr(character)[1:-1]
        for character in text[: limit + 1]
    )
    line = " ".join(line.split())
    return line if len(line) <= limit and len(text) <= limit else line[: limit - 1] + "…"
