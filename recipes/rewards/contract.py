"""The contract of a reward function: how it is named and weighed, checked before training, and guarded in it.

    functions = choose({"correct": 1.0, "my_rewards.brevity": 0.1}, task.rewards)   by name
    check(functions, rows, completions, seconds)                                    the contract, before training
    guard(functions, options)                                                       what the trainer gets

The weights stand in the YAML under `task.rewards` (name: weight). A name with a dot is a function of the user's own:
`my_rewards.brevity` is `brevity` in my_rewards.py.

The contract is TRL's: `function(completions, **columns)` returns one finite number, or None, per completion.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from recipes.problems import ConfigError, Problem, one_of
from recipes.processes import count
from recipes.rewards.call import (
    MAX_REWARD,
    Extras,
    Fault,
    Reward,
    Values,
    call,
    call_async,
    is_async,
    isolate,
    isolate_async,
    said,
    show,
)
from recipes.rewards.stuck import nothing_to_keep, watched

MAX_SECONDS = 1e6  # eleven days; the system's clocks overflow far above
FIRST_VERDICT = 64  # a share of failures is taken of at least this many completions


class RewardError(ValueError):
    """A reward function breaks the contract; the message names it and shows the completion."""


def _no_section(weight: Any) -> Any:
    """Refuse what `task.rewards.my_rewards.brevity=0.1` on the command line means: a section in a section."""
    if isinstance(weight, dict):
        raise ValueError("is a section; write a name with a dot as task.rewards={my_rewards.brevity: 0.1}")
    return weight


Weights = dict[str, Annotated[float, BeforeValidator(_no_section)]]  # of rewards by name


class ColumnNames(BaseModel):
    """What a task's columns are called in the data: `task.columns`. A field for each, whose default is its own name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RewardOptions(BaseModel):
    """The keys of a task that weigh its rewards and limit them. A task's Options derive from it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    rewards: Weights | None = Field(
        None,
        description="weight of each reward by name, 0: only logged, null: not this one of the base's; "
        "`module.function`: one of your own; null in place of the mapping: all, by the task's own weights",
    )
    reward_seconds: float = Field(
        10.0,
        gt=0,
        le=MAX_SECONDS,
        description="time limit of one call of a reward function, and once more for its completions one by one",
    )
    reward_failures: float = Field(
        0.05, ge=0, le=1, description="share of completions a reward may fail on before the run stops"
    )

    @field_validator("rewards", mode="before")
    @classmethod
    def _those_left(cls, weights: Any) -> Any:
        """Without those that null takes away: mappings are merged, so what is left out above stays."""
        if not isinstance(weights, dict):
            return weights
        return {name: weight for name, weight in weights.items() if weight is not None}


def problems(weights: Mapping[str, float], known: Mapping[str, Reward]) -> Iterator[Problem]:
    """What is wrong with a run's weights, as far as can be seen without importing the user's own functions.

    known: the task's rewards.
    """
    if not any(weights.values()):
        remedy = "give one a weight other than 0"
        remedy += ", or set it to null for the task's own weights" if known else ""
        yield Problem("task.rewards", "weighs nothing", dict(weights), remedy)
    for name, weight in weights.items():
        if abs(weight) > MAX_REWARD:
            message = "is so large that float32 leaves no other reward a gradient"
            yield Problem(f"task.rewards.{name}", message, weight, f"give at most {MAX_REWARD:g}")
        if name not in known and "." not in name:
            remedy = f"use {one_of(known)}, or module.function" if known else "name it as module.function"
            yield Problem(f"task.rewards.{name}", "is no reward of this task", weight, remedy)


def choose(weights: Mapping[str, float], known: Mapping[str, Reward]) -> dict[str, Reward]:
    """The functions that have a weight, in that order: the task's, or the user's own.

    The weights have passed `problems`. Raises ConfigError for a function that cannot be imported.
    """
    return {name: known[name] if name in known else _import(name) for name in weights}


def _import(name: str) -> Reward:
    """The user's function `module.function`, from the working directory or an installed package."""
    module, _, function = name.rpartition(".")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with as_it_was():
            found = getattr(importlib.import_module(module), function)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may do anything while it is imported, even exit
        missing = isinstance(error, AttributeError) or getattr(error, "name", None) in _packages(module)
        remedy = (
            f"put a function {function} into {module.replace('.', '/')}.py beside where you start the run"
        )
        if not missing:
            remedy = f"mend {module}, which is there: python -c 'import {module}' shows where it fails"
        message = f"cannot be imported (it {said(error)})"
        raise ConfigError([Problem("task.rewards", message, name, remedy)]) from error
    if isinstance(found, type):
        remedy = (
            f"make one there, such as judge = {function}(…) with a method __call__, and name {module}.judge"
        )
        raise ConfigError([Problem("task.rewards", "is a class, no function", name, remedy)])
    if not callable(found):
        raise ConfigError([Problem("task.rewards", f"{name} is no function", found, "name a function")])
    return found


@contextmanager
def as_it_was() -> Iterator[None]:
    """Undo what other people's code sets for all of the process: the folder it is in, gradients turned off."""
    torch: Any = sys.modules.get("torch")  # a run has it; to import it would cost a reward's time
    gradients = torch.set_grad_enabled(torch.is_grad_enabled()) if torch else nullcontext()
    with chdir("."), gradients:  # a run's own paths may be relative, and its loss needs a gradient
        yield


def _packages(module: str) -> list[str]:
    """a.b.c as a, a.b and a.b.c: the names that an import of it looks for."""
    names = module.split(".")
    return [".".join(names[: count + 1]) for count in range(len(names))]


def check(
    functions: Mapping[str, Reward],
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Any],
    seconds: float,
) -> dict[str, list[float | None]]:
    """Call each reward on a small batch, `completions[i]` answering `rows[i]`; returns their values.

    Raises RewardError for an exception, a hang past `seconds`, a wrong length, or a value that is not a finite number.
    """
    columns = columns_of(rows)
    given: dict[str, list[float | None]] = {}
    for name, function in functions.items():
        with watched(f"reward {name}", 2 * seconds), as_it_was():
            found = _checked(function, completions, columns, seconds)
        if isinstance(found, Fault):
            which = "first completion" if found.index is None else "completion"
            raise RewardError(
                f"reward {name}: {found.what}{_there(found, columns)}; the {which} was "
                f"{show(completions[found.index or 0])}"
            )
        given[name] = found
    return given


def _checked(
    function: Reward, completions: Sequence[Any], columns: Mapping[str, Any], seconds: float
) -> Values | Fault:
    """The values of a batch, or what is wrong and, if it can be found out, with which completion."""
    found = now(function, call, call_async)(function, completions, columns, seconds)
    if isinstance(found, list) or found.index is not None:
        return found
    alone = now(function, isolate, isolate_async)(function, completions, columns, seconds)
    faults = [Fault(one.what, index) for index, one in enumerate(alone) if isinstance(one, Fault)]
    return faults[0] if faults else found


def _there(fault: Fault, columns: Mapping[str, Any]) -> str:
    """The columns that there are, where a function has asked for another one."""
    if not re.match(r"raised (KeyError:|TypeError: .* missing \d+ required)", fault.what):
        return ""
    names = [name for name, values in columns.items() if isinstance(values, list)]
    return f" (the columns are {', '.join(names)}; one whose values are of several kinds is left out)"


def now(function: Reward, plain: Any, waiting: Any) -> Any:
    """Calls a function from synchronous code: a coroutine runs to its end, in a thread without an event loop."""
    if not is_async(function):
        return plain

    def run(*arguments: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: asyncio.run(waiting(*arguments))).result()

    return run


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments that TRL passes beside `completions`: prompts, every column, and three of its own."""
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    prompts = columns.pop("prompt")
    return {
        "prompts": prompts,
        "completion_ids": [[0] for _ in rows],
        **columns,
        "trainer_state": None,
        "log_extra": Extras(len(rows)),
        "log_metric": lambda *_: None,
    }


def too_many(failed: int, scored: int, share: float) -> bool:
    """Whether there are more failures so far than that share allows."""
    # One failure of eight in the first step is too few to judge; half of all completions is too many at any time.
    return failed > share * max(scored, FIRST_VERDICT) or failed > max(share, 0.5) * scored


class Failures(NamedTuple):
    """How often a reward failed, in completions so far, and in the last batch; the last failure of that batch."""

    scored: int
    failed: int
    now: int
    last: str | None

    @classmethod
    def of_all(cls, processes: Sequence[Failures]) -> Failures:
        """Those of several processes together."""
        scored, failed, now, last = zip(*processes, strict=True)
        return cls(sum(scored), sum(failed), sum(now), next((one for one in last if one is not None), None))


class Guarded:
    """A reward function whose failures cost single completions: None for those, until too many fail.

    `scored` and `failed` count completions. None makes TRL leave this function out of the completion's sum, and a
    completion with nothing but None out of its group. A call that nothing ends ends the run, after `keep`, which saves
    what there is and returns a sentence about it.

    Of several processes each calls it on its own completions, and none can tell when too many have failed: when all
    have called it, `judge` is given what they counted (recipes.training.rewards.FailuresOfAll).
    """

    def __init__(self, name: str, function: Reward, seconds: float, share: float) -> None:
        functools.update_wrapper(self, function)
        self.__name__ = name  # what TRL logs it as
        self._function, self._seconds, self._share = function, seconds, share
        self.scored = self.failed = 0
        self._now = 0  # of the last batch
        self._last: str | None = None
        self._logged: list[str] = []  # columns of log_extra so far
        self.keep: Callable[[], str] = nothing_to_keep

    @contextmanager
    def _watched(self) -> Iterator[None]:
        with watched(f"reward {self.__name__}", 2 * self._seconds, self.keep), as_it_was():
            yield

    @contextmanager
    def _extras(self, count: int, columns: dict[str, Any]) -> Iterator[None]:
        """What is logged beside the completions reaches TRL once, in their order."""
        log = columns.get("log_extra")
        if log is not None:
            columns["log_extra"] = Extras(count, self._logged)
        yield
        if log is not None:
            self._logged = columns["log_extra"].pass_on(log)

    def __call__(self, completions: list[Any], **columns: Any) -> Values:
        """The batch at once; one by one only if that fails."""
        found: Values | Fault | list[float | Fault | None]
        with self._watched(), self._extras(len(completions), columns):
            found = call(self._function, completions, columns, self._seconds)
            if isinstance(found, Fault):
                found = isolate(self._function, completions, columns, self._seconds)
        return self._settle(completions, found, columns)

    def _settle(
        self, completions: list[Any], found: Sequence[float | Fault | None], columns: Mapping[str, Any]
    ) -> Values:
        """Count the faults; the values, None in their places."""
        faults = [(one, text) for one, text in zip(found, completions) if isinstance(one, Fault)]
        self.scored += len(completions)
        self.failed += len(faults)
        self._now, self._last = len(faults), None
        if faults:
            fault, completion = faults[-1]
            self._last = f"{fault.what}, on {show(completion)}"
        if count() == 1:
            self.judge(self.failures, columns.get("log_metric"))
        return [None if isinstance(one, Fault) else one for one in found]

    @property
    def failures(self) -> Failures:
        """Those of this process."""
        return Failures(self.scored, self.failed, self._now, self._last)

    def judge(self, found: Failures, log: Callable[[str, float], None] | None) -> None:
        """Logs a batch's failures of all processes; raises RewardError if there are too many by now."""
        if log is not None:
            log(f"reward_failures/{self.__name__}", float(found.now))
        if too_many(found.failed, found.scored, self._share):
            raise RewardError(
                f"reward {self.__name__}: failed on {found.failed} of {found.scored} completions, more than "
                f"task.reward_failures {self._share:g} allows; the last time it {found.last}"
            )


class AsyncGuarded(Guarded):
    """The same for a coroutine function, which TRL awaits."""

    async def __call__(self, completions: list[Any], **columns: Any) -> Values:  # type: ignore[override]
        """The batch at once; one by one only if that fails."""
        found: Values | Fault | list[float | Fault | None]
        with self._watched(), self._extras(len(completions), columns):
            found = await call_async(self._function, completions, columns, self._seconds)
            if isinstance(found, Fault):
                found = await isolate_async(self._function, completions, columns, self._seconds)
        return self._settle(completions, found, columns)


def guard(functions: Mapping[str, Reward], options: RewardOptions) -> list[Any]:
    """The functions as the trainer gets them, each guarded."""
    return [
        (AsyncGuarded if is_async(function) else Guarded)(
            name, function, options.reward_seconds, options.reward_failures
        )
        for name, function in functions.items()
    ]
