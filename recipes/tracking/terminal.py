"""The run in the terminal: a progress bar with reward, accuracy and memory, and the table at its end."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from rich import progress as rich_progress
from rich.console import Console

from recipes import escape
from recipes.config.load import RunConfig
from recipes.tracking.rates import rollouts, together
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.speed import WHOLE
from recipes.tracking.summary import (
    LEFT_OUT,
    RATE,
    before_and_after,
    by_phase,
    by_speed,
    format_mib,
    percent,
    tokens_in_words,
)

# Columns of "GRPO", a short bar, the step without its two numbers, the hours left, and what is between them.
_BESIDE = 27
_PLAIN_LINES = 20  # lines of a whole run where there is no terminal to draw a bar in


def silence_bars() -> None:
    """No bars of transformers' own, of loading and saving: they would run through the run's."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def opening(config: RunConfig, device: str) -> str:
    """A run's first line: what is trained on what, by what, and where."""
    model = config.model
    what = "a new Llama" if model.loader == "scratch" else str(model.name)
    step = "Unsloth's" if config.unsloths_step else config.step.impl
    how = "every weight" if config.lora is None else f"adapters of rank {config.lora.r}"
    return (
        f"{config.run.name}: {what} ({model.loader}, {how}) learns {config.task.name} by GRPO; "
        f"head {config.head.impl}, step {step}, on {device}"
    )


class Progress:
    """A bar in a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: rich_progress.Progress | None = None
        self._task = rich_progress.TaskID(0)
        self._total = 0
        self._reward = self._accuracy = self._memory = "–"
        self._peak = 0.0
        self._tokens: list[str] = []
        self._floor: list[str] = []
        self._steps: list[dict[str, Any]] = []  # logged ones of the rollout that runs
        self._whole: list[dict[str, Any]] = []  # and of the one before

    def start(self, step: int, total: int, accuracy: float | None = None) -> None:
        """Begins at `step` of `total` optimizer steps; accuracy: the last that was measured before."""
        self._total = total
        if accuracy is not None:
            self._accuracy = f"{accuracy:.3f}"
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

    def accuracy(self, step: int, value: float, problems: int | None = None) -> None:
        """Shows a new accuracy, 0 to 1, of so many held-out problems: before and after GRPO in a line of its own."""
        self._accuracy = f"{value:.3f}"
        if self._bar is not None:
            self._bar.update(self._task, figures=self._figures())
        when = "before GRPO" if step == 0 else "after GRPO" if step == self._total else f"step {step}"
        if self._bar is None or step in (0, self._total):
            of = f" of {problems} held-out problems" if problems else ""
            self._console.print(f"{when}: accuracy {value:.3f}{of}", highlight=False, soft_wrap=True)

    def logged(self, step: int, record: dict[str, Any], peaks: Iterable[float | None]) -> None:
        """Shows a logged step; `peaks` are MiB by phase."""
        if record.get("reward") is not None:
            self._reward = f"{record['reward']:.3f}"
        self._peak = max([self._peak, *(peak for peak in peaks if peak is not None)])
        self._memory = format_mib(self._peak) if self._peak else "–"
        self._steps.append(record)
        *whole, last = rollouts(self._steps) or [[]]
        if whole:
            self._steps = last
        # The last whole rollout; the first as far as it goes, and one of a single step at once.
        self._whole = whole[-1] if whole else self._whole
        if shown := self._whole if len(self._whole) > 1 else last:
            self._speed(together(shown))
        if self._bar is not None:
            self._bar.update(self._task, figures=self._figures())
        elif step % max(1, self._total // _PLAIN_LINES) == 0 or step == self._total:
            self._console.print(
                f"step {step}/{self._total}: {self._figures()}", highlight=False, soft_wrap=True
            )

    def _speed(self, rollout: dict[str, Any]) -> None:
        if tokens := tokens_in_words(rollout.get("tokens") or {}):
            self._tokens = [f"{tokens[RATE]} tokens/s", f"{tokens[LEFT_OUT]} left out"]
        if share := (rollout.get("speed") or {}).get(WHOLE):
            self._floor = [f"{percent(share['share'])} of the matrix rate"]

    def stop(self) -> None:
        """Leaves the bar where it is."""
        if self._bar is not None:
            with contextlib.suppress(Exception):
                self._bar.stop()
            self._bar = None

    def _figures(self) -> str:
        """In a line whole; beside a bar those that leave it, the step and the time their room."""
        figures = [f"reward {self._reward}", f"accuracy {self._accuracy}", f"peak {self._memory}"]
        figures += [*self._tokens, *self._floor]
        if self._console.is_terminal:
            room = self._console.width - _BESIDE - 2 * len(str(self._total))
            while len(figures) > 1 and len("  ".join(figures)) > room:
                figures.pop()
        return "  ".join(figures)


def print_summary(summary: dict[str, Any], folder: RunFolder, console: Console | None = None) -> None:
    """The final table: accuracy, reward and tokens before and after, time and peak memory by phase; what is where."""
    console = console or Console()
    title = f"{folder.name}: {summary['steps']} steps"
    console.print(replace(before_and_after(summary), title=title).terminal())
    console.print(by_phase(summary).terminal())
    if (speed := by_speed(summary)) is not None:
        console.print(speed.terminal())
    left = [("run folder", str(folder.path))]
    for name, place in (("report", folder.path / "report.html"), ("model", folder.final)):
        left += [(name, str(place))] if place.exists() else []
    if folder.final.exists():
        left.append(("ask it", shlex.join(["python", "-m", "recipes.ask", str(folder.path)])))
    for name, value in left:
        console.print(escape.terminal(f"{name + ':':<12}{value}"), soft_wrap=True, highlight=False)
