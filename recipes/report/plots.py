"""The pictures of a run: reward, accuracy and memory over the steps, for one run or several laid over each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.report.svg import smooth
from recipes.tracking.meters import HEADLINE, MEANING
from recipes.tracking.phases import PHASES

Records = list[dict[str, Any]]
_COLOURS = ("#1f5fa8", "#d1682a", "#3a8a4d", "#8a4f9e", "#b03a48", "#777777")
_STYLE: Any = {
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 130,
}


def plot_run(records: Records, title: str, path: Path) -> Path:
    """One run: reward, accuracy, and peak memory by phase. Returns the path of the PNG."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        reward, accuracy, memory = figure.subplots(1, 3)
        _draw_reward(reward, records, _COLOURS[0], band=True)
        _draw_accuracy(accuracy, records, _COLOURS[0])
        _draw_memory_by_phase(memory, records)
        _finish(figure, title, (reward, accuracy, memory))
        figure.savefig(path)
    return path


def plot_overlay(runs: dict[str, Records], path: Path) -> Path:
    """Several runs by name: reward, accuracy and the highest peak of each step. Returns the path of the PNG."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        reward, accuracy, memory = figure.subplots(1, 3)
        for colour, (name, records) in zip(_COLOURS, runs.items(), strict=False):
            _draw_reward(reward, records, colour, label=name)
            _draw_accuracy(accuracy, records, colour)
            steps, peaks = highest_peaks(records)
            memory.plot(
                steps,
                peaks,
                color=colour,
                marker=".",
                markersize=4,
                linewidth=1,
                label=_figure_title(records),
            )
        kinds = dict.fromkeys(map(_figure_title, runs.values()))
        memory.set_title(f"memory: {next(iter(kinds))}" if len(kinds) == 1 else "memory")
        if len(kinds) > 1:
            memory.legend(loc="best")
        memory.set_ylabel("MiB")
        reward.legend(loc="best")
        _finish(figure, " against ".join(runs), (reward, accuracy, memory))
        figure.savefig(path)
    return path


def _draw_reward(
    axes: Axes, records: Records, colour: str, *, band: bool = False, label: str = "mean"
) -> None:
    """The mean reward of each step, smoothed over it, and one standard deviation around."""
    logged = [record for record in records if record.get("reward") is not None]
    steps = [record["step"] for record in logged]
    rewards = [record["reward"] for record in logged]
    axes.plot(steps, rewards, color=colour, linewidth=0.8, alpha=0.35)
    named = f" {label}" if label.startswith("_") else label  # matplotlib leaves such a name out of the legend
    axes.plot(steps, smooth(rewards), color=colour, linewidth=1.8, label=named)
    if band and logged:
        spread = [record.get("reward_std") or 0.0 for record in logged]
        low, high = (
            smooth([r - s for r, s in zip(rewards, spread, strict=True)]),
            smooth([r + s for r, s in zip(rewards, spread, strict=True)]),
        )
        axes.fill_between(steps, low, high, color=colour, alpha=0.1, linewidth=0, label="± one deviation")
        axes.legend(loc="best")
    axes.set_title("reward")


def _draw_accuracy(axes: Axes, records: Records, colour: str) -> None:
    """The measured accuracies, each with its value."""
    points = [(r["step"], r["accuracy"]) for r in records if r.get("accuracy") is not None]
    axes.set_title("accuracy on held-out problems")
    axes.set_ylim(0, 1)
    if not points:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")
        return
    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.5)
    for step, value in (points[0], points[-1]):
        axes.annotate(f"{value:.3f}", (step, value), xytext=(0, 6), textcoords="offset points", ha="center")
    axes.margins(x=0.12)


def _draw_memory_by_phase(axes: Axes, records: Records) -> None:
    """The headline figure of every phase over the steps on which it was measured."""
    figure = _headline(records)
    for colour, phase in zip(_COLOURS, [p for p in PHASES if p != "rewards"], strict=False):
        points = [
            (record["step"], record["memory"][phase][figure])
            for record in records
            if figure in (record.get("memory") or {}).get(phase, {})
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True), color=colour, marker=".", markersize=4, linewidth=1, label=phase
            )
    axes.set_title(f"memory by phase: {_figure_title(records)}")
    axes.set_ylabel("MiB")
    axes.set_ylim(bottom=0)
    if axes.has_data():
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _finish(figure: Figure, title: str, panels: tuple[Axes, ...]) -> None:
    for axes in panels:
        axes.set_xlabel("optimizer step")
    panels[2].set_ylim(bottom=0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)


def highest_peaks(records: Records) -> tuple[list[int], list[float]]:
    """Steps on which memory was measured and the highest phase's figure, MiB."""
    figure = _headline(records)
    steps, peaks = [], []
    for record in records:
        values = [figures[figure] for figures in (record.get("memory") or {}).values() if figure in figures]
        if values:
            steps.append(record["step"])
            peaks.append(max(values))
    return steps, peaks


def _headline(records: Records) -> str:
    devices = [record["device"] for record in records if "device" in record]
    return HEADLINE.get(devices[-1], HEADLINE["cpu"]) if devices else HEADLINE["cpu"]


def _figure_title(records: Records) -> str:
    return MEANING[_headline(records)]
