"""Two to five runs side by side: tables in the terminal, and one picture and one HTML page of them together.

    python -m recipes.report.compare runs/quickstart runs/quickstart-full --out comparison

prints tables, and from which step the trajectories part; with --out it writes comparison.png and comparison.html too.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from recipes import escape
from recipes.config.source import read_file
from recipes.output import lasting_output
from recipes.problems import visible
from recipes.report.html import figures, render
from recipes.report.plots import plot_overlay
from recipes.report.verdict import parting, verdict
from recipes.stops import stopped_in_a_line
from recipes.table import Table
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.summary import main_figures, summarize

MOST = 5  # runs whose lines can still be told apart


def compare(
    paths: Sequence[str | Path], out: Path | None = None, console: Console | None = None
) -> Path | None:
    """Prints the comparison of two to five runs; with `out` writes out.png and out.html too, and returns the latter.

    Raises FileNotFoundError, naming the folder, if one has no metrics, and ValueError for fewer or more runs, or for
    `out` without a name.
    """
    console = console or Console()
    runs, out = _read(paths), out and _place(out)
    summaries = [(name, summarize(records)) for name, records in runs.items()]
    tables = [
        main_figures(summaries, "figures"),
        config_differences(list(runs), [Path(path) / "config.yaml" for path in paths]),
    ]
    for table in tables:
        console.print(table.terminal())
    (first, records), *others = runs.items()
    partings = [parting(first, records, name, other) for name, other in others]
    for sentence in partings:
        console.print(escape.terminal(sentence))
    if out is None:
        return None
    plot_overlay(runs, out.with_name(out.name + ".png"))
    page = out.with_name(out.name + ".html")
    text = render(
        "comparison",
        title=" against ".join(runs),
        partings=partings,
        runs=[(name, verdict(run)) for name, run in runs.items()],
        figures=figures(runs),
        tables=tables,
    )
    page.write_text(text, encoding="utf-8")
    return page


def _place(out: Path) -> Path:
    """Where OUT.png and OUT.html go: the name of either is taken for OUT, and its folder is made."""
    out = out.with_suffix("") if out.suffix in (".html", ".png") else out
    if not out.name or out.name == "..":
        raise ValueError(f"--out {out}: is a folder; name a file in it, such as {out / 'comparison'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _read(paths: Sequence[str | Path]) -> dict[str, list[dict[str, Any]]]:
    """The records of each run, by a unique name."""
    if not 2 <= len(paths) <= MOST:
        raise ValueError(f"runs: {len(paths)} given; give two to {MOST} run folders")
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ValueError(f"runs: {', '.join(map(str, paths))}: a folder is given twice; leave one out")
    folders = [RunFolder(path) for path in paths]
    names = Counter(folder.name for folder in folders)
    runs: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        records = folder.metrics.read()
        if not records:
            raise FileNotFoundError(
                f"{folder.path}: no metrics.jsonl with a line in it; give the folders of runs"
            )
        # Of one name, each by its path: of the first run as of the others.
        runs[folder.name if names[folder.name] == 1 else str(folder.path)] = records
    return runs


def config_differences(names: Sequence[str], paths: Sequence[Path]) -> Table:
    """The keys in which configurations differ, with their values, a column per run."""
    flat = [_flatten(read_file(path).data) if path.is_file() else {} for path in paths]
    keys = dict.fromkeys(key for data in flat for key in data if key != "run.name")
    rows = [(key, *(str(data.get(key, "–")) for data in flat)) for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return Table(("key", *names), differing, "what differs in the configurations", numbers=False)


def _flatten(data: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {key: data}
    found: dict[str, Any] = {}
    for word, value in data.items():
        found |= _flatten(value, f"{key}.{word}" if key else str(word))
    return found


@lasting_output()
@stopped_in_a_line
def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m recipes.report.compare", description="runs side by side")
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, help="writes OUT.png and OUT.html")
    options = parser.parse_args(list(arguments))
    try:
        page = compare(options.runs, options.out)
    except (OSError, ValueError) as error:
        print(visible(str(error)), file=sys.stderr)
        return 2
    if page is not None:
        print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
