"""Countdown-lite: reach a target with three numbers, each used exactly once, and `+ - *`.

    prompt      357>26=          the numbers 3, 5, 7 and the target 26
    completion  3*7+5            right: 26, and 3, 5, 7 once each

There are 1,345 such problems (numbers 1-9, targets 0-99 that can be reached without brackets; an answer may use them
all the same), which make 6,396 prompts, one for every order of the numbers. The run's seed holds 512 prompts out. No
held-out prompt is ever trained on, but nearly every one's problem is, in another order of its numbers: the accuracy
says how well a policy was learnt, not how it would do on other problems. (Holding out whole problems was tried, see
docs/benchmarks.md.) Needs no network.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations_with_replacement, permutations
from typing import Any

from datasets import Dataset
from pydantic import Field

from recipes.rewards.arithmetic import Expression, ExpressionError, expressions, parse
from recipes.rewards.contract import Reward, RewardOptions
from recipes.tasks import Example, Row, Task

Prompt = tuple[tuple[int, ...], int]  # the numbers in the order in which they are shown, and the target


class Countdown(Task):
    """The rows have `numbers` (list of int) and `target` (int) beside their prompt."""

    class Options(RewardOptions):
        """The keys beside `task.name` in the YAML."""

        eval_problems: int = Field(
            512, ge=1, le=1200, description="problems held out for the greedy accuracy"
        )
        train_size: int | None = Field(
            None,
            ge=1,
            description="training prompts at most; null: the train problems with their numbers in every order",
        )

    options: Options
    weights = {"correct": 1.0, "well_formed": 1.0}
    characters = "0123456789+-*()>="

    @cached_property
    def _split(self) -> tuple[list[Prompt], list[Prompt]]:
        """Prompts as (train, held out), nothing in common; the same seed gives the same sets."""
        problems = sorted(solutions(), key=lambda problem: (problem.numbers, problem.target))
        prompts = [
            (order, problem.target)
            for problem in problems
            for order in sorted(set(permutations(problem.numbers)))
        ]
        random.Random(f"countdown split {self.seed}").shuffle(prompts)
        held_out = self.options.eval_problems
        return prompts[held_out:][: self.options.train_size], prompts[:held_out]

    @cached_property
    def train(self) -> Dataset:
        """Prompts to train on, shuffled."""
        return _dataset(self._split[0])

    @cached_property
    def held_out(self) -> Dataset:
        """The held-out prompts."""
        return _dataset(self._split[1])

    @property
    def rewards(self) -> Mapping[str, Reward]:
        """Right, and well-formed."""
        return {"correct": self.correct, "well_formed": well_formed}

    def is_correct(self, completion: str, row: Row) -> bool:
        """Whether the completion uses `row["numbers"]` once each and comes to `row["target"]`."""
        expression = _read(completion)
        return (
            expression is not None
            and sorted(expression.numbers) == sorted(row["numbers"])
            and expression.value == row["target"]
        )

    def warm_start_examples(self, count: int) -> list[Example]:
        """`count` pairs of prompt and right completion: a random train prompt with a random solution of it.

        Drawing among all the solutions keeps the policy's entropy up: GRPO learns from what it samples.
        """
        rng = random.Random(f"countdown warm start {self.seed}")
        known = solutions()
        pairs = []
        for numbers, target in rng.choices(self._split[0], k=count):
            ascending = sorted(numbers)
            problem = Problem((ascending[0], ascending[1], ascending[2]), target)
            pairs.append((prompt_text(numbers, target), rng.choice(known[problem])))
        return pairs


@dataclass(frozen=True)
class Problem:
    """Three numbers in ascending order and a target that some expression of them reaches."""

    numbers: tuple[int, int, int]
    target: int


@lru_cache(maxsize=1)
def solutions() -> dict[Problem, list[str]]:
    """Every problem, with every expression that solves it."""
    found: dict[Problem, list[str]] = {}
    for numbers in combinations_with_replacement(range(1, 10), 3):
        for target, texts in expressions(numbers).items():
            if 0 <= target <= 99:
                found[Problem(numbers, target)] = texts
    return found


def prompt_text(numbers: Sequence[int], target: int) -> str:
    """`357>26=`. The target always has two digits, so that every prompt has seven characters and none is padded."""
    return f"{''.join(map(str, numbers))}>{target:02d}="


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


def _dataset(prompts: list[Prompt]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [prompt_text(numbers, target) for numbers, target in prompts],
            "numbers": [list(numbers) for numbers, _ in prompts],
            "target": [target for _, target in prompts],
        }
    )


def well_formed(completions: list[str], numbers: list[list[int]], **_: Any) -> list[float]:
    """Reward 1 for an expression that uses every number once, whatever its value."""
    return [float(uses_the_numbers(text, given)) for text, given in zip(completions, numbers, strict=True)]
