"""What stands where in a picture: read from matplotlib's own axes, and compared with the figures by hand."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from recipes.report import plots, svg
from recipes.report.charts import Areas, Bars, Line, Lines, Peaks
from recipes.report.plots import highest_peaks


@pytest.fixture
def axes():
    return Figure(figsize=(4.0, 2.2)).add_axes((0.1, 0.1, 0.7, 0.8))


def written(axes):
    """Text right of the axes, but for a unit, with its height."""
    labels = [text for text in axes.texts if text.xycoords != "axes fraction"]
    return {text.get_text(): pytest.approx(text.xy[1], abs=1e-6) for text in labels}


def drawn(axes):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def ticks(axis):
    return [axis.get_major_formatter()(value) for value in axis.get_majorticklocs()]


STEPS = [1, 2, 3]


def test_a_line_ends_at_its_value_and_the_axis_holds_the_whole_band(axes):
    line = Line("length", 0, STEPS, [50.0, 60.0, 70.0], [40.0, 41.0, 42.0], [80.0, 85.0, 90.0])
    svg._draw_lines(axes, Lines("Length", "", [line], named=False))
    assert drawn(axes) == [(STEPS, [50.0, 60.0, 70.0])]
    assert axes.get_xlim() == (1, 3)
    assert axes.get_ylim() == (
        0.0,
        pytest.approx(90 + 0.06 * 90),
    )  # from 0, where the lowest is less than half
    (band,) = axes.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert {(step, value) for step, value in zip(STEPS * 2, line.low + line.high)} <= corners
    assert written(axes) == {"70": 70.0}


def test_two_lines_are_named_at_their_ends_and_far_from_0_the_axis_is_theirs(axes):
    above, aside = Line("mean", 0, STEPS, [0.9, 0.9, 0.95]), Line("spread", 1, STEPS, [0.8] * 3, aside=True)
    svg._draw_lines(axes, Lines("Reward", "", [above, aside]))
    assert axes.get_ylim() == (pytest.approx(0.8 - 0.009), pytest.approx(0.95 + 0.009))
    assert written(axes) == {"mean 0.95": 0.95, "spread 0.8": 0.8}
    assert [to_hex(line.get_color()) for line in axes.lines] == [svg._colour(0), svg._MUTED]
    assert [to_hex(text.get_color()) for text in axes.texts[-2:]] == [svg._colour(0), svg._MUTED]


@pytest.mark.parametrize(
    ("values", "top", "shown"),
    [([0.2, 0.4], 0.424, "40 %"), ([0.2, 0.98], 1.0, "98 %"), ([0.0, 0.0], 0.01, "0 %")],
)
def test_a_share_is_in_per_cent_and_ends_at_all(axes, values, top, shown):
    svg._draw_lines(axes, Lines("Lost", "", [Line("a", 0, [1, 2], values)], "%", named=False))
    assert axes.get_ylim() == (0.0, pytest.approx(top))
    assert list(written(axes)) == [shown]
    assert ticks(axes.yaxis)[0].endswith(" %")


def test_what_is_measured_now_and_then_has_bars_of_error(axes):
    measured = Line("accuracy", 0, [0, 40], [0.4, 0.8], [0.3, 0.7], [0.5, 0.9], measured=True)
    svg._draw_lines(axes, Lines("Accuracy", "", [measured], "%", named=False))
    (bars,) = axes.collections
    assert [part.tolist() for part in bars.get_segments()] == [[[0, 0.3], [0, 0.5]], [[40, 0.7], [40, 0.9]]]
    assert axes.get_ylim() == (0.0, pytest.approx(0.9 + 0.06 * 0.9))
    assert drawn(axes) == [([0, 40], [0.4, 0.8])]


def test_of_several_runs_the_first_is_widest_and_no_band_is_drawn(axes):
    runs = [Line(name, place, STEPS, [0.5] * 3, [0.1] * 3, [0.9] * 3) for place, name in enumerate("abc")]
    svg._draw_lines(axes, Lines("Reward", "", runs, named=False))
    assert [line.get_linewidth() for line in axes.lines] == [4.5, 3.0, 1.5]
    assert not axes.collections
    assert axes.get_ylim() == (pytest.approx(0.5 - 0.03), pytest.approx(0.5 + 0.03))


def test_a_phase_is_named_in_the_middle_of_where_its_area_ends(axes):
    seconds = {"generation": [9.0, 6.0], "forward": [1.0, 2.0], "other": [5.0, 4.0]}
    svg._draw_areas(axes, Areas("Time", "", [3, 7], seconds, 15.0))
    assert axes.get_ylim() == (0, 15)
    assert axes.get_xlim() == (3, 7)
    assert written(axes) == {"generation": 3.0, "forward": 7.0, "other": 10.0}
    tops = [max(y for x, y in area.get_paths()[0].vertices.tolist() if x == 7) for area in axes.collections]
    assert tops == [6.0, 8.0, 12.0]
    colours = [to_hex(area.get_facecolor()[0]) for area in axes.collections]
    assert colours == [svg._colour(svg.PHASES.index(name)) for name in seconds]


def test_one_step_is_as_wide_as_a_step(axes):
    svg._draw_areas(axes, Areas("Time", "", [3], {"forward": [2.0]}, 0.0))
    assert (axes.get_xlim(), axes.get_ylim()) == ((2.5, 3.5), (0, 1))
    assert axes.collections[0].get_paths()[0].vertices[:, 1].max() == 2.0


def test_peaks_of_a_run_are_bars_in_gib_beside_the_plan(axes):
    chart = Peaks("Memory", "", ["generation", "forward"], [[2048.0, None]], [3072.0, 512.0])
    svg._draw_peaks(axes, chart)
    bar, _ = axes.patches
    assert (bar.get_width(), bar.get_y() + bar.get_height() / 2) == (2.0, 0.0)
    assert drawn(axes) == [([3.0, 0.5], [0, 1])]
    low, high = axes.get_ylim()
    assert low > 1 > 0 > high  # the first on top
    assert axes.get_xlim() == (0, pytest.approx(1.06 * 3))
    assert [text.get_text() for text in axes.texts] == ["2.00 GiB", "–", "GiB"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["generation", "forward"]


def test_peaks_of_several_runs_are_points_around_their_row(axes):
    svg._draw_peaks(axes, Peaks("Memory", "", ["forward"], [[5.0], [7.0], [6.0]], [None]))
    points = drawn(axes)[:3]
    assert points == [([5.0], [pytest.approx(-0.18)]), ([7.0], [0.0]), ([6.0], [pytest.approx(0.18)])]
    assert axes.get_xlim() == (0, pytest.approx(1.06 * 7))
    assert [text.get_text() for text in axes.texts] == ["MiB"]


def test_a_histogram_has_a_bar_a_bin_and_each_step_is_named_at_its_largest(axes):
    shares = {"step 1": [0.1, 0.9, 0.0, 0.0], "step 9": [0.2, 0.1, 0.7, 0.0]}
    svg._draw_bars(axes, Bars("Ratios", "", ["a", "b", "c", "d"], shares))
    assert [bar.get_width() for bar in axes.patches] == [
        value for values in shares.values() for value in values
    ]
    middles = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert middles == pytest.approx([-0.2, 0.8, 1.8, 2.8, 0.2, 1.2, 2.2, 3.2])  # the later below the earlier
    assert written(axes) == {"step 1": 0.8, "step 9": 2.2}
    assert axes.get_xlim() == (1e-5, 1)
    assert ticks(axes.xaxis) == ["0.01 %", "1 %", "100 %"]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.0, 6, "0"), (1234.5, 6, "1234.5"), (9_999.0, 6, "9999"), (10_000.0, 6, "10 k"), (-12_500.0, 3, "−12.5 k"),
     (1e6, 6, "1 M"), (2.5e9, 3, "2.5 G"), (123.4, 2, "123"), (0.01234, 2, "0.012"),
     (999_999.0, 3, "1000 k"), (1e300, 6, "1e300"), (-2.5e12, 2, "−2.5e12"), (-1.25e-9, 3, "−1.25e−9")],
)  # fmt: skip
def test_a_number_in_few_characters(value, digits, text):
    assert svg._number(value, digits) == text


@pytest.mark.parametrize(("span", "text"), [(0.06, "12 %"), (0.05, "12.3 %"), (0.005, "12.35 %")])
def test_per_cent_have_the_digits_that_their_axis_needs(span, text):
    assert svg._percent((0.0, span))(0.12345) == text


def test_a_name_gives_way_where_it_does_not_fit_with_its_value():
    assert svg._end_label("mean", 0.51234, percent=False, named=True) == "mean 0.51"
    assert svg._end_label("generation", 0.51234, percent=False, named=True) == "generation"
    assert svg._end_label("mean", 0.51234, percent=True, named=False) == "51.2 %"


# The picture for a README


def record(step, reward, spread, **peaks):
    memory = {phase: {"tensor_peak_mib": peak} for phase, peak in peaks.items()}
    return {"step": step, "reward": reward, "reward_std": spread, "device": "cpu", "memory": memory}


RECORDS = [
    {"step": 0, "accuracy": 0.25},
    record(1, 0.5, 0.1, forward=5.0, backward=9.0, rewards=1.0),
    record(2, None, None, forward=6.0),
    record(3, 0.7, None, backward=4.0, generation=11.0, scoring=2.0),
    {"step": 3, "accuracy": 0.5},
    {"step": 4, "accuracy": 0.75},
]  # fmt: skip


def test_the_reward_and_one_deviation_around_it(axes):
    plots._draw_reward(axes, RECORDS, "#000000", band=True)
    assert drawn(axes) == [([1, 3], [0.5, 0.7])] * 2
    (band,) = axes.collections
    corners = {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 0.4), (1, 0.6), (3, 0.7)}


def test_every_accuracy_and_the_first_and_last_in_figures(axes):
    plots._draw_accuracy(axes, RECORDS, "#000000")
    assert drawn(axes) == [([0, 3, 4], [0.25, 0.5, 0.75])]
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("0.250", (0, 0.25)), ("0.750", (4, 0.75))]
    assert axes.get_ylim() == (0, 1)


def test_each_phases_peaks_over_the_steps_that_have_them(axes):
    plots._draw_memory_by_phase(axes, RECORDS)
    found = dict(zip([text.get_text() for text in axes.get_legend().get_texts()], drawn(axes)))
    assert found == {
        "generation": ([3], [11.0]),
        "scoring": ([3], [2.0]),
        "forward": ([1, 2], [5.0, 6.0]),
        "backward": ([1, 3], [9.0, 4.0]),
    }
    assert (
        axes.get_title(loc="center") + axes.get_title(loc="left")
        == "memory by phase: peak of live tensor bytes"
    )


def test_the_highest_peak_of_each_step():
    assert highest_peaks(RECORDS) == ([1, 2, 3], [9.0, 6.0, 11.0])
    assert highest_peaks([{**RECORDS[1], "device": "cuda"}]) == ([], [])  # another figure is its headline


def test_runs_over_each_other_have_their_own_colours_and_names(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plots, "_finish", lambda figure, title, panels: kept.append((title, panels)))
    second = [{**line, "reward": 0.9} if "reward" in line else line for line in RECORDS]
    plots.plot_overlay({"one": RECORDS, "two": second}, tmp_path / "both.png")
    ((title, (reward, accuracy, memory)),) = kept
    assert title == "one against two"
    assert [text.get_text() for text in reward.get_legend().get_texts()] == ["one", "two"]
    assert [line[1] for line in drawn(reward)] == [[0.5, 0.7]] * 2 + [[0.9] * 3] * 2
    assert (
        [line.get_color() for line in memory.lines]
        == ["#1f5fa8", "#d1682a"]
        == [line.get_color() for line in accuracy.lines]
    )
    assert drawn(memory) == [([1, 2, 3], [9.0, 6.0, 11.0])] * 2
    assert memory.get_title() + memory.get_title(loc="left") == "memory: peak of live tensor bytes"


def test_a_folders_name_is_no_formula_and_no_mark(tmp_path):
    """matplotlib takes $ for mathematics, and leaves a name that begins with _ out of a legend."""
    names = ["_old/$\\q$", "new/a"]
    kept = []
    real = plots._finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_finish", lambda *given: kept.append(given) or real(*given))
        plots.plot_overlay(dict.fromkeys(names, RECORDS), tmp_path / "both.png")
    legend = kept[0][2][0].get_legend()
    assert [text.get_text().strip() for text in legend.get_texts()] == names
    plots.plot_run(RECORDS, "$\\q$", tmp_path / "one.png")
