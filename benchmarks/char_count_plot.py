"""The picture of letter counting: held-out accuracy and sampled reward over rollouts, run by run.

python -m benchmarks.char_count_plot benchmarks/results/char_count_h100.json docs/char_count_h100.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.step_plot import STYLE

H100, H200 = "whole runs, 2026-11-28, commit c29eb2e", "on an H200, 2026-11-28, commit 5c6edcb"
PUBLISHED_END = 0.60  # verl's figure after two epochs
ROLLOUT = 1024  # completions: the axis counts in these
WINDOW = 10  # rollouts of which the sampled reward is the mean
SHOWN = [  # part, run, label, colour, line
    (H100, "published, seed 0", "verl's settings, three seeds", "#777777", "-"),
    (H100, "published, seed 1", None, "#777777", "-"),
    (H100, "published, seed 2", None, "#777777", "-"),
    (H100, "updates of 32, 3e-6, 250 rollouts", "250 rollouts, 3e-6 falling", "#d1682a", "-"),
    (
        H200,
        "updates of 32, 4e-6, 300 rollouts, seed 0",
        "300 rollouts, 4e-6 falling, two seeds",
        "#1f5fa8",
        "-",
    ),
    (H200, "updates of 32, 4e-6, 300 rollouts, seed 1", None, "#1f5fa8", "-"),
    (H100, "one update of 64 a rollout of 64 prompts, 2e-5 (stopped)", "2e-5: fails", "#b03a48", ":"),
]


def draw_accuracy(axes: Axes, run: dict[str, Any], **style: Any) -> None:
    """Greedy accuracy on the held-out problems, where it was measured."""
    size = run["completions_a_rollout"] / run["updates_a_rollout"] / ROLLOUT
    axes.plot(
        [step * size for step, _ in run["accuracy"]],
        [share for _, share in run["accuracy"]],
        marker="o",
        markersize=4,
        **style,
    )


def draw_reward(axes: Axes, run: dict[str, Any], **style: Any) -> None:
    """The share of sampled completions that are right, smoothed."""
    rewards = run["reward"]
    ends, size = range(WINDOW, len(rewards) + 1), run["completions_a_rollout"] / ROLLOUT
    axes.plot(
        [end * size for end in ends], [sum(rewards[end - WINDOW : end]) / WINDOW for end in ends], **style
    )


def main(source: Path, target: Path) -> None:
    """Draw ``target`` from the stored runs."""
    parts = json.loads(source.read_text())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        accuracy, reward = figure.subplots(1, 2, sharey=True)
        for part, name, label, colour, line in SHOWN:
            style = {"color": colour, "linestyle": line, "label": label}
            (run,) = (run for run in parts[part] if run["run"] == name)
            draw_accuracy(accuracy, run, **style)
            draw_reward(reward, run, **style)
        accuracy.axhline(PUBLISHED_END, color="#333333", linewidth=1, linestyle="--")
        accuracy.annotate(
            "verl's own end", (300, PUBLISHED_END), (0, 3), textcoords="offset points", ha="right"
        )
        accuracy.set_title("right answers, greedy, of 1,000 held-out problems")
        reward.set_title(f"right answers sampled, mean of {WINDOW} rollouts")
        for axes in (accuracy, reward):
            axes.set_xlabel(f"rollouts of {ROLLOUT:,} completions")
        reward.legend(loc="lower right")
        figure.savefig(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
