"""A run's report: report.png, and report.html in one self-contained file.

python -m recipes.report runs/quickstart
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recipes.report.plots import plot_run
from recipes.tracking import escape
from recipes.tracking.environment import environment_table
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.summary import before_and_after, by_phase, format_figure, main_figures, summarize
from recipes.tracking.table import Table

_SAMPLES = 12  # completions shown: the first logged steps' and the last ones'
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}img{max-width:100%}
table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid #ddd;
vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
pre,code{font:13px/1.45 ui-monospace,monospace}pre{background:#f6f6f6;padding:.8rem;overflow:auto}
td{white-space:pre-wrap;overflow-wrap:anywhere}"""


def write_report(folder: RunFolder) -> Path:
    """Writes report.png and report.html into the folder from its other files; returns the HTML's path.

    Raises FileNotFoundError if the folder has no metrics.
    """
    records = folder.metrics.read()
    if not records:
        raise FileNotFoundError(
            f"{folder.path}: no metrics.jsonl with a line in it; give the folder of a run"
        )
    picture = plot_run(records, folder.path.name, folder.path / "report.png")
    page = folder.path / "report.html"
    page.write_text(_page(folder, records, picture), encoding="utf-8")
    return page


def _page(folder: RunFolder, records: list[dict[str, Any]], picture: Path) -> str:
    summary = summarize(records)
    config = folder.path / "config.yaml"
    parts = [
        f"<h1>{escape.html(folder.path.name)}</h1>",
        main_figures([("", summary)]).html(),
        "<h2>Before and after</h2>",
        before_and_after(summary).html(),
        image(picture, "reward, accuracy and memory over the steps"),
        "<h2>Time and memory by phase</h2>",
        by_phase(summary).html(),
        "<h2>Completions</h2>",
        _completions(folder.completions.read()),
        "<h2>Where it ran</h2>",
        environment_table(folder.read_json("environment.json") or {}).html(),
        "<h2>Configuration</h2>",
        f"<pre>{escape.html(config.read_text(encoding='utf-8'))}</pre>" if config.is_file() else "",
    ]
    return document(folder.path.name, parts)


def document(title: str, parts: Iterable[str]) -> str:
    """A whole HTML page that needs no other file."""
    head = f'<meta charset="utf-8"><title>{escape.html(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def image(path: Path, alternative: str) -> str:
    """The picture, inside the page."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img alt="{escape.html(alternative)}" src="data:image/png;base64,{data}"></p>'


def _completions(records: list[dict[str, Any]]) -> str:
    shown = records if len(records) <= _SAMPLES else records[: _SAMPLES // 2] + records[-_SAMPLES // 2 :]
    if not shown:
        return "<p>None were kept.</p>"
    rows = []
    for record in shown:
        rewards = ", ".join(f"{name} {format_figure(value)}" for name, value in record["rewards"].items())
        rows.append((str(record["step"]), _text(record["prompt"]), _text(record["completion"]), rewards))
    return Table(("step", "prompt", "completion", "rewards"), rows, numbers=False).html()


def _text(value: Any) -> str:
    """A prompt or completion as text; a conversation as its messages, one a line."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in value)


def main(arguments: Sequence[str]) -> int:
    """`python -m recipes.report RUN …`; returns the exit status."""
    if not arguments:
        print("usage: python -m recipes.report RUN_FOLDER …", file=sys.stderr)
        return 2
    for path in arguments:
        try:
            print(write_report(RunFolder(path)))
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            return 2
    return 0
