r"""Mathematics with a LaTeX answer: any dataset that has a column of problems and a column of answers.

    prompt      the problem, and the request for a final `\boxed{…}`
    right       math-verify finds the boxed answer equal to the known one: 1/2, 0.5 and \frac{1}{2} are equal

A comparison has a time limit and its own process (recipes/rewards/math_verifier.py); past the limit it has no verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from recipes.data import (
    BadValue,
    Column,
    Rows,
    dataset_of,
    kind_of,
    renamed,
    text,
)
from recipes.rewards.call import Reward
from recipes.rewards.contract import MAX_SECONDS, ColumnNames
from recipes.rewards.final_answer import boxed, boxes, text_of
from recipes.rewards.latex import MAX_ANSWER, gold_text, parts
from recipes.rewards.math_verifier import Verifier
from recipes.tasks import Row, SplitTask, is_whole

SYSTEM_PROMPT = r"Reason step by step and put the final answer, and nothing else, into \boxed{}."
VERIFY_SECONDS = 3.0  # for one comparison; ordinary ones take milliseconds


class Columns(ColumnNames):
    """What the data's columns are called."""

    problem: str = Field("problem", description="the data's column with the problem")
    answer: str = Field(
        "answer", description="that with the final answer in LaTeX, or with a text that has it boxed"
    )


class Math(SplitTask):
    """The rows have `answer` beside their prompt: LaTeX, out of its box."""

    class Options(SplitTask.Options):
        """The keys beside `task.name` in the YAML."""

        reward_seconds: float = Field(
            300.0, gt=0, le=MAX_SECONDS, description="time limit of one call of a reward function"
        )
        columns: Columns = Field(
            default_factory=lambda: Columns(), description="what the data's columns are called"
        )
        prompt: Literal["chat", "plain"] = Field("chat", description="chat messages, or plain text")
        system_prompt: str = Field(SYSTEM_PROMPT, description="what is said before the problem")

    options: Options
    weights = {"correctness": 1.0, "boxed_once": 0.1}

    @property
    def rewards(self) -> Mapping[str, Reward]:
        """The answer, and its one box."""
        return {"correctness": self.correctness, "boxed_once": boxed_once}

    def is_correct(self, completion: str, row: Row) -> bool:
        r"""Whether the last `\boxed{…}` equals the answer. No verdict in time counts as wrong."""
        return self._same(completion, row["answer"]) is True

    def is_correct_lenient(self, completion: str, row: Row) -> bool:
        """Whether the final answer that math-verify finds, boxed or not, equals the answer."""
        return self._verifier.same(row["answer"], completion) is True

    def answer_of(self, completion: str) -> str | None:
        """The content of the last box as it is written: 1/2 and 0.5 are different votes."""
        return boxed(completion)

    def correctness(self, completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
        """1 for a boxed answer equal to the known one; None where the comparison ran out of time."""
        pairs = zip(completions, answer, strict=True)
        verdicts = [self._same(text_of(completion), gold) for completion, gold in pairs]
        return [None if same is None else float(same) for same in verdicts]

    def _same(self, completion: str, gold: str) -> bool | None:
        """Whether the last box equals the known answer, False without a box, None without a verdict in time."""
        found = boxed(completion)
        return self._verifier.same_answer(gold, found) if found is not None else False

    @cached_property
    def _verifier(self) -> Verifier:
        return Verifier(VERIFY_SECONDS)

    def prompt_of(self, question: str, example: Any) -> Any:
        """With what is said before each of them, in a plain prompt, too, unless that is there already."""
        return question if is_whole(question, example, self.options.system_prompt) else self._prompt(question)

    @cached_property
    def _split(self) -> tuple[Rows, Rows]:
        columns = renamed(COLUMNS, self.options.columns.model_dump())
        return self.read_splits(columns, lambda row: row["problem"].strip())

    def _dataset(self, rows: Rows) -> Dataset:
        return dataset_of(
            rows,
            {
                "prompt": [self._prompt(row["problem"]) for row in rows],
                "answer": [row["answer"] for row in rows],
            },
        )

    def _prompt(self, problem: str) -> Any:
        system = self.options.system_prompt
        if self.options.prompt == "plain":
            return f"{system}\n\n{problem.strip()}\n"
        said = [{"role": "system", "content": system}] if system else []
        return [*said, {"role": "user", "content": problem}]


def _gold(value: Any) -> str:
    """The answer that a row gives, out of its box. Raises BadValue for what is none."""
    if value is None:
        raise BadValue("is null", "fill it in or take the row out")
    if isinstance(value, list):
        raise BadValue("is a list", "write one text, such as 1, 2")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadValue(f"is {kind_of(value)}", "write the answer as text or as a number")
    try:
        answer = gold_text(value)
    except ValueError as error:
        raise BadValue(str(error), "write the answer as text or as a number") from error
    found = boxed(answer)
    if (found is None and boxes(answer)) or not parts(text(answer)):  # an empty box, $$: nothing equals it
        raise BadValue("holds no answer", "write it out or take the row out")
    if len(found or answer) > MAX_ANSWER:
        remedy = (
            r"name the column that holds it in task.columns.answer, put it into \boxed{}, or take the row out"
        )
        raise BadValue(f"has {len(found or answer):,} characters, and no final answer has", remedy)
    return found or answer


COLUMNS = (Column("problem", text), Column("answer", _gold))


def boxed_once(completions: list[Any], **_: Any) -> list[float]:
    r"""1 for exactly one `\boxed{…}`."""
    texts = [text_of(completion) for completion in completions]
    return [float(len(boxes(text)) == 1 and boxed(text) is not None) for text in texts]
