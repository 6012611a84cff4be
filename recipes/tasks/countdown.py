"""Countdown-lite: reach a target with three numbers, each used exactly once, and `+ - *`.

    prompt      3 12 7>43=       the numbers 3, 12, 7 and the target 43
    completion  12*3+7           right: 43, and 3, 12, 7 once each

There are 2,912 such problems: numbers 1-12 in any order, targets 0-99 that can be reached without brackets (an answer
may use them all the same). The run's seed holds some of them out: no problem of the evaluation, in whatever order its
numbers come, is ever trained on. Warm start and GRPO share the others.

Why 12 and not 9: numbers 1-9 make only 1,345 problems. A small model learns the 833 left by 512 held-out ones by heart
and stays below 0.47 on new ones however long it is taught, so there is nothing in them for GRPO to find.
Needs no network.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement, permutations
from typing import Any

from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field

from recipes.tasks.arithmetic import Expression, ExpressionError, expressions, parse

CHARACTERS = "0123456789+-*()>= "  # everything a prompt or a completion is made of


class Options(BaseModel):
    """The keys beside `task.name` in the YAML."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_number: int = Field(12, ge=4, le=20, description="the numbers are drawn from 1 to this one")
    eval_problems: int = Field(512, ge=1, description="problems held out for the greedy accuracy")
    train_size: int | None = Field(
        None,
        ge=1,
        description="GRPO prompts at most; null: the train problems with their numbers in every order",
    )


@dataclass(frozen=True)
class Problem:
    """Three numbers in ascending order and a target that some expression of them reaches."""

    numbers: tuple[int, int, int]
    target: int


@lru_cache(maxsize=4)
def solutions(max_number: int = 12) -> dict[Problem, list[str]]:
    """Every problem there is with every expression that solves it."""
    found: dict[Problem, list[str]] = {}
    for numbers in combinations_with_replacement(range(1, max_number + 1), 3):
        for target, texts in expressions(numbers).items():
            if 0 <= target <= 99:
                found[Problem(numbers, target)] = texts
    return found


def split(options: Options, seed: int) -> tuple[list[Problem], list[Problem]]:
    """All problems as (train, held out), nothing in common; the same seed gives the same sets.

    Raises ValueError if nothing is left to train on.
    """
    problems = sorted(solutions(options.max_number), key=lambda problem: (problem.numbers, problem.target))
    if options.eval_problems >= len(problems):
        raise ValueError(
            f"task.eval_problems: {options.eval_problems} of {len(problems)} problems leave none to train on; lower it"
        )
    random.Random(f"countdown split {seed}").shuffle(problems)
    return problems[options.eval_problems :], problems[: options.eval_problems]


def prompt_text(numbers: Sequence[int], target: int) -> str:
    """`3 12 7>43=`. The target always has two digits."""
    return f"{' '.join(map(str, numbers))}>{target:02d}="


def _rows(problems: list[tuple[tuple[int, ...], int]]) -> Dataset:
    """Prompts with the columns that the rewards need: `numbers` (list of int) and `target` (int)."""
    return Dataset.from_dict(
        {
            "prompt": [prompt_text(numbers, target) for numbers, target in problems],
            "numbers": [list(numbers) for numbers, _ in problems],
            "target": [target for _, target in problems],
        }
    )


def train_dataset(options: Options, seed: int) -> Dataset:
    """GRPO's prompts: the train problems with their numbers in every order, shuffled."""
    train, _ = split(options, seed)
    prompts = [
        (order, problem.target) for problem in train for order in sorted(set(permutations(problem.numbers)))
    ]
    random.Random(f"countdown train {seed}").shuffle(prompts)
    return _rows(prompts[: options.train_size])


def eval_dataset(options: Options, seed: int) -> Dataset:
    """The held-out problems, each once, with its numbers in a drawn order."""
    rng = random.Random(f"countdown eval {seed}")
    _, held_out = split(options, seed)
    return _rows([(tuple(rng.sample(problem.numbers, 3)), problem.target) for problem in held_out])


def warm_start_examples(options: Options, seed: int, count: int) -> list[tuple[str, str]]:
    """`count` pairs of prompt and right completion: a train problem, an order, one of its solutions, each by chance.

    Drawing among all the solutions keeps the policy's entropy up: GRPO learns from what it samples.
    """
    train, _ = split(options, seed)
    rng = random.Random(f"countdown warm start {seed}")
    known = solutions(options.max_number)
    pairs = []
    for problem in rng.choices(train, k=count):
        pairs.append(
            (prompt_text(rng.sample(problem.numbers, 3), problem.target), rng.choice(known[problem]))
        )
    return pairs


def _read(completion: str) -> Expression | None:
    """The completion as an expression, None if it is not one."""
    try:
        return parse(completion.strip())
    except ExpressionError:
        return None


def uses_the_numbers(completion: str, numbers: Sequence[int]) -> bool:
    """Whether the completion is an expression with every number exactly once and no other."""
    expression = _read(completion)
    return expression is not None and sorted(expression.numbers) == sorted(numbers)


def is_correct(completion: str, row: dict[str, Any]) -> bool:
    """Whether the completion uses `row["numbers"]` once each and comes to `row["target"]`."""
    expression = _read(completion)
    return (
        expression is not None
        and sorted(expression.numbers) == sorted(row["numbers"])
        and expression.value == row["target"]
    )


def correct(completions: list[str], numbers: list[list[int]], target: list[int], **_: Any) -> list[float]:
    """Reward 1 for a right expression, 0 for anything else."""
    rows = zip(completions, numbers, target, strict=True)
    return [float(is_correct(text, {"numbers": given, "target": goal})) for text, given, goal in rows]


def well_formed(completions: list[str], numbers: list[list[int]], **_: Any) -> list[float]:
    """Reward 1 for an expression that uses every number once, whatever it comes to."""
    return [float(uses_the_numbers(text, given)) for text, given in zip(completions, numbers, strict=True)]


rewards = {"correct": correct, "well_formed": well_formed}
