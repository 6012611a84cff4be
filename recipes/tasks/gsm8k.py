"""GSM8K: grade-school word problems whose answer is one number.

    prompt      the format asked for, and the question: as chat messages, or as plain text
    completion  <reasoning> … </reasoning> <answer> 18 </answer>, a tag per line
    right       the one number in the answer tag equals the number after `####` in the data

The rewards return shares of 1; their weights stand in the YAML under `task.rewards`. The defaults are those of
Unsloth's Llama3.1_(8B)-GRPO notebook, but reasoning of several lines counts as well-formed here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from recipes.data import (
    BadValue,
    Column,
    Rows,
    dataset_of,
    hold_out,
    is_one_file,
    read_rows,
    renamed,
    rounds,
    text,
)
from recipes.rewards.contract import ColumnNames, Reward, RewardOptions
from recipes.rewards.final_answer import lenient_answer, numbers, strict_answer, text_of
from recipes.rewards.latex import gold_text
from recipes.tasks import Example, Row, Task, is_whole

SYSTEM_PROMPT = """\
Write your reply in exactly this form:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""


class Columns(ColumnNames):
    """What the data's columns are called."""

    question: str = Field("question", description="the data's column with the question")
    answer: str = Field(
        "answer", description="that with the answer: one number, or a solution that ends in #### and one"
    )


class Gsm8k(Task):
    """The rows have `answer` beside their prompt: the number after `####`, as the data writes it."""

    class Options(RewardOptions):
        """The keys beside `task.name` in the YAML."""

        dataset: str = Field(
            "openai/gsm8k",
            min_length=1,
            description="hub id; or a folder with train.jsonl and test.jsonl, or one .jsonl file",
        )
        config: str | None = Field(
            "main", description="the dataset's configuration on the hub; null: its only one"
        )
        columns: Columns = Field(
            default_factory=lambda: Columns(), description="what the data's columns are called"
        )
        prompt: Literal["chat", "plain"] = Field("chat", description="chat messages, or plain text")
        system_prompt: str = Field(SYSTEM_PROMPT, description="what is said before the question")
        train_size: int | None = Field(None, ge=1, description="training problems at most; null: all")
        held_out: int = Field(
            512,
            ge=1,
            description="problems kept for evaluation where the dataset is one file, with no test set",
        )

    options: Options
    weights = {
        "tag_count": 0.5,  # 4 × 0.125, less 0.001 for each character after the last tag
        "soft_format": 0.5,
        "strict_format": 0.5,
        "integer": 0.5,
        "correctness": 2.0,
    }

    @cached_property
    def train(self) -> Dataset:
        """The train problems, shuffled by the seed."""
        rows, _ = self._split
        return self._dataset([rows[place] for place in self._drawn])

    @cached_property
    def held_out(self) -> Dataset:
        """The test problems in their own order, so that the first n are the same in every run."""
        return self._dataset(self._split[1])

    @property
    def rewards(self) -> Mapping[str, Reward]:
        """Four for the form and one for the answer."""
        return {
            "tag_count": tag_count,
            "soft_format": soft_format,
            "strict_format": strict_format,
            "integer": integer,
            "correctness": self.correct,
        }

    def is_correct(self, completion: str, row: Row) -> bool:
        """Whether the answer tag holds the right number, and only that."""
        return strict_answer(completion) == _gold(row["answer"])

    def is_correct_lenient(self, completion: str, row: Row) -> bool:
        """Whether the number that a reader would take for the answer is right, whatever the form."""
        return _gold(row["answer"]) in (strict_answer(completion), lenient_answer(completion))

    def answer_of(self, completion: str) -> Fraction | None:
        """The number in the answer tag."""
        return strict_answer(completion)

    def warm_start_examples(self, count: int) -> list[Example]:
        """Train problems with the data's own solution as the reasoning; all come once before any is repeated."""
        drawn = rounds(self._solved, count, f"gsm8k warm start {self.seed}")
        return [(self._prompt(row["question"]), solution_text(row["answer"])) for row in drawn]

    def corpus(self) -> list[str]:
        """The system prompt, and the train questions with their solutions in the form asked for."""
        texts = [text for row in self._solved for text in (row["question"], solution_text(row["answer"]))]
        return [self.options.system_prompt, *texts]

    def prompt_of(self, question: str, example: Any) -> Any:
        """With what is said before each of them, in a plain prompt, too, unless that is there already."""
        return question if is_whole(question, example, self.options.system_prompt) else self._prompt(question)

    @cached_property
    def _split(self) -> tuple[Rows, Rows]:
        """All rows as (train, held out). Raises ConfigError or ValueError, with what to do about it."""
        rows = self._read("train")
        if is_one_file(self.options.dataset):
            seed = f"gsm8k split {self.seed}"
            return hold_out(rows, self.options.held_out, seed, lambda row: row["question"].strip())
        return rows, self._read("test")

    def _read(self, split: str) -> Rows:
        columns = renamed(COLUMNS, self.options.columns.model_dump())
        return read_rows(self.options.dataset, split, self.options.config, columns)

    @cached_property
    def _drawn(self) -> list[int]:
        """Which of the train rows are trained on, in the order of `train`."""
        places = list(range(len(self._split[0])))
        random.Random(f"gsm8k train {self.seed}").shuffle(places)
        return places[: self.options.train_size]

    @property
    def _solved(self) -> Rows:
        """The rows of `train` with their solutions, in the data's order: the draws from them depend on it."""
        return [self._split[0][place] for place in sorted(self._drawn)]

    def _dataset(self, rows: Rows) -> Dataset:
        return dataset_of(
            rows,
            {
                "prompt": [self._prompt(row["question"]) for row in rows],
                "answer": [_number(row["answer"]) for row in rows],
            },
        )

    def _prompt(self, question: str) -> Any:
        system = self.options.system_prompt
        if self.options.prompt == "plain":
            return f"{system}\n{question.strip()}\n"
        said = [{"role": "system", "content": system}] if system else []
        return [*said, {"role": "user", "content": question}]


def solution_text(answer: str) -> str:
    """A solution of the data in the form that is asked for, without its `<<…>>` calculator notes."""
    reasoning = re.sub(r"<<.*?>>", "", answer.rpartition("####")[0]).strip()
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{_number(answer)}\n</answer>\n"


def _number(answer: str) -> str:
    """What the data writes after its `####`, or all of it where there is none."""
    return answer.rpartition("####")[2].strip()


def _solution(value: Any) -> str:
    """A solution that ends in one number, or that number alone, as text. Raises BadValue for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            answer = gold_text(value)
        except ValueError as error:
            raise BadValue(str(error), "correct it or take the row out") from error
    elif isinstance(value, list):
        raise BadValue("is a list", "write the number as text")
    else:
        answer = text(value)
    if len(numbers(_number(answer))) != 1:
        raise BadValue("ends in no number, or in several", "correct it, as in: 2 + 2 = 4 #### 4")
    return answer


COLUMNS = (Column("question", text), Column("answer", _solution))


def _gold(answer: str) -> Fraction:
    """The data's answer as a number."""
    (found,) = numbers(answer)
    return found


def integer(completions: list[Any], **_: Any) -> list[float]:
    """1 for a whole number in the answer tag."""
    found = (strict_answer(text_of(completion)) for completion in completions)
    return [float(number is not None and number.denominator == 1) for number in found]


_INSIDE = r"(?:(?!</?(?:reasoning|answer)>).)*"  # no tag again inside a part
_STRICT = re.compile(rf"<reasoning>\n{_INSIDE}\n</reasoning>\n<answer>\n{_INSIDE}\n</answer>\n?", re.DOTALL)
_SOFT = re.compile(rf"\s*<reasoning>{_INSIDE}</reasoning>\s*<answer>{_INSIDE}</answer>", re.DOTALL)


def strict_format(completions: list[Any], **_: Any) -> list[float]:
    """1 if the completion has exactly the form asked for: each tag on its own line, nothing after."""
    return [float(_STRICT.fullmatch(text_of(completion)) is not None) for completion in completions]


def soft_format(completions: list[Any], **_: Any) -> list[float]:
    """1 if it begins with both parts, each with its tags, whatever the line breaks and whatever follows."""
    return [float(_SOFT.match(text_of(completion)) is not None) for completion in completions]


def tag_count(completions: list[Any], **_: Any) -> list[float]:
    """A quarter for each tag that occurs once, on its own line; less 0.002 per character after the last."""
    return [_tags(text_of(completion)) for completion in completions]


def _tags(text: str) -> float:
    lines = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    _, closed, after = text.rpartition("</answer>")
    trailing = len(after.removeprefix("\n")) if closed else 0
    return 0.25 * sum(text.count(line) == 1 for line in lines) - 0.002 * trailing
