"""Charts as inline SVG by matplotlib. Colours are CSS variables of the page, so that they follow light and dark mode.

matplotlib draws with stand-ins, one hex colour for each variable; the text of the file is then rewritten: stand-ins
become `var(--…)`, sizes and names of elements go, text takes the page's font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from recipes import escape
from recipes.problems import visible
from recipes.report.charts import Areas, Bars, Chart, Line, Lines, Peaks, shown, smooth
from recipes.tracking.phases import PHASES
from recipes.tracking.summary import format_mib

COLOURS = 7  # variables --c0 … --c6
_SIZE = (4.0, 2.2)  # inches, at 72 units each: what fills a column of the page, and a phone's width
_FONT = 8.0  # units of the SVG; the page shows a chart at 1.25 to 1.4 times its own size
# The same in every chart, so that axes above each other align.
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.115, 0.805, 0.95, 0.13
_LEFT_OF_NAMES = 0.21
_WIDTH = 1.5  # of a line
_LEAST = 1e-5  # share of the tokens at which a histogram's axis begins
_LABEL = 11  # characters that fit to the right of the axes
_INK, _MUTED, _GRID, _SURFACE = "#a1b2c0", "#a1b2c1", "#a1b2c2", "#a1b2c3"
_STAND_INS = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _SURFACE: "surface"}
_STAND_INS |= {f"#a1b2d{number}": f"c{number}" for number in range(COLOURS)}
_LARGE = 1e12  # from where on a number has an exponent: of a run that diverged
_SCALES = {
    _LARGE: (1.0, ""),
    1e9: (1e9, " G"),
    1e6: (1e6, " M"),
    1e4: (1e3, " k"),
}  # from a size on: what it is divided by
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
    """The chart as an SVG element. name: letters and digits, unique on the page."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        height = _SIZE[1] if not isinstance(chart, Peaks) else max(_SIZE[1], 0.4 + 0.26 * len(chart.phases))
        figure = Figure(figsize=(_SIZE[0], height))
        left = _LEFT_OF_NAMES if isinstance(chart, (Bars, Peaks)) else _LEFT
        axes = figure.add_axes((left, _BOTTOM, _RIGHT - left, _TOP - _BOTTOM))
        if isinstance(chart, Lines):
            _draw_lines(axes, chart)
        elif isinstance(chart, Areas):
            _draw_areas(axes, chart)
        elif isinstance(chart, Bars):
            _draw_bars(axes, chart)
        else:
            _draw_peaks(axes, chart)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return Markup(_inline(file.getvalue(), f"{chart.title}: {chart.note}"))


def _draw_lines(axes: Axes, chart: Lines) -> None:
    percent = chart.unit == "%"
    ends = []
    overlaid = len(chart.lines) > 1 and not chart.named
    for number, line in enumerate(chart.lines):
        # Where runs cover each other, those below show on both sides.
        below = 1 - number / (len(chart.lines) - 1) if overlaid else 0.0
        ends.append(_draw_line(axes, line, _WIDTH + 3 * below, plainly=overlaid))
    banded = [line for line in chart.lines if line.measured or not overlaid]
    values = [value for line in chart.lines for value in line.values]
    values += [value for line in banded for value in (*line.low, *line.high)]
    low, high = min(values), max(values)
    if 0 <= low <= 0.5 * high:
        low = 0.0
    room = 0.06 * (high - low or abs(high)) or (0.01 if percent else 1.0)
    axes.set_ylim(
        low if low == 0 else low - room, min(high + room, 1.0) if percent and high <= 1 else high + room
    )
    axes.set_xlim(*_span([step for line in chart.lines for step in line.steps]))
    _steps_axis(axes)
    _numbers(axes.yaxis, _percent(axes.get_ylim()) if percent else None)
    labels = [_end_label(line.name, end, percent, chart.named) for line, end in zip(chart.lines, ends)]
    colours = [_MUTED if line.aside else _colour(line.colour) for line in chart.lines]
    _label_ends(axes, ends, labels, colours)


def _draw_line(axes: Axes, line: Line, width: float, *, plainly: bool) -> float:
    """Draws it, smoothed, over its own points and its band unless `plainly`; returns the height at which it ends."""
    colour: Any = _MUTED if line.aside else _colour(line.colour)
    faint = 0.6 if width > _WIDTH else 1.0
    if line.measured:
        if line.low:
            axes.vlines(line.steps, line.low, line.high, color=colour, linewidth=1, clip_on=False)
        axes.plot(
            line.steps,
            line.values,
            "-o",
            color=colour,
            linewidth=width,
            markersize=2 + width,
            alpha=faint,
            clip_on=False,
        )
        return line.values[-1]
    at = shown(len(line.values))
    steps, curve = [line.steps[i] for i in at], smooth(line.values, at)
    if line.aside:
        axes.plot(steps, curve, color=colour, linewidth=1, dashes=(3, 2), clip_on=False)
        return curve[-1]
    if line.low and not plainly:
        axes.fill_between(
            steps, smooth(line.low, at), smooth(line.high, at), color=colour, alpha=0.13, linewidth=0
        )
    if curve != line.values and not plainly:
        axes.plot(line.steps, line.values, color=colour, linewidth=0.7, alpha=0.4)
    marker = "o" if len(curve) == 1 else ""
    axes.plot(steps, curve, color=colour, linewidth=width, alpha=faint, marker=marker, clip_on=False)
    return curve[-1]


def _draw_areas(axes: Axes, chart: Areas) -> None:
    names = list(chart.seconds)
    # A single point is drawn as wide as a step, or it would be invisible.
    single = len(chart.steps) == 1
    at = shown(len(chart.steps))
    steps = [chart.steps[0] - 0.5, chart.steps[0] + 0.5] if single else [chart.steps[i] for i in at]
    rows = [values * 2 if single else smooth(values, at) for values in chart.seconds.values()]
    colours = [_colour(PHASES.index(name)) for name in names]
    axes.stackplot(steps, rows, colors=colours, edgecolor=_SURFACE, linewidth=0.5, alpha=0.85)
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, chart.top or 1.0)
    _steps_axis(axes)
    _numbers(axes.yaxis)
    heights, below = [], 0.0
    for values in rows:
        heights.append(below + values[-1] / 2)
        below += values[-1]
    _label_ends(axes, heights, names, colours)


def _draw_peaks(axes: Axes, chart: Peaks) -> None:
    """A row per phase: a bar for one run, or a point for each of several; a diamond at the planned value."""
    rows = list(range(len(chart.phases)))
    highest = max(v for values in (*chart.measured, chart.planned) for v in values if v is not None)
    size, unit = (1024.0, "GiB") if highest >= 1024 else (1.0, "MiB")

    def scaled(values: list[float | None]) -> list[float]:
        return [math.nan if value is None else value / size for value in values]

    if len(chart.measured) == 1:
        axes.barh(rows, scaled(chart.measured[0]), height=0.62, color=_colour(0), alpha=0.85, linewidth=0)
        for row, value in zip(rows, chart.measured[0]):
            _margin(axes, row, format_mib(value), _INK)
    else:
        for number, values in enumerate(chart.measured):
            shift = 0.18 * (number - (len(chart.measured) - 1) / 2)
            places = [row + shift for row in rows]
            axes.plot(scaled(values), places, "o", color=_colour(number), markersize=4)
    axes.plot(scaled(chart.planned), rows, "D", color=_SURFACE, markeredgecolor=_INK, markersize=4.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.06 * highest / size)
    axes.set_yticks(rows, chart.phases)
    axes.tick_params("y", labelcolor=_INK)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    _numbers(axes.xaxis)
    _beside_the_ticks(axes, unit)


def _draw_bars(axes: Axes, chart: Bars) -> None:
    """A row a bin; of two steps the later one below the earlier. Their names stand at their largest bars.

    Shares on a logarithmic axis: nearly all tokens are in one bin, and the others are what one looks for.
    """
    rows, thick = range(len(chart.bins)), 0.8 / len(chart.shares)
    heights, colours = [], []
    for number, values in enumerate(chart.shares.values()):
        places = [row + thick * (number - (len(chart.shares) - 1) / 2) for row in rows]
        axes.barh(places, values, height=thick, color=_colour(number), alpha=0.85, linewidth=0)
        heights.append(places[values.index(max(values))])
        colours.append(_colour(number))
    axes.set_ylim(len(chart.bins) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(_LEAST, 1)
    axes.set_yticks(rows, chart.bins)
    axes.tick_params("y", labelcolor=_INK)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.xaxis.set_major_locator(FixedLocator([10.0**power for power in range(-4, 1, 2)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    _label_ends(axes, heights, list(chart.shares), colours)


def _numbers(axis: Axis, show: Callable[[float], str] | None = None) -> None:
    """A few round numbers along the axis."""
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: (show or _number)(value)))


def _steps_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    _beside_the_ticks(axes, "step")


def _beside_the_ticks(axes: Axes, text: str) -> None:
    """The axis's unit, in line with its numbers, right of the last."""
    axes.annotate(
        text,
        (1, 0),
        xycoords="axes fraction",
        xytext=(14, -3.5),
        textcoords="offset points",
        va="top",
        ha="left",
        color=_MUTED,
    )


def _label_ends(axes: Axes, heights: Sequence[float], labels: Sequence[str], colours: Sequence[str]) -> None:
    """A label right of the axes at each line's end, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    span = high - low or 1.0
    size = axes.figure.get_size_inches()[1] * 72 * (_TOP - _BOTTOM)  # type: ignore[union-attr]
    places = spread(
        [(height - low) / span * size for height in heights], 1.2 * _FONT, 0.5 * _FONT, size - 0.2 * _FONT
    )
    for place, label, colour in zip(places, labels, colours):
        _margin(axes, low + place / size * span, label, colour)


def _margin(axes: Axes, height: float, text: str, colour: str) -> None:
    """Text right of the axes at a height in the data's units."""
    axes.annotate(
        visible(text),
        (1, height),
        xycoords=axes.get_yaxis_transform(),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        ha="left",
        color=colour,
        annotation_clip=False,
    )


def spread(places: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """The places moved as little as necessary, so that any two are `apart`, and all within [low, high] if possible."""
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


def _number(value: float, digits: int = 6) -> str:
    """A number in as few characters as possible, with `digits` significant ones or its whole part if longer."""
    scale, name = next((found for size, found in _SCALES.items() if abs(value) >= size), (1.0, ""))
    value /= scale
    whole = 10**digits - 0.5 <= abs(value) < _LARGE
    text = f"{value:.0f}" if whole else re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.{digits}g}")
    return text.replace("-", "−") + name


def _percent(limits: tuple[float, float]) -> Callable[[float], str]:
    digits = 0 if limits[1] - limits[0] > 0.05 else 1 if limits[1] - limits[0] > 0.005 else 2
    return lambda value: f"{100 * value:.{digits}f} %"


def _end_label(name: str, value: float, percent: bool, named: bool) -> str:
    """The name with the value at which the line ends, shortened to the room there is."""
    digits = 2 if named else 3
    figure = f"{_number(100 * value, digits)} %" if percent else _number(value, digits)
    if not named:
        return figure
    return both if len(both := f"{name} {figure}") <= _LABEL else name


def _inline(svg: str, description: str) -> str:
    """matplotlib's file as an element for a page."""
    body = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]+)"', body)
    inside = body[body.index(">") + 1 : body.rindex("</svg>")]
    inside = re.sub(
        r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", inside, flags=re.DOTALL
    )
    inside = re.sub(r'<g id="[^"]*"', "<g", inside)
    inside = re.sub(r"font: (\S+px) [^;\"]+", r"font-size: \1", inside)
    inside = re.sub(r"font-family: [^;\"]+; ?", "", inside)
    inside = re.sub(r"\n\s*", "\n", inside)
    for stand_in, variable in _STAND_INS.items():
        inside = inside.replace(stand_in, f"var(--{variable})")
    label, size = escape.html(description), view[1] if view else ""
    return f'<svg role="img" aria-label="{label}" viewBox="{size}">{inside}</svg>'
