"""The run in the terminal: a progress bar with reward, accuracy and memory, and the table at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from rich import progress as rich_progress
from rich.console import Console

from recipes import escape
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.speed import WHOLE
from recipes.tracking.summary import (
    before_and_after,
    by_phase,
    by_speed,
    format_mib,
    percent,
    tokens_in_words,
)

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
        self._tokens = self._floor = ""

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
        if tokens := tokens_in_words(record.get("tokens") or {}):
            rate, left_out = tokens.values()
            self._tokens = f"  {rate} tokens/s  {left_out} left out"
        if share := (record.get("speed") or {}).get(WHOLE):
            self._floor = f"  {percent(share['share'])} of the matrix rate"
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
        return f"reward {self._reward}  accuracy {self._accuracy}  peak {self._memory}{self._tokens}{self._floor}"


def print_summary(summary: dict[str, Any], folder: RunFolder, console: Console | None = None) -> None:
    """The final table: accuracy, reward and tokens before and after, time and peak memory by phase, the folder."""
    console = console or Console()
    title = f"{folder.path.name}: {summary['steps']} steps"
    console.print(replace(before_and_after(summary), title=title).terminal())
    console.print(by_phase(summary).terminal())
    if (speed := by_speed(summary)) is not None:
        console.print(speed.terminal())
    console.print(escape.terminal(f"run folder: {folder.path}"), soft_wrap=True)
