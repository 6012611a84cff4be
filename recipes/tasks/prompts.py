"""Prompts of anybody's data, judged by rewards of the user's own.

    prompt      a column of the data: text, or chat messages of role and content; its other columns reach the rewards
    completion  whatever the rewards make of it
    right       the reward `task.correct` gives it `task.correct_at` at least

Everything that a task decides elsewhere is the user's here: there are no rewards but those that `task.rewards` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

from datasets import Dataset
from pydantic import Field, ValidationInfo, field_validator

from recipes.data import BadValue, Column, Rows, dataset_of, renamed, rounds, text
from recipes.problems import ConfigError, Problem
from recipes.rewards.call import Reward
from recipes.rewards.contract import ColumnNames, Weights, choose
from recipes.rewards.verdicts import rewarded
from recipes.tasks import Example, Row, SplitTask


class Columns(ColumnNames):
    """What the data's columns are called."""

    prompt: str = Field(
        "prompt", description="the data's column with the prompt: text, or a list of {role, content}"
    )
    solution: str | None = Field(
        None, description="that with a right completion, for run.warm_start; null: there is none"
    )


class Prompts(SplitTask):
    """The rows have the data's own columns beside their prompt."""

    class Options(SplitTask.Options):
        """The keys beside `task.name` in the YAML."""

        rewards: Weights = Field(
            description="functions of your own and their weights; {my_rewards.exact: 1.0} is exact in my_rewards.py, "
            "beside where you start the run"
        )
        correct: str | None = Field(
            None, description="the reward that says what counts as right; null: the first of task.rewards"
        )
        correct_at: float = Field(1.0, description="what that reward gives a right completion at least")
        columns: Columns = Field(
            default_factory=lambda: Columns(), description="what the data's columns are called"
        )
        prompt: Literal["chat", "plain"] = Field(
            "chat", description="a prompt that is text: as a user's chat message, or as it stands"
        )
        system_prompt: str = Field("", description="what is said before a prompt without a system message")

        @field_validator("correct")
        @classmethod
        def _is_a_reward(cls, name: str | None, given: ValidationInfo) -> str | None:
            if name is not None and name not in given.data.get("rewards", [name]):
                raise ValueError(
                    "is none of task.rewards; add it there, with weight 0 if it is only to judge"
                )
            return name

    options: Options
    weights: ClassVar[Mapping[str, float]] = {}

    @property
    def rewards(self) -> Mapping[str, Reward]:
        """None: all are the user's."""
        return {}

    def is_correct(self, completion: str, row: Row) -> bool:
        """Whether the reward that says so gives it enough."""
        return self.verdicts([completion], [row])[0]

    def verdicts(self, completions: Sequence[str], rows: Sequence[Row]) -> list[bool]:
        """The same for many: that reward is called with a batch of them at a time."""
        pairs = zip(completions, rows, strict=True)
        said = [
            answer if isinstance(row["prompt"], str) else [{"role": "assistant", "content": answer}]
            for answer, row in pairs
        ]
        ((name, function),) = self._judge.items()
        return rewarded(name, function, self.options.correct_at, said, rows, self.options)

    @cached_property
    def _judge(self) -> Mapping[str, Reward]:
        name = self.options.correct or next(iter(self.options.rewards))
        return choose({name: 1.0}, self.rewards)

    def warm_start_examples(self, count: int) -> list[Example]:
        """The train prompts with the data's own solutions; all come once before any is repeated."""
        if self.options.columns.solution is None:
            remedy = "name it in task.columns.solution, or set run.warm_start to null"
            raise ConfigError(
                [Problem("run.warm_start", "needs a column of right completions", remedy=remedy)]
            )
        solved = list(zip(self.train["prompt"], self.train["solution"], strict=True))
        return rounds(solved, count, f"prompts warm start {self.seed}")

    def corpus(self) -> list[str]:
        """The train prompts, and their solutions if the data has any."""
        return [*super().corpus(), *(self.train["solution"] if self.options.columns.solution else [])]

    def prompt_of(self, question: str, example: Any) -> Any:
        """With what is said before each of them, in a plain prompt, too, unless that is there already."""
        if not isinstance(example, str):
            return super().prompt_of(question, example)
        return question if question.startswith(self.options.system_prompt) else self._prompt(question)

    @cached_property
    def _split(self) -> tuple[Rows, Rows]:
        names = {name: source for name, source in self.options.columns.model_dump().items() if source}
        columns = [Column("prompt", self._prompt), Column("solution", text)]
        return self.read_splits(renamed([one for one in columns if one.name in names], names), _asked)

    def _dataset(self, rows: Rows) -> Dataset:
        if name := next((name for row in rows for name in ("image", "images") if row.get(name)), None):
            message, remedy = (
                f"has a column {name!r}, and what is trained here reads text alone",
                "take it out",
            )
            raise ConfigError([Problem("task.dataset", message, self.options.dataset, remedy)])
        return dataset_of(rows, {"prompt": [row["prompt"] for row in rows]})

    def _prompt(self, value: Any) -> Any:
        """The data's prompt as the model gets it. Raises BadValue for what is neither text nor chat messages."""
        system = self.options.system_prompt
        if self.options.prompt == "plain":
            if isinstance(value, list):
                raise BadValue(
                    "is a list, and task.prompt is plain", "write a text, or set task.prompt: chat"
                )
            return f"{system}\n\n{text(value)}" if system else text(value)
        said = _messages(value) if isinstance(value, list) else [{"role": "user", "content": text(value)}]
        if system and said[0]["role"] != "system":
            return [{"role": "system", "content": system}, *said]
        return said


def _asked(row: Row) -> Any:
    """What makes two prompts the same: all that is said, whatever the blanks around it."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt.strip()
    return tuple((message["role"], message["content"].strip()) for message in prompt)


def _messages(value: list[Any]) -> list[dict[str, str]]:
    """Chat messages that a model is to answer. Raises BadValue for anything else."""
    if not value:
        raise BadValue("is empty", "fill it in or take the row out")
    said = [_message(number, message) for number, message in enumerate(value, 1)]
    if said[-1]["role"] == "assistant":
        raise BadValue("ends in an answer", "take the last message out: it is what the model is to write")
    return said


def _message(number: int, value: Any) -> dict[str, str]:
    """One of them, without keys that hold nothing, as a table of several kinds of messages has."""
    found = {key: of for key, of in value.items() if of is not None} if isinstance(value, dict) else {}
    if set(found) != {"role", "content"}:
        raise BadValue(f"has no role and content alone in message {number}", "write {role: user, content: …}")
    try:
        return {key: text(found[key]) for key in ("role", "content")}
    except BadValue as error:
        raise BadValue(f"{error} in message {number}", error.remedy) from error
