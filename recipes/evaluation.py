"""Accuracy on problems that training never sees: greedy, in batches."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from recipes.generation import Generate, Sampling

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
