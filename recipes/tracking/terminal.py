"""The run in the terminal: a progress bar with reward, accuracy and memory, and the table at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.tracking.meters import MEANING
from recipes.tracking.phases import PHASES
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.summary import figures_before_and_after

_PLAIN_LINES = 20  # lines of a whole run where there is no terminal to draw a bar in


class Progress:
    """A bar in a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: rich_progress.Progress | None = None
        self._task = rich_progress.TaskID(0)
        self._total = 0
        self._reward = self._accuracy = self._memory = "–"
        self._peak = 0.0

    def start(self, step: int, total: int) -> None:
        """Begins at `step` of `total` optimizer steps."""
        self._total = total
        if not self._console.is_terminal:
            return
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("GRPO"),
            rich_progress.BarColumn(bar_width=None),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[figures]}"),
            rich_progress.TimeRemainingColumn(compact=True),
            console=self._console,
        )
        self._bar.start()
        self._task = self._bar.add_task("GRPO", total=total, completed=step, figures=self._figures())

    def advance(self, step: int) -> None:
        """`step` optimizer steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def accuracy(self, step: int, value: float) -> None:
        """Shows a new accuracy, 0 to 1."""
        self._accuracy = f"{value:.3f}"
        if self._bar is not None:
            self._bar.update(self._task, figures=self._figures())
        else:
            self._console.print(f"step {step}: accuracy {value:.3f}", highlight=False)

    def logged(self, step: int, record: dict[str, Any], peaks: Iterable[float | None]) -> None:
        """Shows a logged step; `peaks` are MiB by phase."""
        if record.get("reward") is not None:
            self._reward = f"{record['reward']:.3f}"
        self._peak = max([self._peak, *(peak for peak in peaks if peak is not None)])
        self._memory = format_mib(self._peak) if self._peak else "–"
        if self._bar is not None:
            self._bar.update(self._task, figures=self._figures())
        elif step % max(1, self._total // _PLAIN_LINES) == 0 or step == self._total:
            self._console.print(f"step {step}/{self._total}: {self._figures()}", highlight=False)

    def stop(self) -> None:
        """Leaves the bar where it is."""
        if self._bar is not None:
            with contextlib.suppress(Exception):
                self._bar.stop()
            self._bar = None

    def _figures(self) -> str:
        return f"reward {self._reward}  accuracy {self._accuracy}  peak {self._memory}"


def print_summary(summary: dict[str, Any], folder: RunFolder, console: Console | None = None) -> None:
    """The final table: accuracy and reward before and after, time and peak memory by phase, the folder."""
    console = console or Console()
    figures = Table(title=f"{folder.path.name}: {summary['steps']} steps", title_justify="left")
    figures.add_column("")
    figures.add_column("before", justify="right")
    figures.add_column("after", justify="right")
    for row in figures_before_and_after(summary):
        figures.add_row(*(escape(cell) for cell in row))
    console.print(figures)
    console.print(phase_table(summary))
    console.print(f"run folder: {folder.path}", highlight=False, soft_wrap=True)


def phase_table(summary: dict[str, Any]) -> Table:
    """Seconds, share of the time and every memory figure by phase."""
    names = sorted({figure for figures in summary["memory"].values() for figure in figures})
    names.sort(key=lambda name: name != summary["memory_figure"])
    table = Table()
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name in names:
        table.add_column(MEANING.get(name, name), justify="right")
    total = summary["seconds_total"] or 1.0
    for phase in PHASES:
        if phase in summary["seconds"]:
            peaks = summary["memory"].get(phase, {})
            cells = [format_mib(peaks[name]) if name in peaks else "–" for name in names]
            seconds = summary["seconds"][phase]
            table.add_row(phase, f"{seconds:.1f}", f"{100 * seconds / total:.0f} %", *cells)
    table.add_row(
        "all", f"{summary['seconds_total']:.1f}", "", *(_highest(summary["memory"], name) for name in names)
    )
    return table


def _highest(memory: dict[str, dict[str, float]], figure: str) -> str:
    values = [figures[figure] for figures in memory.values() if figure in figures]
    return format_mib(max(values)) if values else "–"


def format_mib(value: float) -> str:
    """MiB in readable units."""
    return f"{value / 1024:.2f} GiB" if value >= 1024 else f"{value:.1f} MiB"
