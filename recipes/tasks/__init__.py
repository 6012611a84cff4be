"""The tasks. Each is one module of this folder; `task.name` in the YAML is the module's name.

A task module has

    Options                        pydantic model, extra="forbid": the keys beside `task.name` in the YAML
    train_dataset(options, seed)   datasets.Dataset with a "prompt" (text, or chat messages) and answer columns
    eval_dataset(options, seed)    the same for problems that training never sees
    rewards                        {name: function(completions, **columns) -> list of float}, TRL's signature
    is_correct(completion, row)    the verdict that accuracy counts; `row` is a row of the dataset

and may have

    WEIGHTS                                      {name: weight} of its rewards, unless the YAML says otherwise
    is_correct_lenient(completion, row)          a second verdict: right, whatever the form
    answer_of(completion)                        what maj@k counts votes for, None without an answer
    warm_start_examples(options, seed, count)    pairs (prompt, right completion), for `run.warm_start`
    CHARACTERS                                   every character of a prompt or a completion; or
    corpus(options, seed)                        texts to train a BPE tokenizer on: one of the two makes
                                                 `model.loader: scratch` possible

Chat tasks get completions as lists of messages in their rewards, as TRL passes them, and `is_correct` gets text.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

from pydantic import BaseModel

if TYPE_CHECKING:
    from datasets import Dataset


class Task(Protocol):
    """What `train_grpo.py` asks of a task's module."""

    Options: type[BaseModel]
    rewards: dict[str, Callable[..., list[float]]]

    def train_dataset(self, options: Any, seed: int) -> Dataset: ...  # noqa: D102

    def eval_dataset(self, options: Any, seed: int) -> Dataset: ...  # noqa: D102

    def is_correct(self, completion: str, row: dict[str, Any]) -> bool: ...  # noqa: D102


def task_names() -> list[str]:
    """The names that `task.name` may have."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_task(name: str) -> Task:
    """The task's module. Raises ValueError for a name that is none."""
    if name not in task_names():
        raise ValueError(f"task.name: {name!r} is no task; use one of {', '.join(task_names())}")
    return cast(Task, importlib.import_module(f"{__name__}.{name}"))
