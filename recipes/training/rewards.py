"""A run's rewards, tried out before anything is loaded: prepare(task) -> Rewards(functions, weights)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recipes.processes import by_main
from recipes.rewards.contract import check, choose, guard
from recipes.tasks import Task

PROBES = (
    "",
    "I do not know.",
    "12",
    "<reasoning>\n1 + 1\n</reasoning>\n<answer>\n2\n</answer>\n",
    "\\boxed{3}",
    "(" * 50,
)


@dataclass(frozen=True)
class Rewards:
    """The reward functions as the trainer gets them, and the weight of each in the same order."""

    functions: list[Any]
    weights: list[float]


def prepare(task: Task) -> Rewards:
    """The task's rewards as the YAML weighs them, guarded; their contract is checked on a few problems.

    Raises ConfigError if a function or data is missing, RewardError for a function that breaks the contract.
    """
    functions = choose(task.reward_weights, task.rewards)
    data, _ = task.train, task.held_out  # missing data is reported before a folder is made
    rows = [data[index % len(data)] for index in range(len(PROBES))]
    chat = not isinstance(rows[0]["prompt"], str)
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in PROBES]
    by_main(lambda: check(functions, rows, completions, task.options.reward_seconds))
    return Rewards(guard(functions, task.options), list(task.reward_weights.values()))
