"""A run in a few figures, from the lines of its metrics.jsonl."""

from __future__ import annotations

from typing import Any

from recipes.memory import HEADLINE
from recipes.phases import PHASES


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the final table; a figure that was never measured is None.

    reward first and last are means over a tenth of the logged steps (at least one), since one batch says
    little. seconds: summed by phase over all steps. memory: MiB by phase and figure, the peak over the run.
    """
    logged = [record for record in records if record.get("reward") is not None]
    accuracies = [(r["step"], r["accuracy"]) for r in records if r.get("accuracy") is not None]
    few = max(1, len(logged) // 10)
    seconds = dict.fromkeys(PHASES, 0.0)
    memory: dict[str, dict[str, float]] = {}
    for record in logged:
        for phase, value in (record.get("time") or {}).items():
            seconds[phase] += value * record.get("steps", 1)
        for phase, figures in (record.get("memory") or {}).items():
            peaks = memory.setdefault(phase, {})
            for figure, value in figures.items():
                peaks[figure] = max(peaks.get(figure, 0.0), value)
    device = logged[-1].get("device", "cpu") if logged else "cpu"
    return {
        "steps": logged[-1]["step"] if logged else 0,
        "accuracy_before": accuracies[0][1] if accuracies and accuracies[0][0] == 0 else None,
        "accuracy_after": accuracies[-1][1] if accuracies and accuracies[-1][0] > 0 else None,
        "reward_first": mean([record["reward"] for record in logged[:few]]),
        "reward_last": mean([record["reward"] for record in logged[-few:]]),
        "reward_window": few,
        "seconds": {phase: value for phase, value in seconds.items() if value},
        "seconds_total": sum(seconds.values()),
        "memory": memory,
        "memory_figure": HEADLINE.get(device, HEADLINE["cpu"]),
        "device": device,
    }


def mean(values: list[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None
