"""A run in progress, as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recipes.config.load import RunConfig
from recipes.models.precision import Precision
from recipes.plan.plan import Plan
from recipes.tasks import Task
from recipes.tracking.run_folder import RunFolder
from recipes.training.rewards import Rewards


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Session:
    """A run that has begun or been resumed: everything that training needs."""

    config: RunConfig
    task: Task
    rewards: Rewards
    folder: RunFolder
    arguments: Any  # the run's GRPOConfig
    model: Any
    tokenizer: Any
    planned: Plan | None = None  # also of a model that cannot be counted

    @property
    def precision(self) -> Precision:
        """The precision in which everything of this run computes."""
        return Precision.of(self.arguments)


@dataclass(frozen=True)
class Trained:
    """Where the training ended."""

    trainer: Any
    tracker: Any
    saved: bool  # every step taken, and the model is in final/
    finished: bool  # every step taken, the model saved and evaluated
