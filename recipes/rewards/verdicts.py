"""A judge's verdicts on an evaluation's completions, under the time limits of training.

judge_all(task.is_correct, completions, rows, task.options)      [True, False, …]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from recipes.rewards.call import show
from recipes.rewards.contract import RewardError, RewardOptions, too_many
from recipes.rewards.stuck import watched
from recipes.rewards.time_limit import TimeLimitReached, time_limit

Verdict = TypeVar("Verdict")


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
