"""What is drawn for one run and for several, and how a chart becomes part of a page."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from made_up import GIB, PEAKS, run_folder
from tiny import tiny_trainer

from recipes.config.load import load_config
from recipes.plan.plan import plan
from recipes.report.charts import Areas, Bars, Line, Lines, Peaks, charts, shown
from recipes.report.svg import draw, smooth, spread
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.tracker import track


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("runs")).metrics.read()


def by_title(found):
    return {chart.title: chart for chart in found}


def test_every_figure_of_one_run_is_drawn(records):
    found = by_title(charts({"a": records}))
    assert list(found) == [
        "Reward", "Reward by right", "Reward by form <b>", "Accuracy", "Entropy", "KL", "Completion length",
        "Lost shares", "Clipped ratios", "Trainer to sampler", "Time by phase", "Memory by phase",
        "Tokens a second", "Tokens a step", "Left out",
    ]  # fmt: skip
    accuracy = found["Accuracy"].lines[0]
    assert (accuracy.steps, accuracy.values) == ([0, 40], [0.43, pytest.approx(0.83)])
    assert (accuracy.low[0], accuracy.high[0]) == (pytest.approx(0.40), pytest.approx(0.46))
    length = found["Completion length"].lines[0]
    assert (length.values[0], length.low[0], length.high[0]) == (179, 40, 256)
    assert [(line.name, line.values[0]) for line in found["Lost shares"].lines] == [
        ("cut off", 0.1),
        ("no gradient", 0.2),
    ]
    mean, deviation = found["Reward by right"].lines
    assert (mean.values[-1], deviation.values[-1], deviation.aside) == (
        pytest.approx(0.58, abs=1e-3),
        0.36,
        True,
    )
    assert found["Tokens a second"].lines[0].values == [pytest.approx(131_000 / 10.31)] * 40


def test_a_function_that_is_the_whole_reward_is_not_drawn_twice():
    lines = [{"step": s, "reward": 0.5 * s, "rewards": {"right": 0.5 * s, "form": 1.0}} for s in (1, 2)]
    found = by_title(charts({"a": lines}))
    assert list(found) == ["Reward", "Reward by form"]
    assert found["Reward"].note.endswith("only right counts")


def test_what_was_not_logged_is_left_out():
    assert charts({"a": [{"step": 1, "reward": None}]}) == []


def test_time_is_stacked_and_thin_phases_are_other(records):
    (chart,) = [chart for chart in charts({"a": records}) if isinstance(chart, Areas)]
    assert {name: values[0] for name, values in chart.seconds.items()} == {
        "generation": 6.0,
        "scoring": 0.8,
        "forward": 1.2,
        "backward": 2.2,
        "other": pytest.approx(0.11),
    }


def test_memory_stands_beside_the_plan(records):
    plan = {"phases": {"generation": 33 * 2**30, "forward, loss and backward": 44 * 2**30}}
    (chart,) = [chart for chart in charts({"a": records}, plan) if isinstance(chart, Peaks)]
    assert chart.measured == [[GIB * PEAKS[phase] for phase in chart.phases]]
    assert dict(zip(chart.phases, chart.planned)) == {
        "generation": 33 * GIB,
        "scoring": None,
        "forward": 44 * GIB,
        "backward": 44 * GIB,
    }
    (without,) = [chart for chart in charts({"a": records}) if isinstance(chart, Peaks)]
    assert without.planned == [None] * 4
    assert "plan" not in without.note


def test_the_plan_is_found_by_its_own_names_of_the_phases(records):
    config = load_config(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
    planned = plan(config).memory.phases
    (chart,) = [chart for chart in charts({"a": records}, {"phases": planned}) if isinstance(chart, Peaks)]
    assert dict(zip(chart.phases, chart.planned)) == {
        "generation": planned["generation"] / 2**20,
        "scoring": planned["scoring without gradient"] / 2**20,
        "forward": planned["forward, loss and backward"] / 2**20,
        "backward": planned["forward, loss and backward"] / 2**20,
    }


def test_a_real_run_of_trl_logs_what_is_drawn(memhead_in_trl, tmp_path):
    folder = RunFolder.create(tmp_path, "run")
    trainer = tiny_trainer(folder.path / "checkpoints", steps=2)
    tracker = track(trainer, folder, progress=False)
    trainer.train()
    tracker.close()
    found = by_title(charts({"run": folder.metrics.read()}))
    expected = {
        "Reward",
        "Reward by digits_reward",
        "Reward by length_reward",
        "Entropy",
        "Completion length",
    }
    expected |= {
        "Lost shares",
        "Clipped ratios",
        "Time by phase",
        "Memory by phase",
        "Tokens a second by phase",
    }
    assert expected == set(found)
    for title, lines in (("Reward by digits_reward", 2), ("Lost shares", 2), ("Clipped ratios", 2)):
        assert [len(line.values) for line in found[title].lines] == [2] * lines
    assert len(found["Completion length"].lines[0].low) == 2


def test_several_runs_share_one_chart_per_line_and_the_time_axis(records):
    slow = [record | {"time": {"forward": 60.0}} if "time" in record else record for record in records]
    found = charts({"a": records, "b": slow})
    lines = by_title(chart for chart in found if isinstance(chart, Lines))
    assert {"Lost shares: cut off", "Lost shares: no gradient", "Accuracy"} <= set(lines)
    assert all([line.name for line in chart.lines] == ["a", "b"] for chart in lines.values())
    assert [chart.top for chart in found if isinstance(chart, Areas)] == [63.0, 63.0]


def test_ratios_are_those_of_the_first_step_and_of_the_last():
    def line(step, **ratios):
        return {"step": step, "ratios": {kind: [share, 1 - share] for kind, share in ratios.items()}}

    found = charts(
        {"a": [{"step": 0}, line(1, policy=0.1, sampler=0.2), line(2, policy=0.3), line(3, policy=0.4)]}
    )
    assert {chart.title: chart.shares for chart in found if isinstance(chart, Bars)} == {
        "Ratios, sampler": {"step 1": [0.2, 0.8]},
        "Ratios, policy": {"step 1": [0.1, 0.9], "step 3": [0.4, 0.6]},
    }


def test_cpu_and_gpu_memory_are_not_drawn_together(records):
    cpu = [
        {
            "step": 1,
            "device": "cpu",
            "memory": {"forward": {"tensor_peak_mib": 5.0}},
            "time": {"forward": 1.0},
        }
    ]
    on_gpu, on_cpu = [chart for chart in charts({"a": records, "b": cpu}) if isinstance(chart, Peaks)]
    assert (on_gpu.note, on_gpu.measured[1]) == ("peak of the CUDA allocator", [None] * 4)
    assert (on_cpu.note, on_cpu.measured) == ("peak of live tensor bytes", [[None], [5.0]])


def test_an_svg_has_the_pages_colours_and_ids_of_its_own(records):
    drawn = [draw(chart, f"chart{number}") for number, chart in enumerate(charts({"a": records}))]
    for svg in drawn:
        ElementTree.fromstring(svg.replace("xlink:href", "href"))
        assert not re.search(r"#[0-9a-f]{6}|<style|font-family|<script|<metadata", svg)
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= {
            "ink",
            "muted",
            "grid",
            "surface",
            *(f"c{i}" for i in range(7)),
        }
    assert "var(--c0)" in drawn[0]
    ids = [name for svg in drawn for name in re.findall(r' id="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))


def test_a_line_of_one_point_and_a_line_of_zeros_are_drawn():
    flat = charts({"a": [{"step": 1, "reward": 0.0, "clipped_share": 0.0, "time": {"forward": 1.0}}]})
    assert [chart.title for chart in flat] == ["Reward", "Lost shares", "Time by phase"]
    assert all("var(--c" in draw(chart, "x") for chart in flat)


def test_labels_are_pushed_apart_no_more_than_need_be():
    assert spread([10, 50], 12, 0, 100) == [10, 50]
    assert spread([10, 11, 50], 12, 0, 100) == [10, 22, 50]
    assert spread([99, 98], 12, 0, 100) == [100, 88]
    assert spread([], 12, 0, 100) == []


def test_a_run_of_very_many_steps_has_no_larger_a_picture():
    """What is smooth is drawn at as many places as can be told apart, the first and the last among them."""
    count = 10_000
    assert shown(400) == list(range(400))
    assert (len(shown(count)), shown(count)[0], shown(count)[-1]) == (400, 0, count - 1)
    values = [float(i % 7) for i in range(count)]
    assert smooth(values, [0, 5000]) == [smooth(values)[0], smooth(values)[5000]]
    steps, band = list(range(count)), {"low": [0.0] * count, "high": [7.0] * count}
    lines = Lines("", "", [Line("length", 0, steps, [3.0] * count, **band)])
    areas = Areas("", "", steps, {"forward": values, "backward": values}, 14.0)
    assert all(len(draw(chart, "x")) < 50_000 for chart in (lines, areas))


def test_smoothing_keeps_length_and_mean_of_a_constant():
    assert smooth([2.0] * 100) == [2.0] * 100
    assert smooth([1.0]) == [1.0]
    assert smooth([0.0] * 20 + [1.0] * 20)[16:24] == [
        0,
        0,
        0.2,
        0.4,
        0.6,
        0.8,
        1,
        1,
    ]  # a tenth of forty and one
    assert smooth([0.0, 1.0] * 9) == [0.0, 1.0] * 9  # of fewer than twenty each is its own
    assert smooth([]) == []
