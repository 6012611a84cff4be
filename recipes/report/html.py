"""Pages from the templates beside this file: one file each, which needs neither a network nor a script."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from recipes import escape
from recipes.report.charts import charts
from recipes.report.svg import draw

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    finalize=escape.html,  # every value that a template puts in
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Figure:
    """A drawn chart with its title and what it shows."""

    title: str
    note: str
    svg: Markup


def render(template: str, **values: Any) -> str:
    """The page from the template of that name, as text."""
    return _TEMPLATES.get_template(f"{template}.html.j2").render(**values)


def figures(runs: dict[str, Any], plan: Any = None) -> list[Figure]:
    """Every chart of `recipes.report.charts`, drawn."""
    return [
        Figure(chart.title, chart.note, draw(chart, f"chart{number}"))
        for number, chart in enumerate(charts(runs, plan))
    ]
