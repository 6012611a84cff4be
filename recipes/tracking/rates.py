"""Tokens a second over several steps: the sum of the tokens over the sum of the seconds.

Only some steps of a rollout sample. The rate of a single step is many times too high or too low, and so is the mean of
such rates; hence figures are of whole rollouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from recipes.tracking.speed import of_all

Record = dict[str, Any]


def rollouts(records: Iterable[Record]) -> list[list[Record]]:
    """The records of logged steps, a list for each that sampled and those up to the next that did."""
    found: list[list[Record]] = []
    for record in records:
        if "time" not in record:
            continue
        if not found or record["time"].get("generation"):
            found.append([])
        found[-1].append(record)
    return found


def together(records: Sequence[Record]) -> Record:
    """Some steps as one record: `tokens` and `speed` over all of them, at the last one's `step`."""
    found = {"step": records[-1]["step"], "tokens": tokens_of(records), "speed": of_all(records)}
    return {name: value for name, value in found.items() if value or name == "step"}


def tokens_of(records: Sequence[Record]) -> dict[str, float]:
    """Of a step `computed` and `real` tokens and `left_out_share`, as means, and real tokens `per_second`.

    Empty where TRL's step ran, which counts none.
    """
    counted = [record for record in records if record.get("tokens")]
    if not counted:
        return {}
    steps = [record.get("steps", 1) for record in counted]
    sums = {
        name: sum(n * record["tokens"].get(name, 0.0) for n, record in zip(steps, counted, strict=True))
        for name in counted[0]["tokens"]
    }
    seconds = sum(n * sum(record["time"].values()) for n, record in zip(steps, counted, strict=True))
    found = {name: total / sum(steps) for name, total in sums.items()}
    return found | ({"per_second": sums["real"] / seconds} if seconds else {})
