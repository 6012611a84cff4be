"""Histograms of probability ratios, as shares of the tokens between fixed edges.

policy     new to old, before the loss clips it
sampler    trainer to vLLM, before the importance ratio is cut

A trainer logs a share for each bin (`ratios/policy/3`); metrics.jsonl has them as lists, and of steps at which vLLM's
mismatch was taken apart, `mismatch` (recipes.training.ratios).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

EDGES = (0.5, 0.8, 0.9, 0.95, 0.99, 1.01, 1.05, 1.1, 1.25, 2.0)
KINDS = ("policy", "sampler")
_RATIOS, _MISMATCH = "ratios/", "mismatch/"
PREFIXES = (_RATIOS, _MISMATCH)


def labels() -> list[str]:
    """Of the bins: below the first edge, between two, above the last."""
    inner = [f"{low:g}–{high:g}" for low, high in pairwise(EDGES)]
    return [f"< {EDGES[0]:g}", *inner, f"> {EDGES[-1]:g}"]


def as_metrics(kind: str, shares: Sequence[float]) -> dict[str, float]:
    """A trainer's metrics of one histogram."""
    return {f"{_RATIOS}{kind}/{number}": share for number, share in enumerate(shares)}


def from_logs(logs: Mapping[str, Any]) -> dict[str, Any]:
    """A record's `ratios` and `mismatch`, each where it was logged."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        shares = [logs.get(name) for name in as_metrics(kind, [0.0] * (len(EDGES) + 1))]
        if None not in shares:
            found.setdefault("ratios", {})[kind] = shares
    mismatch = {name.removeprefix(_MISMATCH): v for name, v in logs.items() if name.startswith(_MISMATCH)}
    return found | ({"mismatch": mismatch} if mismatch else {})


def outside(shares: Sequence[float], percent: int) -> float:
    """The share of tokens whose ratio is more than 1 or 10 per cent from 1."""
    low, high = {1: (0.99, 1.01), 10: (0.9, 1.1)}[percent]
    inside = range(EDGES.index(low) + 1, EDGES.index(high) + 1)
    return sum(shares) - sum(shares[number] for number in inside)
