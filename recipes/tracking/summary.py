"""A run in a few figures, from the lines of its metrics.jsonl, and the tables of them that are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recipes.table import Table
from recipes.tracking.meters import HEADLINE, MEANING
from recipes.tracking.phases import PHASES
from recipes.tracking.rates import rollouts, tokens_of
from recipes.tracking.speed import TRAINING, WHOLE, of_all

_EVALUATED = ("accuracy", "pass@", "maj@")  # how the keys of an evaluation's figures begin
RATE, LEFT_OUT = "tokens a second", "completions left out"


def logged_steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of logged optimizer steps, without those of an evaluation alone.

    The reward may be null: NaN, where no reward function of the batch gave a value.
    """
    return [record for record in records if "reward" in record or "time" in record]


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the final table; a figure that was never measured is None.

    before and after: all figures of the evaluation before training, and of the last one. reward_first and reward_last:
    means over a tenth of the logged steps that have a reward (at least one), since a single batch says little. seconds:
    summed by phase over all steps. memory: MiB by phase and figure, the peak over the run. tokens: those of a step
    (computed, real), the share of completions left out and real tokens a second, over all steps, and over the rollouts
    of the first and last as above; empty where TRL's step ran. speed: as `recipes.tracking.speed.of_all` gives it.
    """
    logged = logged_steps(records)
    rewarded = [record for record in logged if record.get("reward") is not None]
    evaluations = [record for record in records if record.get("accuracy") is not None]
    before = _evaluation(evaluations[0]) if evaluations and evaluations[0]["step"] == 0 else {}
    after = _evaluation(evaluations[-1]) if evaluations and evaluations[-1]["step"] > 0 else {}
    few = max(1, len(rewarded) // 10)
    first, last = rewarded[:few], rewarded[-few:]
    seconds = dict.fromkeys(PHASES, 0.0)
    memory: dict[str, dict[str, float]] = {}
    for record in logged:
        for phase, value in (record.get("time") or {}).items():
            known = phase if phase in seconds else "other"  # another version of this source wrote it
            seconds[known] += value * record.get("steps", 1)
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
        "reward_first": mean([record["reward"] for record in first]),
        "reward_last": mean([record["reward"] for record in last]),
        "reward_window": few,
        "rewards_first": _means([record.get("rewards") or {} for record in first]),
        "rewards_last": _means([record.get("rewards") or {} for record in last]),
        "tokens": tokens_of(logged),
        "tokens_first": tokens_of(_of_rollouts(logged, first)),
        "tokens_last": tokens_of(_of_rollouts(logged, last)),
        "speed": of_all(logged),
        "seconds": {phase: value for phase, value in seconds.items() if value},
        "seconds_total": sum(seconds.values()),
        "memory": memory,
        "memory_figure": HEADLINE.get(device, HEADLINE["cpu"]),
        "device": device,
    }


def _evaluation(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key.startswith(_EVALUATED)}


def _of_rollouts(logged: list[dict[str, Any]], some: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every step of the rollouts that `some` of the logged steps belong to."""
    steps = {record["step"] for record in some}
    return [r for group in rollouts(logged) if any(r["step"] in steps for r in group) for r in group]


def _means(rows: list[dict[str, float | None]]) -> dict[str, float | None]:
    """The mean of each reward function over the rows that have its value."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: mean([value for row in rows if (value := row.get(name)) is not None]) for name in names}


def before_and_after(summary: dict[str, Any]) -> Table:
    """What was measured, before and after; an interval stands behind its figure.

    The evaluations first, then the reward and each of its functions over the first and the last steps.
    """
    before, after = summary["before"], summary["after"]
    names = [name for name in {**before, **after} if not name.endswith(("_interval", "_problems"))]
    rows = [
        (name.replace("_", ", "), _with_interval(before, name), _with_interval(after, name))
        for name in names or ["accuracy"]
    ]
    window = "reward, first and last tenth of the steps"
    rows.append((window, format_figure(summary["reward_first"]), format_figure(summary["reward_last"])))
    first, last = summary["rewards_first"], summary["rewards_last"]
    rows += [
        (f"  {name}", format_figure(first.get(name)), format_figure(last.get(name)))
        for name in {**first, **last}
    ]
    before, after = (tokens_in_words(summary[f"tokens_{end}"]) for end in ("first", "last"))
    rows += [(name, before.get(name, "–"), after.get(name, "–")) for name in {**before, **after}]
    return Table(("", "before", "after"), rows)


def tokens_in_words(tokens: dict[str, float | None]) -> dict[str, str]:
    """Of a record's or a summary's tokens the figures that are shown, by name; nothing of nothing."""
    rate, share = tokens.get("per_second"), tokens.get("left_out_share")
    real, computed = tokens.get("real"), tokens.get("computed")
    if rate is None or share is None or real is None or computed is None:
        return {}
    return {
        RATE: f"{rate:,.0f}",
        "tokens a step, real": f"{real:,.0f}",
        "tokens a step, computed": f"{computed:,.0f}",
        LEFT_OUT: f"{100 * share:.0f} %",
    }


def by_phase(summary: dict[str, Any]) -> Table:
    """Seconds, share of the time and every memory figure by phase; the device's headline figure comes first."""
    memory = summary["memory"]
    figures = sorted({figure for peaks in memory.values() for figure in peaks})
    figures.sort(key=lambda figure: figure != summary["memory_figure"])
    total = summary["seconds_total"] or 1.0
    rows = []
    for phase in (phase for phase in PHASES if phase in summary["seconds"]):
        seconds = summary["seconds"][phase]
        peaks = [format_mib(memory.get(phase, {}).get(figure)) for figure in figures]
        rows.append((phase, f"{seconds:.1f}", f"{100 * seconds / total:.0f} %", *peaks))
    highest = [format_mib(highest_peak(summary, figure)) for figure in figures]
    rows.append(("all", f"{summary['seconds_total']:.1f}", "", *highest))
    return Table(("phase", "seconds", "share", *(MEANING.get(figure, figure) for figure in figures)), rows)


def by_speed(summary: dict[str, Any]) -> Table | None:
    """Tokens a step and a second by phase, and the share of the device's matrix rate; None where none was counted."""
    speed = summary.get("speed") or {}
    rows = [
        (
            phase,
            _whole(figures.get("tokens")),
            _whole(figures.get("per_second")),
            percent(figures.get("share")),
        )
        for phase in ("generation", "scoring", TRAINING, WHOLE)
        if (figures := speed.get(phase))
    ]
    if not rows:
        return None
    rate = speed.get("rate")
    of = (
        "share of the matrix rate"
        if rate is None
        else f"share of {rate / 1e12:.3g} TFLOP/s, as measured here"
    )
    return Table(("phase", "tokens a step", "tokens a second", of), rows)


def percent(share: float | None) -> str:
    """Two digits below ten per cent, or a dash for what was not measured."""
    return "–" if share is None else f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def main_figures(runs: Sequence[tuple[str, dict[str, Any]]], title: str = "") -> Table:
    """The main figures of summaries by name, a column each. Memory has a row for each kind of figure."""
    columns = [_main_figures(summary) for _, summary in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name, "–") for column in columns)) for name in names]
    return Table(("", *(name for name, _ in runs)), rows, title)


def _main_figures(summary: dict[str, Any]) -> dict[str, str]:
    figure, steps = summary["memory_figure"], summary["steps"]
    return {
        "optimizer steps": str(steps),
        "accuracy before": format_figure(summary["accuracy_before"]),
        "accuracy after": format_figure(summary["accuracy_after"]),
        "reward, first tenth of the steps": format_figure(summary["reward_first"]),
        "reward, last tenth of the steps": format_figure(summary["reward_last"]),
        "training time": f"{summary['seconds_total']:.1f} s",
        "time a step": f"{summary['seconds_total'] / steps:.3f} s" if steps else "–",
        **tokens_in_words(summary["tokens"]),
        f"highest {MEANING[figure]}": format_mib(highest_peak(summary, figure)),
    }


def highest_peak(summary: dict[str, Any], figure: str) -> float | None:
    """The highest value of a memory figure over the phases, MiB; None if it was never measured."""
    return max((peaks[figure] for peaks in summary["memory"].values() if figure in peaks), default=None)


def _with_interval(figures: dict[str, Any], name: str) -> str:
    low, high = figures.get(f"{name}_interval") or (None, None)
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return format_figure(figures.get(name)) + interval


def format_figure(value: float | None) -> str:
    """Three decimals, or a dash for what was not measured."""
    return "–" if value is None else f"{value:.3f}"


def format_mib(value: float | None) -> str:
    """MiB in readable units, or a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value / 1024:.2f} GiB" if value >= 1024 else f"{value:.1f} MiB"


def mean(values: list[float]) -> float | None:
    """The mean, or None for no values."""
    return sum(values) / len(values) if values else None
