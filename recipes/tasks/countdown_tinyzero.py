"""Countdown for language models, as TinyZero set it: reach a target with three or four numbers and `+ - * /`.

    prompt      the numbers, the target and the form asked for: as chat messages, or as plain text ending in `<think>`
    completion  <think> … </think> <answer> (1 + 2) / 3 </answer>
    right       the answer uses every number exactly once and comes to the target, divided exactly

Problems are made from the seed, each by combining numbers 1-99 step by step, so that each has a solution; or they are
read: TinyZero's own are `dataset: Jiayi-Pan/Countdown-Tasks-3to4`, columns `nums` and `target`. No held-out problem is
trained on, in any order of its numbers. An answer is read by our own parser, never by `eval`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Self

from datasets import Dataset
from pydantic import Field, model_validator

from recipes.data import (
    BadValue,
    Column,
    Rows,
    dataset_of,
    hold_out,
    kind_of,
    read_rows,
    renamed,
    whole_number,
)
from recipes.rewards.arithmetic import Expression, ExpressionError, parse
from recipes.rewards.contract import ColumnNames, Reward, RewardOptions
from recipes.rewards.final_answer import answer_tag, boxed, text_of
from recipes.tasks import Row, RowsTask

TARGETS = range(10, 100)  # of the problems made here
MADE = 8192  # training problems made here, unless task.train_size says otherwise

_PROBLEM = (
    "Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic operations "
    "(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the "
    "final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
)
_PLAIN = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
    "User: {problem}\nAssistant: Let me solve this step by step.\n<think>"
)
_SYSTEM = (
    "You are a helpful assistant. You first think about the reasoning process in the mind and then provide the user "
    "with the answer."
)
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


class Columns(ColumnNames):
    """What the data's columns are called."""

    nums: str = Field("nums", description="the data's column with the list of numbers")
    target: str = Field("target", description="that with the number to reach")


class TinyZero(RowsTask):
    """The rows have `nums` (list of int) and `target` (int) beside their prompt."""

    class Options(RewardOptions):
        """The keys beside `task.name` in the YAML."""

        dataset: str | None = Field(
            None,
            min_length=1,
            description="hub id, folder or file with columns nums and target; null: problems made by the seed",
        )
        config: str | None = Field(
            None, description="the dataset's configuration on the hub; null: its only one"
        )
        columns: Columns = Field(
            default_factory=lambda: Columns(), description="what the data's columns are called"
        )
        prompt: Literal["chat", "plain"] = Field(
            "chat", description="chat messages; or TinyZero's plain text for models that know no chat"
        )
        min_numbers: int = Field(3, ge=3, le=6, description="numbers of a made problem at least")
        max_numbers: int = Field(4, ge=3, le=6, description="numbers of a made problem at most")
        train_size: int | None = Field(
            None,
            ge=1,
            description=f"training problems at most; null: all of the dataset, or {MADE} made ones",
        )
        held_out: int = Field(512, ge=1, description="problems kept for evaluation")

        @model_validator(mode="after")
        def _at_least_below_at_most(self) -> Self:
            if self.min_numbers > self.max_numbers:
                raise ValueError(
                    f"min_numbers {self.min_numbers} is more than max_numbers {self.max_numbers}; lower it"
                )
            return self

    options: Options
    weights = {"correct": 1.0, "format": 0.1}

    @property
    def rewards(self) -> Mapping[str, Reward]:
        """The right answer, and the form asked for."""
        return {"correct": self.correct, "format": format}

    def is_correct(self, completion: str, row: Row) -> bool:
        """Whether the last answer tag holds an expression, and only that, which solves the problem."""
        return _solves(_read(answer_tag(completion)), row)

    def is_correct_lenient(self, completion: str, row: Row) -> bool:
        r"""Whether the answer tag, else `\boxed{…}`, else the last line solves it, "= target" behind it or not."""
        lines = completion.strip().splitlines()
        found = answer_tag(completion) or boxed(completion) or (lines[-1] if lines else "")
        for latex, plain in ((r"\times", "*"), (r"\cdot", "*"), (r"\div", "/")):
            found = found.replace(latex, plain)
        return _solves(_read(found.partition("=")[0]), row)

    def answer_of(self, completion: str) -> str | None:
        """The expression without blanks, None if it is none."""
        tag = answer_tag(completion)
        return "".join(tag.split()) if tag is not None and _read(tag) is not None else None

    @cached_property
    def _split(self) -> tuple[Rows, Rows]:
        """Problems as (train, held out), none of them in both."""
        options = self.options
        if options.dataset is None:
            problems = _made(options.min_numbers, options.max_numbers, f"countdown_tinyzero {self.seed}")
            held_out = [next(problems) for _ in range(options.held_out)]
            return [next(problems) for _ in range(options.train_size or MADE)], held_out
        # TinyZero's data has this split alone.
        columns = renamed(COLUMNS, options.columns.model_dump())
        rows = read_rows(options.dataset, "train", options.config, columns)
        train, held_out = hold_out(rows, options.held_out, f"countdown_tinyzero split {self.seed}", _key)
        return train[: options.train_size], held_out

    def _dataset(self, rows: Rows) -> Dataset:
        return dataset_of(
            rows,
            {
                "prompt": [self._prompt(row) for row in rows],
                "nums": [list(row["nums"]) for row in rows],
                "target": [row["target"] for row in rows],
            },
        )

    def _prompt(self, row: Row) -> Any:
        problem = _PROBLEM.format(numbers=list(row["nums"]), target=row["target"])
        if self.options.prompt == "plain":
            return _PLAIN.format(problem=problem)
        return [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": problem},
        ]


def _whole_numbers(value: Any) -> list[int]:
    """A list of them. Raises BadValue for anything else."""
    remedy = "write a list of whole numbers, such as [3, 5, 7]"
    if not isinstance(value, list):
        raise BadValue(f"is {kind_of(value)}", remedy)
    if not value:
        raise BadValue("is empty", remedy)
    try:
        return [whole_number(item) for item in value]
    except BadValue as error:
        raise BadValue(f"holds what {error}", remedy) from error


COLUMNS = (Column("nums", _whole_numbers), Column("target", whole_number))


def _key(row: Row) -> tuple[Any, ...]:
    """What makes two problems the same: the numbers in any order, and the target."""
    return (*sorted(row["nums"]), row["target"])


def _made(min_numbers: int, max_numbers: int, seed: str) -> Iterator[dict[str, Any]]:
    """An endless stream of different problems; with three numbers there are hundreds of thousands."""
    rng = random.Random(seed)
    seen = set()
    while True:
        numbers = [rng.randint(1, 99) for _ in range(rng.randint(min_numbers, max_numbers))]
        row = {"nums": numbers, "target": _put_together(numbers, rng)}
        if row["target"] in TARGETS and _key(row) not in seen:
            seen.add(_key(row))
            yield row


def _put_together(numbers: Sequence[int], rng: random.Random) -> int:
    """The result of combining two random numbers at a time, in which every step is a whole number of at least 0."""
    values = list(numbers)
    while len(values) > 1:
        rng.shuffle(values)
        a, b = max(values[-2:]), min(values[-2:])
        ways = [a + b, a - b, a * b] + ([a // b] if b and a % b == 0 else [])
        values[-2:] = [rng.choice(ways)]
    return values[0]


def _read(text: str | None) -> Expression | None:
    """The text as an expression, None if it is not one."""
    try:
        return None if text is None else parse(text.translate(_SIGNS), division=True)
    except ExpressionError:
        return None


def _solves(expression: Expression | None, row: Row) -> bool:
    return (
        expression is not None
        and sorted(expression.numbers) == sorted(row["nums"])
        and expression.value == row["target"]
    )


_INSIDE = r"(?:(?!</?(?:think|answer)>).)*"  # no tag again inside a part
_FORM = re.compile(rf"\s*<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>\s*", re.DOTALL)


def format(completions: list[Any], prompts: list[Any], **_: Any) -> list[float]:
    """1 for both parts in their tags and nothing else; a plain prompt has opened `<think>` already."""
    pairs = zip(completions, prompts, strict=True)
    texts = ["<think>" * isinstance(prompt, str) + text_of(completion) for completion, prompt in pairs]
    return [float(_FORM.fullmatch(text) is not None) for text in texts]
