"""Accuracy on problems that training never sees: greedy, and with samples, in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from recipes.models.generation import Generate, Sampling
from recipes.training.accuracy import figures, sampled_figures

if TYPE_CHECKING:
    from recipes.config.load import RunConfig
    from recipes.tasks import Task

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What the model answered: one completion and one verdict for each row, in the order of the rows."""

    completions: list[str]
    correct: list[bool]

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0 to 1."""
        return sum(self.correct) / len(self.correct)


def evaluator(config: RunConfig, task: Task, generate: Generate) -> Callable[..., dict[str, Any]]:
    """A function that measures the held-out problems: the figures are a record for metrics.jsonl.

    They are the greedy accuracy and, with `run.evaluation.samples`, pass@k and maj@k, which `sampled=False` leaves out.
    The random state is left as it was, and every call draws from the same seed.
    """
    settings = config.run.evaluation
    rows: list[Row] = list(task.eval_dataset(config.task.options, config.run.seed))[: settings.size]
    length = config.completion_length

    def measure(*, sampled: bool = True) -> dict[str, Any]:
        started = time.perf_counter()
        greedy = evaluate(
            generate, rows, task.is_correct, max_new_tokens=length, batch_size=settings.batch_size
        )
        found: dict[str, Any] = figures(task, greedy.completions, rows)
        if sampled and settings.samples:
            drawn = Sampling(length, settings.samples, config.grpo["temperature"])
            batch_size = max(1, settings.batch_size // settings.samples)
            with torch.random.fork_rng():
                torch.manual_seed(config.run.seed)
                samples = complete(generate, rows, drawn, batch_size)
            found |= sampled_figures(task, samples, rows)
        seconds = time.perf_counter() - started
        return {**found, "accuracy_problems": len(rows), "evaluation_seconds": seconds}

    return measure


def evaluate(
    generate: Generate,
    rows: Iterable[Row],
    is_correct: Callable[[str, Row], bool],
    *,
    max_new_tokens: int,
    batch_size: int = 256,
) -> Evaluation:
    """Answer the "prompt" of every row greedily and let `is_correct(completion, row)` judge.

    The random state and the model's mode are left as they were. Raises ValueError if there are no rows.
    """
    kept = list(rows)
    if not kept:
        raise ValueError("rows: none given; evaluation needs at least one problem")
    completions = complete(generate, kept, Sampling(max_new_tokens), batch_size)
    firsts = [texts[0] for texts in completions]
    return Evaluation(firsts, [is_correct(text, row) for text, row in zip(firsts, kept, strict=True)])


def complete(generate: Generate, rows: list[Row], sampling: Sampling, batch_size: int) -> list[list[str]]:
    """`sampling.samples` completions for the "prompt" of each row, `batch_size` rows at a time."""
    completions: list[list[str]] = []
    for start in range(0, len(rows), batch_size):
        completions += generate([row["prompt"] for row in rows[start : start + batch_size]], sampling)
    return completions
