"""A run's reward functions: which, with what weight, and what happens when one fails.

    functions, weights = prepare(config, task)                        all of what follows
    chosen = choose(config.task.options, task.rewards, config.grpo)   names and weights, from one place
    check(chosen.functions, rows, completions, seconds)               the contract, before training
    guarded = guard(chosen.functions, config.task.options)            what the trainer gets

The weights stand in the YAML under `task.rewards` (name: weight), for a task whose Options are `RewardOptions`.
A name with a dot is a function of the user's own: `my_rewards.brevity` is `brevity` in my_rewards.py. A task
without `task.rewards` uses all its rewards, weighed by `grpo.reward_weights`.

The contract is TRL's: `function(completions, **columns)` returns one finite number, or None, per completion.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from recipes.problems import ConfigError, Problem, one_of
from recipes.rewards.time_limit import TimeLimitReached, time_limit

if TYPE_CHECKING:
    from recipes.config.load import RunConfig

Reward = Callable[..., list[float | None]]
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


@dataclass(frozen=True)
class Chosen:
    """The reward functions by name, and the weight of each in the same order (None: TRL's default, 1 each)."""

    functions: dict[str, Reward]
    weights: list[float] | None


def problems(
    options: Any,
    known: Mapping[str, Reward],
    grpo: Mapping[str, Any],
    defaults: Mapping[str, float] | None = None,
) -> Iterator[Problem]:
    """What is wrong with the choice, as far as it shows without importing the user's own. Arguments as `choose`."""
    weights, given = getattr(options, "rewards", None) or defaults, grpo.get("reward_weights")
    if weights is None:
        if given is not None and len(given) != len(known):
            message = f"weighs {len(given)} reward(s), but this task has {len(known)}"
            yield Problem("grpo.reward_weights", message, given, f"give one number each: {', '.join(known)}")
        return
    if given is not None:
        yield Problem("grpo.reward_weights", "stands beside the weights of task.rewards", given, "remove it")
    if not any(weights.values()):
        yield Problem("task.rewards", "weighs nothing", dict(weights), "give one a weight other than 0")
    for name, weight in weights.items():
        if name not in known and "." not in name:
            remedy = f"use {one_of(known)}, or module.function"
            yield Problem(f"task.rewards.{name}", "is no reward of this task", weight, remedy)


def choose(
    options: Any,
    known: Mapping[str, Reward],
    grpo: Mapping[str, Any],
    defaults: Mapping[str, float] | None = None,
) -> Chosen:
    """The run's rewards. `known` and `defaults`: the task's functions and weights; `grpo`: that section.

    Raises ConfigError for a function that cannot be imported; what else may be wrong, `problems` has said.
    """
    weights = getattr(options, "rewards", None) or defaults
    if weights is None:
        return Chosen(dict(known), grpo.get("reward_weights"))
    functions = {name: known[name] if name in known else _import(name) for name in weights}
    return Chosen(functions, list(weights.values()))


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
            one = {key: [values[index]] for key, values in columns.items() if isinstance(values, list)}
            alone = _fault(function, [completion], {**columns, **one}, seconds)
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


PROBES = (
    "",
    "I do not know.",
    "12",
    "<reasoning>\n1 + 1\n</reasoning>\n<answer>\n2\n</answer>\n",
    "\\boxed{3}",
    "(" * 50,
)


def prepare(config: RunConfig, task: Any) -> tuple[list[Any], list[float] | None]:
    """The run's rewards for the trainer, guarded, and their weights; the contract is checked on a few problems.

    Raises ConfigError for a function or data that is not there, RewardError for one that breaks the contract.
    """
    options = config.task.options
    chosen = choose(options, task.rewards, config.grpo, getattr(task, "WEIGHTS", None))
    data = task.train_dataset(options, config.run.seed)
    task.eval_dataset(options, config.run.seed)  # if it is not there, that is said before a folder is made
    rows = [data[index % len(data)] for index in range(len(PROBES))]
    chat = not isinstance(rows[0]["prompt"], str)
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in PROBES]
    limits = options if isinstance(options, RewardOptions) else RewardOptions()
    check(chosen.functions, rows, completions, limits.reward_seconds)
    return guard(chosen.functions, options), chosen.weights


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
            one = {
                key: [value[index]]
                for key, value in columns.items()
                if isinstance(value, list) and len(value) == len(completions)
            }
            found = _fault(self._function, [completion], {**columns, **one}, self._seconds)
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


def guard(functions: Mapping[str, Reward], options: Any = None) -> list[Any]:
    """The functions as the trainer gets them, each `Guarded`; a coroutine stays as it is, TRL awaits it."""
    limits = options if isinstance(options, RewardOptions) else RewardOptions()
    return [
        function
        if inspect.iscoroutinefunction(function)
        else Guarded(name, function, limits.reward_seconds, limits.reward_failures)
        for name, function in functions.items()
    ]
