"""Two runs, or a few, side by side: a table in the terminal, and one picture and one HTML page of them together.

    python -m recipes.report.compare runs/quickstart runs/quickstart-full --out comparison

writes comparison.png and comparison.html; without --out only the table is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from recipes.report.page import document, figures_table, image, summary_rows, table
from recipes.report.plots import plot_overlay
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.summary import summarize


def compare(
    paths: Sequence[str | Path], out: Path | None = None, console: Console | None = None
) -> Path | None:
    """Prints the comparison; with `out` also writes out.png and out.html, and returns the page's path.

    Raises FileNotFoundError, naming the folder, if one has no metrics.
    """
    console = console or Console()
    runs = {}
    for path in paths:
        folder = RunFolder(path)
        records = folder.metrics.read()
        if not records:
            raise FileNotFoundError(f"{path}: no metrics.jsonl with a line in it; give the folders of runs")
        name = folder.path.name if folder.path.name not in runs else str(folder.path)
        runs[name] = records
    summaries = [(name, summarize(records)) for name, records in runs.items()]
    differences = config_differences([Path(path) / "config.yaml" for path in paths])
    for part in (_figures(summaries), _differences(list(runs), differences)):
        console.print(part)
    if out is None:
        return None
    picture = plot_overlay(runs, out.with_name(out.name + ".png"))
    page = out.with_name(out.name + ".html")
    parts = [
        f"<h1>{' against '.join(runs)}</h1>",
        figures_table(summaries),
        image(picture, "the runs laid over each other"),
        "<h2>What differs in their configurations</h2>",
        table(["key", *runs], [[key, *values] for key, values in differences.items()]),
    ]
    page.write_text(document(" against ".join(runs), parts), encoding="utf-8")
    return page


def config_differences(paths: Sequence[Path]) -> dict[str, list[str]]:
    """Dotted key -> its value in each configuration, for the keys in which they differ."""
    flat = [
        _flatten(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {} for path in paths
    ]
    keys = dict.fromkeys(key for data in flat for key in data)
    rows = {key: [str(data.get(key, "–")) for data in flat] for key in keys if key != "run.name"}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _flatten(data: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {key: data}
    found: dict[str, Any] = {}
    for word, value in data.items():
        found |= _flatten(value, f"{key}.{word}" if key else str(word))
    return found


def _figures(summaries: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    rich_table = Table("", *(name for name, _ in summaries), title="figures", title_justify="left")
    columns = [summary_rows(summary) for _, summary in summaries]
    for rows in zip(*columns, strict=True):
        rich_table.add_row(rows[0][0], *(value for _, value in rows))
    return rich_table


def _differences(names: list[str], differences: dict[str, list[str]]) -> Table:
    rich_table = Table("key", *names, title="what differs in the configurations", title_justify="left")
    for key, values in differences.items():
        rich_table.add_row(key, *values)
    return rich_table


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m recipes.report.compare", description="runs side by side")
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, help="writes OUT.png and OUT.html")
    options = parser.parse_args(list(arguments))
    try:
        page = compare(options.runs, options.out)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    if page is not None:
        print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
