"""The contract of a reward function: how it is named and weighed, checked before training, and guarded in it.

    functions = choose({"correct": 1.0, "my_rewards.brevity": 0.1}, task.rewards)   by name
    check(functions, rows, completions, seconds)                                    the contract, before training
    guard(functions, options)                                                       what the trainer gets

The weights stand in the YAML under `task.rewards` (name: weight). A name with a dot is a function of the user's own:
`my_rewards.brevity` is `brevity` in my_rewards.py.

The contract is TRL's: `function(completions, **columns)` returns one finite number, or None, per completion.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from recipes.problems import ConfigError, Problem, one_of
from recipes.rewards.time_limit import TimeLimitReached, time_limit

Reward = Callable[..., Sequence[float | None]]
FIRST_VERDICT = 64  # completions that a share of failures is taken of at least, however few came yet


class RewardError(ValueError):
    """A reward function breaks the contract; the message names it and shows the completion."""


def _no_section(weight: Any) -> Any:
    """`task.rewards.my_rewards.brevity=0.1` on the command line is a section in a section."""
    if isinstance(weight, dict):
        raise ValueError("is a section; write a name with a dot as task.rewards={my_rewards.brevity: 0.1}")
    return weight


class RewardOptions(BaseModel):
    """The keys of a task that say what counts how much. A task's Options build on it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    rewards: dict[str, Annotated[float, BeforeValidator(_no_section)]] | None = Field(
        None,
        description="weight of each reward by name, 0: only logged; `module.function`: one of your own; null: all, "
        "by the task's own weights",
    )
    reward_seconds: float = Field(10.0, gt=0, description="time limit of one call of a reward function")
    reward_failures: float = Field(
        0.05, ge=0, le=1, description="share of completions a reward may fail on before the run stops"
    )


def problems(weights: Mapping[str, float], known: Mapping[str, Reward]) -> Iterator[Problem]:
    """What is wrong with a run's weights, as far as it shows without importing the user's own functions.

    known: the task's rewards.
    """
    if not any(weights.values()):
        remedy = "give one a weight other than 0, or set it to null for the task's own weights"
        yield Problem("task.rewards", "weighs nothing", dict(weights), remedy)
    for name, weight in weights.items():
        if name not in known and "." not in name:
            remedy = f"use {one_of(known)}, or module.function"
            yield Problem(f"task.rewards.{name}", "is no reward of this task", weight, remedy)


def choose(weights: Mapping[str, float], known: Mapping[str, Reward]) -> dict[str, Reward]:
    """The functions that are weighed, in that order: the task's, or the user's own.

    Raises ConfigError for one that cannot be imported. For weights in which `problems` finds nothing.
    """
    return {name: known[name] if name in known else _import(name) for name in weights}


def _import(name: str) -> Reward:
    """The user's function `module.function`, from the working directory or an installed package."""
    module, _, function = name.rpartition(".")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        remedy = (
            f"put a function {function} into {module.replace('.', '/')}.py beside where you start the run"
        )
        raise ConfigError([Problem("task.rewards", f"cannot be imported ({error})", name, remedy)]) from error
    if not callable(found):
        raise ConfigError([Problem("task.rewards", f"{name} is no function", found, "name a function")])
    return found


def check(
    functions: Mapping[str, Reward],
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Any],
    seconds: float,
) -> dict[str, list[float | None]]:
    """Call each reward on a small batch, `completions[i]` answering `rows[i]`; returns what they gave.

    Raises RewardError for an exception, a hang past `seconds`, a wrong length, or a value that is no finite number.
    """
    columns = _columns(rows)
    given: dict[str, list[float | None]] = {}
    for name, function in functions.items():
        if inspect.iscoroutinefunction(function):
            continue  # TRL runs those on an event loop of its own
        fault = _fault(function, completions, columns, seconds)
        if isinstance(fault, list):
            given[name] = fault
            continue
        for index, completion in enumerate(completions):  # which completion it was
            alone = _fault(function, [completion], _alone(columns, index, len(completions)), seconds)
            if isinstance(alone, str):
                raise RewardError(f"reward {name}: {alone}; the completion was {_show(completion)}")
        raise RewardError(f"reward {name}: {fault}; the first completion was {_show(completions[0])}")
    return given


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments that TRL passes beside `completions`: prompts, every column, and three of its own."""
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    prompts = columns.pop("prompt")
    return {
        "prompts": prompts,
        "completion_ids": [[0] for _ in rows],
        **columns,
        "trainer_state": None,
        "log_extra": lambda *_: None,
        "log_metric": lambda *_: None,
    }


def row_at(columns: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
    """The row of one of `count` completions, of the columns that a reward is called with."""
    return {
        name: values[index]
        for name, values in columns.items()
        if isinstance(values, list) and len(values) == count
    }


def _alone(columns: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
    """The columns for one completion by itself."""
    return {**columns, **{name: [value] for name, value in row_at(columns, index, count).items()}}


def _fault(
    function: Reward, completions: Sequence[Any], columns: Mapping[str, Any], seconds: float
) -> list[float | None] | str:
    """The function's values, or in words what is wrong with them."""
    try:
        with time_limit(seconds):
            values = function(completions=list(completions), **columns)
    except TimeLimitReached:
        return f"did not return within {seconds:g} s (task.reward_seconds)"
    except Exception as error:  # a user's code may raise anything, and it all means the same here
        return f"raised {type(error).__name__}: {error}"
    return _judge(values, len(completions))


def _judge(values: Any, wanted: int) -> list[float | None] | str:
    try:
        found = [None if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        return f"returned {_show(values)}; return a list with one number, or None, per completion"
    if len(found) != wanted:
        return f"returned {len(found)} values for {wanted} completion(s); return one for each"
    bad = [value for value in found if value is not None and not math.isfinite(value)]
    return f"returned {bad[0]}; return a finite number, or None" if bad else found


def _show(value: Any, limit: int = 300) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class Guarded:
    """A reward function whose failures cost single completions: None for those, until too many fail.

    `scored` and `failed` count completions. None makes TRL leave this function out of the completion's sum, and a
    completion with nothing but None out of its group.
    """

    def __init__(self, name: str, function: Reward, seconds: float, share: float) -> None:
        functools.update_wrapper(self, function)
        self.__name__ = name  # what TRL logs it as
        self._function, self._seconds, self._share = function, seconds, share
        self.scored = self.failed = 0

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        """The batch at once; one by one only if that fails."""
        values = _fault(self._function, completions, columns, self._seconds)
        faults: list[tuple[str, Any]] = []
        if isinstance(values, str):
            values = self._one_by_one(completions, columns, faults)
        self.scored += len(completions)
        self.failed += len(faults)
        log = columns.get("log_metric")
        if log is not None:
            log(f"reward_failures/{self.__name__}", float(len(faults)))
        if faults:
            self._stop_past_share(*faults[-1])
        return values

    def _one_by_one(
        self, completions: list[Any], columns: Mapping[str, Any], faults: list[tuple[str, Any]]
    ) -> list[float | None]:
        values: list[float | None] = []
        for index, completion in enumerate(completions):
            alone = _alone(columns, index, len(completions))
            found = _fault(self._function, [completion], alone, self._seconds)
            if isinstance(found, str):
                faults.append((found, completion))
                values.append(None)
            else:
                values += found
        return values

    def _stop_past_share(self, fault: str, completion: Any) -> None:
        # One failure of eight in the first step is no share yet; half of what came is, at any time.
        allowed = self._share * max(self.scored, FIRST_VERDICT)
        if self.failed > allowed or self.failed > max(self._share, 0.5) * self.scored:
            raise RewardError(
                f"reward {self.__name__}: failed on {self.failed} of {self.scored} completions, more than "
                f"task.reward_failures {self._share:g} allows; the last time it {fault}, on {_show(completion)}"
            )


def guard(functions: Mapping[str, Reward], options: RewardOptions) -> list[Any]:
    """The functions as the trainer gets them, each `Guarded`; a coroutine stays as it is, TRL awaits it."""
    return [
        function
        if inspect.iscoroutinefunction(function)
        else Guarded(name, function, options.reward_seconds, options.reward_failures)
        for name, function in functions.items()
    ]
