"""A run's report: report.png, and report.html in one self-contained file.

python -m recipes.report runs/quickstart
"""

from __future__ import annotations

import base64
import html
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recipes.report.plots import plot_run
from recipes.tracking.meters import MEANING
from recipes.tracking.phases import PHASES
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.summary import figures_before_and_after, format_figure, summarize
from recipes.tracking.terminal import format_mib

_SAMPLES = 12  # completions shown: the first logged steps' and the last ones'
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}img{max-width:100%}
table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid #ddd;
vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
pre,code{font:13px/1.45 ui-monospace,monospace}pre{background:#f6f6f6;padding:.8rem;overflow:auto}
td code{white-space:pre-wrap;overflow-wrap:anywhere}"""


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
        f"<h1>{html.escape(folder.path.name)}</h1>",
        figures_table([("", summary)]),
        "<h2>Before and after</h2>",
        table(["", "before", "after"], _escaped(figures_before_and_after(summary))),
        image(picture, "reward, accuracy and memory over the steps"),
        "<h2>Time and memory by phase</h2>",
        _phases(summary),
        "<h2>Completions</h2>",
        _completions(folder.completions.read()),
        "<h2>Where it ran</h2>",
        table(["", ""], _escaped(environment_rows(folder.read_json("environment.json") or {}))).replace(
            ' class="n"', ""
        ),
        "<h2>Configuration</h2>",
        f"<pre>{html.escape(config.read_text(encoding='utf-8'))}</pre>" if config.is_file() else "",
    ]
    return document(folder.path.name, parts)


def document(title: str, parts: Iterable[str]) -> str:
    """A whole HTML page that needs no other file."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; every column but the first is numbers. Cells are HTML already."""
    heads = "".join(f"<th{_number(i)}>{cell}</th>" for i, cell in enumerate(header))
    body = "".join(
        "<tr>" + "".join(f"<td{_number(i)}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{heads}</tr>{body}</table>"


def _number(column: int) -> str:
    return ' class="n"' if column else ""


def image(path: Path, alternative: str) -> str:
    """The picture, inside the page."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}"></p>'


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The main figures of a summary with their names, as text."""
    figure = summary["memory_figure"]
    peaks = [figures[figure] for figures in summary["memory"].values() if figure in figures]
    seconds_a_step = summary["seconds_total"] / summary["steps"] if summary["steps"] else None
    return [
        ("optimizer steps", str(summary["steps"])),
        ("accuracy before", format_figure(summary["accuracy_before"])),
        ("accuracy after", format_figure(summary["accuracy_after"])),
        ("reward, first tenth of the steps", format_figure(summary["reward_first"])),
        ("reward, last tenth", format_figure(summary["reward_last"])),
        ("training time", f"{summary['seconds_total']:.1f} s"),
        ("time a step", "–" if seconds_a_step is None else f"{seconds_a_step:.3f} s"),
        (f"highest {MEANING[figure]}", format_mib(max(peaks)) if peaks else "–"),
    ]


def figures_table(summaries: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The main figures of one run or several, a column each."""
    columns = [dict(summary_rows(summary)) for _, summary in summaries]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [
        [html.escape(name), *(html.escape(column.get(name, "–")) for column in columns)] for name in names
    ]
    return table(["", *(html.escape(name) for name, _ in summaries)], rows)


def _escaped(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[html.escape(cell) for cell in row] for row in rows]


def _phases(summary: dict[str, Any]) -> str:
    figures = sorted({figure for peaks in summary["memory"].values() for figure in peaks})
    rows = []
    for phase in (p for p in PHASES if p in summary["seconds"]):
        peaks = summary["memory"].get(phase, {})
        memory = [format_mib(peaks[figure]) if figure in peaks else "–" for figure in figures]
        rows.append([phase, f"{summary['seconds'][phase]:.1f}", *memory])
    return table(["phase", "seconds", *(MEANING.get(figure, figure) for figure in figures)], rows)


def _completions(records: list[dict[str, Any]]) -> str:
    shown = records if len(records) <= _SAMPLES else records[: _SAMPLES // 2] + records[-_SAMPLES // 2 :]
    if not shown:
        return "<p>None were kept.</p>"
    rows = []
    for record in shown:
        rewards = ", ".join(f"{name} {format_figure(value)}" for name, value in record["rewards"].items())
        texts = [f"<code>{html.escape(_text(record[key]))}</code>" for key in ("prompt", "completion")]
        rows.append([str(record["step"]), *texts, html.escape(rewards)])
    return table(["step", "prompt", "completion", "rewards"], rows).replace(' class="n"', "")


def _text(value: Any) -> str:
    """A prompt or completion as text; a conversation as its messages, one a line."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in value)


def environment_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """environment.json as rows of a table: machine, versions, commit, command."""
    packages = ", ".join(f"{name} {version}" for name, version in found.get("packages", {}).items())
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in found.get("gpus", [])) or "none"
    git = found.get("git") or {}
    commit = git.get("commit", "unknown") + (" with changes" if git.get("modified") else "")
    return [
        (
            "machine",
            f"{found.get('cpu')}, {found.get('cores')} cores, {found.get('memory_gib')} GiB; GPU: {gpus}",
        ),
        ("versions", f"Python {found.get('python')}, {packages}"),
        ("commit", commit),
        ("command", " ".join(found.get("command", []))),
    ]


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
