"""Charts as inline SVG by matplotlib. Colours are CSS variables of the page, so that they follow light and dark mode.

matplotlib draws with stand-ins, one hex colour for each variable; the text of the file is then rewritten: stand-ins
become `var(--…)`, sizes and names of elements go, text takes the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from recipes.problems import visible
from recipes.report.charts import Areas, Chart, Line, Lines, Peaks
from recipes.tracking import escape
from recipes.tracking.phases import PHASES
from recipes.tracking.summary import format_mib

COLOURS = 7  # variables --c0 … --c6
_SIZE = (4.0, 2.2)  # inches, at 72 units each: what fills a column of the page, and a phone's width
_FONT = 8.0  # units of the SVG; the page shows a chart at 1.25 to 1.4 times its own size
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.115, 0.805, 0.95, 0.13  # the same in every chart: axes above each other align
_LEFT_OF_NAMES = 0.21
_LABEL = 11  # characters for which there is room right of the axes
_INK, _MUTED, _GRID, _SURFACE = "#a1b2c0", "#a1b2c1", "#a1b2c2", "#a1b2c3"
_STAND_INS = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _SURFACE: "surface"}
_STAND_INS |= {f"#a1b2d{number}": f"c{number}" for number in range(COLOURS)}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": _FONT,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "path.simplify_threshold": 0.3,
}


def draw(chart: Chart, name: str) -> Markup:
    """The chart as an SVG element. name: of letters and digits, unlike any other chart's on the page."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        height = _SIZE[1] if not isinstance(chart, Peaks) else max(_SIZE[1], 0.4 + 0.26 * len(chart.phases))
        figure = Figure(figsize=(_SIZE[0], height))
        left = _LEFT_OF_NAMES if isinstance(chart, Peaks) else _LEFT
        axes = figure.add_axes((left, _BOTTOM, _RIGHT - left, _TOP - _BOTTOM))
        if isinstance(chart, Lines):
            _draw_lines(axes, chart)
        elif isinstance(chart, Areas):
            _draw_areas(axes, chart)
        else:
            _draw_peaks(axes, chart)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return Markup(_inline(file.getvalue(), f"{chart.title}: {chart.note}", name))


def smooth(values: Sequence[float]) -> list[float]:
    """Centred means over about a tenth of the points; as many points as before."""
    half = len(values) // 20
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _draw_lines(axes: Axes, chart: Lines) -> None:
    percent = chart.unit == "%"
    ends = []
    for number, line in enumerate(chart.lines):
        # Where lines cover each other, those below look out on both sides.
        below = 0 if chart.named else len(chart.lines) - 1 - number
        ends.append(_draw_line(axes, line, 1.5 + 1.2 * below, several=len(chart.lines) > 1))
    banded = [line for line in chart.lines if line.measured or len(chart.lines) == 1]
    values = [value for line in chart.lines for value in line.values]
    values += [value for line in banded for value in (*line.low, *line.high)]
    low, high = min(values), max(values)
    if 0 <= low <= 0.5 * high:
        low = 0.0
    room = 0.06 * (high - low or abs(high)) or (0.01 if percent else 1.0)
    axes.set_ylim(low if low == 0 else low - room, min(high + room, 1.0) if percent and high <= 1 else high + room)
    axes.set_xlim(*_span([step for line in chart.lines for step in line.steps]))
    _steps_axis(axes)
    show = _percent(axes.get_ylim()) if percent else _number
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    labels = [_end_label(line, percent, chart.named) for line in chart.lines]
    colours = [_MUTED if line.aside else _colour(line.colour) for line in chart.lines]
    _label_ends(axes, ends, labels, colours)


def _draw_line(axes: Axes, line: Line, width: float, *, several: bool) -> float:
    """Draws it, smoothed, over its own points and band where it is alone; returns the height at which it ends."""
    colour = _MUTED if line.aside else _colour(line.colour)
    if line.measured:
        if line.low:
            below = [v - low for v, low in zip(line.values, line.low)]
            above = [high - v for v, high in zip(line.values, line.high)]
            axes.errorbar(line.steps, line.values, (below, above), color=colour, linewidth=1, capsize=2, fmt="none", clip_on=False)
        axes.plot(line.steps, line.values, color=colour, linewidth=width, marker="o", markersize=3.2, clip_on=False)
        return line.values[-1]
    shown = smooth(line.values)
    if line.low and not several:
        axes.fill_between(line.steps, smooth(line.low), smooth(line.high), color=colour, alpha=0.13, linewidth=0)
    if line.aside:
        axes.plot(line.steps, shown, color=colour, linewidth=1, dashes=(3, 2), clip_on=False)
        return shown[-1]
    if shown != line.values:
        axes.plot(line.steps, line.values, color=colour, linewidth=0.7, alpha=0.4)
    single = {"marker": "o", "markersize": 3.2} if len(shown) == 1 else {}
    axes.plot(line.steps, shown, color=colour, linewidth=width, clip_on=False, **single)
    return shown[-1]


def _draw_areas(axes: Axes, chart: Areas) -> None:
    names = list(chart.seconds)
    # One point is drawn as wide as a step, or nothing would be seen of it.
    single = len(chart.steps) == 1
    steps = [chart.steps[0] - 0.5, chart.steps[0] + 0.5] if single else chart.steps
    rows = [values * 2 if single else smooth(values) for values in chart.seconds.values()]
    colours = [_colour(PHASES.index(name)) for name in names]
    axes.stackplot(steps, rows, colors=colours, edgecolor=_SURFACE, linewidth=0.5, alpha=0.85)
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, chart.top or 1.0)
    _steps_axis(axes)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    heights, below = [], 0.0
    for values in rows:
        heights.append(below + values[-1] / 2)
        below += values[-1]
    _label_ends(axes, heights, names, colours)


def _draw_peaks(axes: Axes, chart: Peaks) -> None:
    """A row a phase: a bar for one run, points for several; a diamond where the plan says it would be."""
    rows = range(len(chart.phases))
    several = len(chart.measured) > 1
    highest = max(v for v in [*chart.planned, *(v for run in chart.measured for v in run)] if v is not None)
    unit, name = (1024.0, "GiB") if highest >= 1024 else (1.0, "MiB")
    for colour, run in enumerate(chart.measured):
        kept = [(row, value / unit) for row, value in zip(rows, run) if value is not None]
        if several:
            shift = 0.18 * (colour - (len(chart.measured) - 1) / 2)
            axes.plot([v for _, v in kept], [row + shift for row, _ in kept], "o", color=_colour(colour), markersize=4)
            continue
        axes.barh([r for r, _ in kept], [v for _, v in kept], height=0.62, color=_colour(0), alpha=0.85, linewidth=0)
    for row, phase in zip(rows, chart.phases):
        found = [run[row] for run in chart.measured if run[row] is not None]
        if not several and found:
            _margin(axes, row, format_mib(found[0]), _INK)
    planned = [(row, value / unit) for row, value in zip(rows, chart.planned) if value is not None]
    axes.plot(
        [v for _, v in planned], [r for r, _ in planned], "D", color=_SURFACE, markeredgecolor=_INK, markersize=4.5
    )
    axes.set_ylim(len(chart.phases) - 0.4, -0.6)
    axes.set_xlim(0, 1.06 * highest / unit)
    axes.set_yticks(list(rows), chart.phases)
    axes.tick_params("y", labelcolor=_INK)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    _beside_the_ticks(axes, name)


def _steps_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    _beside_the_ticks(axes, "step")


def _beside_the_ticks(axes: Axes, text: str) -> None:
    """The axis's unit, in the line of its numbers, right of the last."""
    place = {"xytext": (10, -3.5), "textcoords": "offset points", "xycoords": "axes fraction"}
    axes.annotate(text, (1, 0), **place, va="top", ha="left", color=_MUTED)  # type: ignore[arg-type]


def _label_ends(axes: Axes, heights: Sequence[float], labels: Sequence[str], colours: Sequence[str]) -> None:
    """A label right of the axes at each line's end, pushed apart where they would lie on each other."""
    low, high = axes.get_ylim()
    span = high - low or 1.0
    size = axes.figure.get_size_inches()[1] * 72 * (_TOP - _BOTTOM)  # type: ignore[union-attr]
    places = spread([(height - low) / span * size for height in heights], 1.2 * _FONT, 0.5 * _FONT, size - 0.2 * _FONT)
    for place, label, colour in zip(places, labels, colours):
        _margin(axes, low + place / size * span, label, colour)


def _margin(axes: Axes, height: float, text: str, colour: str) -> None:
    """Text right of the axes at a height in the data's units."""
    x, y = axes.get_yaxis_transform(), {"xytext": (5, 0), "textcoords": "offset points"}
    axes.annotate(visible(text), (1, height), xycoords=x, **y, va="center", ha="left", color=colour, annotation_clip=False)  # type: ignore[arg-type]


def spread(places: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """The places moved as little as need be, so that any two are `apart` and all lie in [low, high] if they can."""
    order = sorted(range(len(places)), key=places.__getitem__)
    found = [0.0] * len(places)
    floor = low
    for index in order:
        found[index] = max(places[index], floor)
        floor = found[index] + apart
    ceiling = high
    for index in reversed(order):
        found[index] = min(found[index], ceiling)
        ceiling = found[index] - apart
    return found


def _span(steps: Sequence[int]) -> tuple[float, float]:
    first, last = min(steps), max(steps)
    return (first, last) if last > first else (first - 0.5, last + 0.5)


def _colour(number: int) -> str:
    return f"#a1b2d{number % COLOURS}"


def _number(value: float, digits: int = 4) -> str:
    """A number in as few characters as it takes; `digits` that count, or the whole part where that has more."""
    for size, scale, name in ((1e9, 1e9, " G"), (1e6, 1e6, " M"), (1e4, 1e3, " k"), (0, 1, "")):
        if abs(value) >= size:
            break
    value /= scale
    text = f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return text.replace("-", "−") + name


def _percent(limits: tuple[float, float]) -> Callable[[float], str]:
    digits = 0 if limits[1] - limits[0] > 0.05 else 1 if limits[1] - limits[0] > 0.005 else 2
    return lambda value: f"{100 * value:.{digits}f} %"


def _end_label(line: Line, percent: bool, named: bool) -> str:
    """The name with the last value, as far as there is room."""
    value = line.values[-1]
    figure = f"{100 * value:.1f} %" if percent else _number(value, 2 if named else 3)
    if not named:
        return figure
    return both if len(both := f"{line.name} {figure}") <= _LABEL else line.name


def _inline(svg: str, description: str, name: str) -> str:
    """matplotlib's file as an element of a page."""
    body = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]+)"', body)
    inside = body[body.index(">") + 1 : body.rindex("</svg>")]
    inside = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style[^>]*>.*?</style>", "", inside, flags=re.DOTALL)
    inside = re.sub(r'<g id="[^"]*"', "<g", inside)
    inside = re.sub(r"font: (\S+px) [^;\"]+|font-family: [^;\"]+; ?", lambda m: f"font-size: {m[1]}" if m[1] else "", inside)
    inside = re.sub(r"(?<=\n) +|\n(?=\n)", "", inside)
    for stand_in, variable in _STAND_INS.items():
        inside = inside.replace(stand_in, f"var(--{variable})")
    label = escape.html(description)
    return f'<svg role="img" aria-label="{label}" data-chart="{name}" viewBox="{view[1] if view else ""}">{inside}</svg>'
