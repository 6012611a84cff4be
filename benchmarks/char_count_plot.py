"""The pictures of letter counting: held-out accuracy and sampled reward over rollouts, run by run; head by head.

python -m benchmarks.char_count_plot benchmarks/results/char_count_h100.json docs/char_count_h100.png
python -m benchmarks.char_count_plot benchmarks/results/char_count_h100.json docs/char_count_heads_h200.png --heads
"""

from __future__ import annotations

import argparse
import json
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
HEADS = [  # run, label, colour, line: TRL's step from one supervised start
    ("head memhead, from the start of published, seed 0", "head.impl memhead", "#1f5fa8", "-"),
    ("head trl, from the same start", "trl", "#d1682a", "--"),
    ("head full, from the same start", "full", "#777777", ":"),
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


def draw_reward(axes: Axes, run: dict[str, Any], window: int = WINDOW, **style: Any) -> None:
    """The share of sampled completions that are right, the mean of as many rollouts as `window`."""
    rewards = run["reward"]
    ends, size = range(window, len(rewards) + 1), run["completions_a_rollout"] / ROLLOUT
    axes.plot(
        [end * size for end in ends], [sum(rewards[end - window : end]) / window for end in ends], **style
    )


def run_of(parts: dict[str, Any], part: str, name: str) -> dict[str, Any]:
    """The one run of that name."""
    (run,) = (run for run in parts[part] if run["run"] == name)
    return run


def panels(height: float, reward_of: str) -> tuple[Figure, Axes, Axes]:
    """A figure with its two panels, accuracy and reward, on one scale."""
    figure = Figure(figsize=(10, height), layout="constrained")
    accuracy, reward = figure.subplots(1, 2, sharey=True)
    accuracy.set_title("right answers, greedy, of 1,000 held-out problems")
    reward.set_title(f"right answers sampled, {reward_of}")
    for axes in (accuracy, reward):
        axes.set_xlabel(f"rollouts of {ROLLOUT:,} completions")
    return figure, accuracy, reward


def draw_runs(parts: dict[str, Any]) -> Figure:
    """verl's settings, better ones, one that fails."""
    figure, accuracy, reward = panels(3.6, f"mean of {WINDOW} rollouts")
    for part, name, label, colour, line in SHOWN:
        style = {"color": colour, "linestyle": line, "label": label}
        run = run_of(parts, part, name)
        draw_accuracy(accuracy, run, **style)
        draw_reward(reward, run, **style)
    accuracy.axhline(PUBLISHED_END, color="#333333", linewidth=1, linestyle="--")
    accuracy.annotate("verl's own end", (300, PUBLISHED_END), (0, 3), textcoords="offset points", ha="right")
    reward.legend(loc="lower right")
    return figure


def draw_heads(parts: dict[str, Any]) -> Figure:
    """Three heads from one start, rollout by rollout."""
    figure, accuracy, reward = panels(2.8, "each rollout")
    for name, label, colour, line in HEADS:
        style = {"color": colour, "linestyle": line, "label": label}
        run = run_of(parts, H200, name)
        draw_accuracy(accuracy, run, **style)
        draw_reward(reward, run, window=1, **style)
    accuracy.set_ylim(0.3, 0.6)
    accuracy.set_xticks([0, 10, 20])
    reward.set_xticks([1, 5, 10, 15, 20])
    reward.legend(loc="upper left")
    return figure


def main(argv: list[str] | None = None) -> None:
    """Draw one picture from the stored runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--heads", action="store_true", help="the three heads")
    options = parser.parse_args(argv)
    parts = json.loads(options.source.read_text())
    with mpl.rc_context(STYLE):
        figure = draw_heads(parts) if options.heads else draw_runs(parts)
        figure.savefig(options.target)


if __name__ == "__main__":
    main()
