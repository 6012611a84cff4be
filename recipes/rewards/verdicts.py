"""A judge's verdicts on an evaluation's completions, under the time limits of training.

judge_all(task.is_correct, completions, rows, task.options)              [True, False, …]
rewarded(name, function, 1.0, completions, rows, task.options)           by a reward, which judges a batch in one call
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from recipes.rewards.call import (
    Fault,
    Reward,
    call,
    call_async,
    is_async,
    isolate,
    isolate_async,
    show,
)
from recipes.rewards.contract import RewardError, RewardOptions, as_it_was, columns_of, now, too_many
from recipes.rewards.stuck import watched
from recipes.rewards.time_limit import TimeLimitReached, time_limit

Verdict = TypeVar("Verdict")
Rows = Sequence[Mapping[str, Any]]
AT_ONCE = (
    64  # completions in a call of a reward, about as many as in training: its time limit is that of a call
)


def judge_all(
    judge: Callable[[str, Mapping[str, Any]], Verdict],
    completions: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    options: RewardOptions,
) -> list[Verdict | bool]:
    """`judge(completions[i], rows[i])` for each; one that takes longer than `task.reward_seconds` is False.

    Raises RewardError where more of them do than `task.reward_failures` allows a reward in training.
    """
    found: list[Verdict | bool] = []
    late = 0
    name, seconds = getattr(judge, "__name__", "the judge"), options.reward_seconds
    for completion, row in zip(completions, rows, strict=True):
        try:
            with watched(f"{name} on {show(completion)}", seconds), time_limit(seconds):
                found.append(judge(completion, row))
        except TimeLimitReached as error:
            found.append(False)
            late += 1
            if too_many(late, len(found), options.reward_failures):
                raise RewardError(
                    f"{name}: did not return within {seconds:g} s (task.reward_seconds) on {late} of "
                    f"{len(found)} completions, more than task.reward_failures {options.reward_failures:g} allows; "
                    f"the last was {show(completion)}"
                ) from error
    return found


def rewarded(
    name: str, function: Reward, least: float, completions: Sequence[Any], rows: Rows, options: RewardOptions
) -> list[bool]:
    """Whether a reward gives `completions[i]`, an answer to `rows[i]`, at least that much; None and a fault are False.

    Raises RewardError where it fails on more of them than `task.reward_failures` allows in training.
    """
    found: list[bool] = []
    failed = 0
    for start in range(0, len(completions), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        for place, value in enumerate(_values(name, function, completions[part], rows[part], options), start):
            failed += isinstance(value, Fault)
            found.append(isinstance(value, float) and value >= least)
            if isinstance(value, Fault) and too_many(failed, len(found), options.reward_failures):
                raise RewardError(
                    f"reward {name}: failed on {failed} of {len(found)} completions of an evaluation, more than "
                    f"task.reward_failures {options.reward_failures:g} allows; the last time it {value.what}, on "
                    f"{show(completions[place])}"
                )
    return found


def _values(
    name: str, function: Reward, completions: Sequence[Any], rows: Rows, options: RewardOptions
) -> Iterator[float | Fault | None]:
    """Those of a batch; where that fails, of each completion alone, with the time of a call each.

    What is slow is judged in the end: here nobody waits for a step.
    """

    def called(how: Any, part: slice) -> Any:
        """By that way of recipes.rewards.call; nothing that the function sets for all of the process stays."""
        with watched(f"reward {name}", options.reward_seconds), as_it_was():
            return how(function, completions[part], columns_of(rows[part]), options.reward_seconds)

    values = called(now(function, call, call_async), slice(None))
    if not isinstance(values, Fault):
        yield from values
    elif is_async(function):
        yield from called(now(function, isolate, isolate_async), slice(None))
    else:
        alone = (called(call, slice(place, place + 1)) for place in range(len(completions)))
        yield from (found if isinstance(found, Fault) else found[0] for found in alone)
