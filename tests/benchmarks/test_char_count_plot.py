"""The pictures of letter counting show the runs of the JSON: every curve with its values, none left out."""

import json
from pathlib import Path

import pytest

from benchmarks import char_count_plot as plot

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PARTS = json.loads((RESULTS / "char_count_h100.json").read_text(encoding="utf-8"))


def curves(axes):
    """Of each run's line the values, by its order; a line across the panel is none."""
    return [list(map(float, line.get_ydata())) for line in axes.lines if len(line.get_xdata()) > 2]


def test_the_three_heads_lie_over_each_other_rollout_by_rollout():
    accuracy, reward = plot.draw_heads(PARTS).axes
    runs = [run for run in PARTS[plot.H200] if run["run"].startswith("head ")]
    assert len(runs) == 3
    assert curves(reward) == [run["reward"] for run in runs]
    assert curves(accuracy) == [[share for _, share in run["accuracy"]] for run in runs]
    assert all(list(line.get_xdata()) == list(range(1, 21)) for line in reward.lines)
    assert all(list(line.get_xdata()) == [0, 10, 20] for line in accuracy.lines)
    low, high = accuracy.get_ylim()
    assert low < min(map(min, curves(reward) + curves(accuracy)))
    assert high > max(map(max, curves(reward) + curves(accuracy)))
    assert [text.get_text() for text in reward.get_legend().get_texts()] == [
        "head.impl memhead",
        "trl",
        "full",
    ]


def test_the_runs_with_their_smoothed_rewards():
    accuracy, reward = plot.draw_runs(PARTS).axes
    runs = [plot.run_of(PARTS, part, name) for part, name, *_ in plot.SHOWN]
    assert curves(accuracy) == [
        [share for _, share in run["accuracy"]] for run in runs if len(run["accuracy"]) > 2
    ]
    for line, run in zip(reward.lines, runs, strict=True):
        assert line.get_ydata()[0] == pytest.approx(sum(run["reward"][:10]) / 10)
        assert line.get_ydata()[-1] == pytest.approx(sum(run["reward"][-10:]) / 10)


@pytest.mark.parametrize("more", [[], ["--heads"]])
def test_a_picture_is_written(tmp_path, more):
    plot.main([str(RESULTS / "char_count_h100.json"), str(tmp_path / "one.png"), *more])
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
