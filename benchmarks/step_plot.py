"""The README's picture: memory and time of a GRPO step over its length, by head, from what step_gpu measured.

python -m benchmarks.step_plot benchmarks/results/step_h100.json docs/step_h100.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STACK = "trl"
CARD_GIB = 79.2  # what an H100 of 80 GB has for programs
HEADS = {
    "full": ("full logits", "#d1682a", "-", 6),
    "trl": ("TRL's chunked head", "#777777", "--", 9),
    "memhead": ("memhead", "#1f5fa8", "-", 5),
}
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 130,
}


def tokens(row: dict[str, Any]) -> int:
    """Completion tokens of the step's batch."""
    return row["sequences"] * row["length"]


def draw(axes: Axes, rows: list[dict[str, Any]], unit: str) -> None:
    """One line a head; ``unit`` is "GiB" of the peak or "seconds" of the step."""
    for head, (label, colour, style, size) in HEADS.items():
        points = [
            (tokens(row), max(row["peak_mib"].values()) / 1024 if unit == "GiB" else row["seconds"]["step"])
            for row in rows
            if row["head"] == head and "error" not in row
        ]
        axes.plot(*zip(*points), color=colour, linestyle=style, marker="o", markersize=size, label=label)
    ticks = sorted({tokens(row) for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("completion tokens in the step")


def mark_out_of_memory(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """The card's memory as a line, and a cross on it where a head did not fit."""
    axes.axhline(CARD_GIB, color="#b03a48", linewidth=1, linestyle=":")
    place = (tokens(rows[0]), CARD_GIB)
    axes.annotate("the card's memory", place, xytext=(0, -14), textcoords="offset points", color="#b03a48")
    for row in rows:
        if "error" in row:
            place = (tokens(row), CARD_GIB)
            axes.plot(*place, color=HEADS[row["head"]][1], marker="X", markersize=12, linestyle="none")
            axes.annotate("out of memory", place, xytext=(-12, -14), textcoords="offset points", ha="right")


def main(source: Path, target: Path) -> None:
    """Draw ``target`` from the JSON of benchmarks.step_gpu."""
    rows = [row for row in json.loads(source.read_text())["rows"] if row["stack"] == STACK]
    rows.sort(key=tokens)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        memory, time = figure.subplots(1, 2)
        draw(memory, rows, "GiB")
        draw(time, rows, "seconds")
        mark_out_of_memory(memory, rows)
        memory.set_title("peak memory, GiB")
        time.set_title("time of a step, seconds")
        for axes in (memory, time):
            axes.set_ylim(bottom=0)
        time.legend(loc="upper left")
        figure.savefig(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
