"""Figures of an evaluation: accuracy strict and lenient with their intervals, pass@k and maj@k.

greedy                     one completion a problem
pass@k                     the chance that one of k sampled completions is right, unbiased over n >= k samples
maj@k                      whether the answer given most often among the first k is right
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

Z_95 = 1.959963984540054  # a normal variable lies within this many deviations with probability 0.95


def wilson(right: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's interval for a share: holds near 0 and 1 and for few problems. Raises ValueError for none.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"right, total: {right} of {total}; give 0 <= right <= total and at least one")
    share, unit = right / total, z * z / total
    middle = (share + unit / 2) / (1 + unit)
    half = z / (1 + unit) * math.sqrt(share * (1 - share) / total + unit / (4 * total))
    # At the ends the interval touches 0 or 1 exactly; rounding would leave a hair.
    return 0.0 if right == 0 else middle - half, 1.0 if right == total else middle + half


def pass_at_k(right: int, samples: int, k: int) -> float:
    """1 - C(samples - right, k) / C(samples, k). Raises ValueError unless 1 <= k <= samples.

    M. Chen et al., Evaluating large language models trained on code, 2021.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k: {k} of {samples} samples; give 1 <= k <= samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[Hashable | None]) -> int | None:
    """The place of the first of the answers given most often, None if none was given. Ties go to the earlier one."""
    given = [answer for answer in answers if answer is not None]
    return answers.index(max(given, key=given.count)) if given else None


def figures(
    task: Any, completions: Sequence[str], rows: Sequence[dict[str, Any]]
) -> dict[str, float | list[float]]:
    """Accuracy of greedy completions, as keys of metrics.jsonl: `accuracy`, its 95 % interval, and both lenient."""
    found: dict[str, float | list[float]] = {}
    judges: dict[str, Callable[[str, Any], bool]] = {"accuracy": task.is_correct}
    if hasattr(task, "is_correct_lenient"):
        judges["accuracy_lenient"] = task.is_correct_lenient
    for name, judge in judges.items():
        right = sum(judge(text, row) for text, row in zip(completions, rows, strict=True))
        found[name] = right / len(rows)
        found[f"{name}_interval"] = list(wilson(right, len(rows)))
    return found


def sampled_figures(
    task: Any, samples: Sequence[Sequence[str]], rows: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """pass@k and maj@k of `samples[i]`, k completions for `rows[i]`. maj@k if the task has `answer_of(completion)`."""
    k = len(samples[0])
    verdicts = [
        [task.is_correct(text, row) for text in texts] for texts, row in zip(samples, rows, strict=True)
    ]
    found = {
        "pass@1": sum(pass_at_k(sum(right), k, 1) for right in verdicts) / len(rows),
        f"pass@{k}": sum(pass_at_k(sum(right), k, k) for right in verdicts) / len(rows),
    }
    if hasattr(task, "answer_of"):
        places = [majority([task.answer_of(text) for text in texts]) for texts in samples]
        right = [
            place is not None and verdict[place] for place, verdict in zip(places, verdicts, strict=True)
        ]
        found[f"maj@{k}"] = sum(right) / len(rows)
    return found
