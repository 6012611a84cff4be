r"""Counting letters: verl's recipe of that name, in which a model learns to spell a word and to count what it spells.

    prompt      How many n are there in word n-i-n-e?        as a chat message
    completion  n = n.  i != n.  n = n.  e != n.  \boxed{2}  a line each
    right       the last box holds the number

Words are drawn, not looked up: their length uniformly between shortest and longest, and for a length n the count
uniformly from 1 to n. So one word in ten is a single letter repeated, and as there are few such words, some occur twice
within a split. No problem (a word and its letter) is in both splits; of the training words, which lack those held out,
one in fourteen is.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Self

from datasets import Dataset
from pydantic import Field, model_validator

from recipes.data import rounds
from recipes.rewards.contract import RewardOptions
from recipes.rewards.final_answer import boxed, lenient_answer
from recipes.tasks import Example, Row, Task


@dataclass(frozen=True)
class Problem:
    """A word, and the letter to count in it."""

    word: str
    letter: str

    @property
    def count(self) -> int:
        """How often the letter occurs."""
        return self.word.count(self.letter)


class CharCount(Task):
    """The rows have `count` (int) beside their prompt."""

    class Options(RewardOptions):
        """The keys beside `task.name` in the YAML."""

        min_letters: int = Field(5, ge=3, le=64, description="letters of a word at least")
        max_letters: int = Field(20, ge=3, le=64, description="letters of a word at most")
        train_size: int = Field(9000, ge=1, description="training problems")
        held_out: int = Field(1000, ge=1, le=10_000, description="problems kept for evaluation")

        @model_validator(mode="after")
        def _at_least_below_at_most(self) -> Self:
            if self.min_letters > self.max_letters:
                raise ValueError(
                    f"min_letters {self.min_letters} is more than max_letters {self.max_letters}; lower it"
                )
            return self

    options: Options

    @cached_property
    def train(self) -> Dataset:
        """The problems to train on."""
        return _dataset(self._split[0])

    @cached_property
    def held_out(self) -> Dataset:
        """The held-out problems."""
        return _dataset(self._split[1])

    def is_correct(self, completion: str, row: Row) -> bool:
        """Whether the last box holds the count, and only that."""
        return boxed(completion) == str(row["count"])

    def is_correct_lenient(self, completion: str, row: Row) -> bool:
        """Whether the number that a reader would take for the answer is the count, boxed or not."""
        return lenient_answer(completion) == row["count"]

    def answer_of(self, completion: str) -> str | None:
        """What the last box holds."""
        return boxed(completion)

    def warm_start_examples(self, count: int) -> list[Example]:
        """Train problems with their worked answers; all of them come once before any is repeated."""
        drawn = rounds(self._split[0], count, f"char_count warm start {self.seed}")
        return [(_prompt(problem), worked_answer(problem)) for problem in drawn]

    def corpus(self) -> list[str]:
        """Questions and worked answers."""
        return [text for problem in self._split[0] for text in (_question(problem), worked_answer(problem))]

    @cached_property
    def _split(self) -> tuple[list[Problem], list[Problem]]:
        """Problems as (train, held out). The held-out ones are drawn first, which keeps them uniform."""
        options = self.options
        drawn = _drawn(options.min_letters, options.max_letters, f"char_count {self.seed}")
        held_out = list(islice(drawn, options.held_out))
        kept_back = set(held_out)
        train = (problem for problem in drawn if problem not in kept_back)
        return list(islice(train, options.train_size)), held_out


def worked_answer(problem: Problem) -> str:
    r"""A line per letter that says whether it is the one, then the count in its box."""
    letter = problem.letter
    lines = [f"{each} {'=' if each == letter else '!='} {letter}." for each in problem.word]
    return "\n".join([*lines, rf"\boxed{{{problem.count}}}"])


def _drawn(min_letters: int, max_letters: int, seed: str) -> Iterator[Problem]:
    """An endless stream of problems."""
    rng = random.Random(seed)
    while True:
        length = rng.randint(min_letters, max_letters)
        count = rng.randint(1, length)
        letter = rng.choice(string.ascii_lowercase)
        others = string.ascii_lowercase.replace(letter, "")
        letters = [letter] * count + rng.choices(others, k=length - count)
        rng.shuffle(letters)
        yield Problem("".join(letters), letter)


def _dataset(problems: list[Problem]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [_prompt(problem) for problem in problems],
            "count": [problem.count for problem in problems],
        }
    )


def _prompt(problem: Problem) -> list[dict[str, str]]:
    return [{"role": "user", "content": _question(problem)}]


def _question(problem: Problem) -> str:
    return f"How many {problem.letter} are there in word {'-'.join(problem.word)}?"
