"""A run in a few figures, from the lines of its metrics.jsonl."""

from __future__ import annotations

from typing import Any

from recipes.tracking.meters import HEADLINE
from recipes.tracking.phases import PHASES

_EVALUATED = ("accuracy", "pass@", "maj@")  # how the keys of an evaluation's figures begin


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the final table; a figure that was never measured is None.

    before and after: all figures of the evaluation before training, and of the last one. reward first and last are
    means over a tenth of the logged steps (at least one), since one batch says little. seconds: summed by phase
    over all steps. memory: MiB by phase and figure, the peak over the run.
    """
    logged = [record for record in records if record.get("reward") is not None]
    evaluations = [record for record in records if record.get("accuracy") is not None]
    before = _evaluation(evaluations[0]) if evaluations and evaluations[0]["step"] == 0 else {}
    after = _evaluation(evaluations[-1]) if evaluations and evaluations[-1]["step"] > 0 else {}
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
        "accuracy_before": before.get("accuracy"),
        "accuracy_after": after.get("accuracy"),
        "before": before,
        "after": after,
        "reward_first": mean([record["reward"] for record in logged[:few]]),
        "reward_last": mean([record["reward"] for record in logged[-few:]]),
        "reward_window": few,
        "rewards_first": _means([record.get("rewards") or {} for record in logged[:few]]),
        "rewards_last": _means([record.get("rewards") or {} for record in logged[-few:]]),
        "seconds": {phase: value for phase, value in seconds.items() if value},
        "seconds_total": sum(seconds.values()),
        "memory": memory,
        "memory_figure": HEADLINE.get(device, HEADLINE["cpu"]),
        "device": device,
    }


def _evaluation(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key.startswith(_EVALUATED)}


def _means(rows: list[dict[str, float | None]]) -> dict[str, float | None]:
    """The mean of each reward function over the rows that have a value of it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: mean([value for row in rows if (value := row.get(name)) is not None]) for name in names}


def figures_before_and_after(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of a table: what was measured, before and after; an interval stands behind its figure.

    The evaluations first, then the reward and each of its functions over the first and the last steps.
    """
    before, after = summary["before"], summary["after"]
    names = [name for name in {**before, **after} if not name.endswith(("_interval", "_problems"))]
    rows = [
        (name.replace("_", ", "), _with_interval(before, name), _with_interval(after, name))
        for name in names or ["accuracy"]
    ]
    window = f"reward (mean of {summary['reward_window']} logged steps)"
    rows.append((window, format_figure(summary["reward_first"]), format_figure(summary["reward_last"])))
    first, last = summary["rewards_first"], summary["rewards_last"]
    return rows + [
        (f"  {name}", format_figure(first.get(name)), format_figure(last.get(name)))
        for name in {**first, **last}
    ]


def _with_interval(figures: dict[str, Any], name: str) -> str:
    low, high = figures.get(f"{name}_interval") or (None, None)
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return format_figure(figures.get(name)) + interval


def format_figure(value: float | None) -> str:
    """Three decimals, or a dash for what was not measured."""
    return "–" if value is None else f"{value:.3f}"


def mean(values: list[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None
