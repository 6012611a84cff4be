"""The tasks: each is a module of this folder with one subclass of `Task`; `task.name` in the YAML is the module's name.

    task = get_task("gsm8k")(options, seed)         made once per run: it keeps what it has read or drawn
    task.train[0]["prompt"]                         text, or chat messages
    task.is_correct(completion, task.held_out[0])   the verdict that accuracy counts

docs/tasks.md adds one, step by step.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from recipes.data import Column, Rows, hold_out, is_one_file, read_rows
from recipes.problems import ConfigError, Problem
from recipes.rewards.call import Reward, row_at
from recipes.rewards.contract import RewardOptions
from recipes.rewards.final_answer import text_of
from recipes.rewards.verdicts import judge_all

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]  # a row of a task's dataset
Example = tuple[Any, str]  # a prompt (text or chat messages) and a right completion


class Task(ABC):
    """Problems, and the judge of their answers. A subclass defines `train`, `held_out` and `is_correct`.

    The other members have a default. `weights`: how much each reward counts unless the YAML says otherwise.
    `characters`: every character of a prompt or a completion, where there are few; a model made from nothing can
    then have one token for each.
    """

    Options: ClassVar[type[RewardOptions]] = RewardOptions  # the keys beside `task.name` in the YAML
    weights: ClassVar[Mapping[str, float]] = {"correct": 1.0}
    characters: ClassVar[str] = ""

    options: RewardOptions
    seed: int

    def __init__(self, options: RewardOptions, seed: int) -> None:
        self.options, self.seed = options, seed

    @property
    def name(self) -> str:
        """The value of `task.name` in the YAML."""
        return type(self).__module__.rpartition(".")[2]

    @property
    @abstractmethod
    def train(self) -> Dataset:
        """Problems to train on: "prompt" (text or chat messages) and the columns that `is_correct` and rewards read.

        A `functools.cached_property`, like `held_out`: a run reads both several times.
        """

    @property
    @abstractmethod
    def held_out(self) -> Dataset:
        """The same for problems that training never sees."""

    @abstractmethod
    def is_correct(self, completion: str, row: Row) -> bool:
        """Whether the completion answers the row's problem correctly, in the form that was asked for."""

    def verdicts(self, completions: Sequence[str], rows: Sequence[Row]) -> list[bool]:
        """`is_correct` of an evaluation's completions, `completions[i]` answering `rows[i]`, within the time limits."""
        return judge_all(self.is_correct, completions, rows, self.options)

    def is_correct_lenient(self, completion: str, row: Row) -> bool | None:
        """Whether it is right in whatever form. Always None if the task has no such second verdict."""
        return None

    def answer_of(self, completion: str) -> Hashable | None:
        """What maj@k counts as a vote, None for no vote. By default the completion itself."""
        return completion.strip() or None

    @property
    def rewards(self) -> Mapping[str, Reward]:
        """The rewards by name: functions with TRL's signature (docs/rewards.md)."""
        return {"correct": self.correct}

    def correct(self, completions: list[Any], **columns: Any) -> list[float]:
        """Reward 1 for a completion that `is_correct`, else 0."""
        columns["prompt"] = columns.get("prompts")  # as the dataset's rows have it
        rows = [row_at(columns, index, len(completions)) for index in range(len(completions))]
        pairs = zip(completions, rows, strict=True)
        return [float(self.is_correct(text_of(completion), row)) for completion, row in pairs]

    def warm_start_examples(self, count: int) -> list[Example]:
        """`count` solved problems of `train`, for `run.warm_start`. Raises ConfigError if the task has none."""
        message = f"the task {self.name} has no examples for it"
        raise ConfigError([Problem("run.warm_start", message, remedy="set it to null")])

    def corpus(self) -> Iterable[str]:
        """Texts to train a tokenizer on, for `model.tokenizer: bpe`. By default the prompts of `train`."""
        return [text_of(prompt) for prompt in self.train["prompt"]]

    def prompt_of(self, question: str, example: Any) -> Any:
        """A question of somebody's in the form of `example`, a prompt of the task's rows.

        By default in place of the last message of a chat, or of the whole of a plain prompt.
        """
        if isinstance(example, str):
            return question
        return [*example[:-1], {**example[-1], "content": question}]

    @property
    def reward_weights(self) -> Mapping[str, float]:
        """The weights of this run: `task.rewards` in the YAML, or the task's own."""
        return self.weights if self.options.rewards is None else self.options.rewards


class RowsTask(Task):
    """A task of checked rows, some to train on and some held out."""

    @cached_property
    def train(self) -> Dataset:
        """The problems to train on, in an order by the seed."""
        return self._dataset(self._split[0])

    @cached_property
    def held_out(self) -> Dataset:
        """Those held out, in their own order where they are a split of their own."""
        return self._dataset(self._split[1])

    @property
    @abstractmethod
    def _split(self) -> tuple[Rows, Rows]:
        """Rows as (train, held out). To be kept: it is asked twice."""

    @abstractmethod
    def _dataset(self, rows: Rows) -> Dataset:
        """Rows as `train` and `held_out` have them."""


class SplitTask(RowsTask):
    """A task whose problems are read: from splits by any name, or from one file, of which some are held out."""

    class Options(RewardOptions):
        """The keys that say where the problems are."""

        dataset: str = Field(
            min_length=1, description="hub id; a folder with train.jsonl and test.jsonl; or one .jsonl file"
        )
        config: str | None = Field(
            None, description="the dataset's configuration on the hub; null: its only one"
        )
        train_split: str = Field("train", description="split to train on; of a folder, the file's name")
        eval_split: str | None = Field(
            "test", description="split to evaluate on; null: held out of the train split"
        )
        train_size: int | None = Field(None, ge=1, description="training problems at most; null: all")
        held_out: int = Field(
            500, ge=1, description="problems kept for evaluation where there is no evaluation split"
        )

    options: Options

    def read_splits(
        self, columns: Sequence[Column], same: Callable[[dict[str, Any]], Any]
    ) -> tuple[Rows, Rows]:
        """The rows to train on, shuffled by the seed, and those held out, in their own order if they are a split.

        same: what two rows of one problem have in common.
        """
        options = self.options
        train = self._read(options.train_split, columns)
        if options.eval_split is not None and not is_one_file(options.dataset):
            held_out = self._read(options.eval_split, columns)
        else:
            seed = f"{self.name} split {self.seed}"
            train, held_out = hold_out(train, options.held_out, seed, same)
        random.Random(f"{self.name} train {self.seed}").shuffle(train)
        return train[: options.train_size], held_out

    def _read(self, split: str, columns: Sequence[Column]) -> Rows:
        options = self.options
        without = "set task.eval_split: null to hold out some of the train split"
        return read_rows(
            options.dataset, split, options.config, columns, without * (split == options.eval_split)
        )


def is_whole(question: str, example: Any, system: str) -> bool:
    """Whether it begins with what a plain prompt such as `example` says before each question."""
    return isinstance(example, str) and bool(system) and question.lstrip().startswith(system.strip())


def task_names() -> list[str]:
    """The names that `task.name` may have."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_task(name: str) -> type[Task]:
    """The task's class. Raises ValueError for an unknown name."""
    if name not in task_names():
        raise ValueError(f"task.name: {name!r} is no task; use one of {', '.join(task_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    own = [thing for thing in vars(module).values() if _is_task_of(thing, module.__name__)]
    if len(own) != 1:
        raise ValueError(
            f"task.name: {module.__name__} defines {len(own)} subclasses of Task; define one there"
        )
    return own[0]


def _is_task_of(thing: Any, module: str) -> bool:
    """Whether it is a task that the module defines and not merely imports."""
    return isinstance(thing, type) and issubclass(thing, Task) and thing.__module__ == module
