"""A run's report: report.html in one self-contained file, and report.png for a README.

python -m recipes.report runs/quickstart
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.config.source import read_text
from recipes.output import lasting_output
from recipes.problems import ConfigError, visible
from recipes.report.advice import advice
from recipes.report.html import figures, render
from recipes.report.plots import plot_run
from recipes.report.verdict import verdict
from recipes.stops import stopped_in_a_line
from recipes.tracking.environment import environment_table
from recipes.tracking.files import naming_what_failed, write_whole
from recipes.tracking.meters import MEANING
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.summary import (
    before_and_after,
    by_phase,
    by_speed,
    format_figure,
    format_mib,
    highest_peak,
    summarize,
)

_SAMPLES = 3  # completions shown per step
_LONG = (400, 12)  # characters and lines beyond which a text is folded
_HEAD = (200, 5)  # those that stay in sight


def write_report(folder: RunFolder) -> Path:
    """Writes report.png and report.html into the folder from its other files; returns the HTML's path.

    Raises FileNotFoundError if the folder has no metrics, CannotWrite for a full disk and the like.
    """
    records = folder.metrics.read()
    if not records:
        raise FileNotFoundError(
            f"{folder.path}: no metrics.jsonl with a line in it; give the folder of a run"
        )
    with naming_what_failed(folder.path / "report.png"):
        plot_run(records, folder.name, folder.path / "report.png")
    summary, outcome = summarize(records), verdict(records)
    file = folder.path / "config.yaml"
    config = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    page = render(
        "report",
        title=folder.name,
        verdict=outcome,
        advice=[] if outcome.kind == "better" else advice(records, _weights(config)),
        facts=_facts(summary),
        figures=figures({folder.name: records}, folder.read_json("plan.json")),
        tables=[
            table for table in (before_and_after(summary), by_phase(summary), by_speed(summary)) if table
        ],
        samples=list(_samples(folder.completions.read())),
        environment=environment_table(folder.read_json("environment.json") or {}),
        config=config,
    )
    path = folder.path / "report.html"
    return write_whole(path, page)


def _weights(config: str) -> Mapping[str, float]:
    """Of a run's rewards, from its config.yaml; none where the task's own hold, or the file is not a run's."""
    try:
        weights = read_text(config, "config.yaml").data["task"]["rewards"]
    except (ConfigError, KeyError, TypeError):
        return {}
    return weights if isinstance(weights, dict) else {}


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The few figures that stand below the verdict."""
    steps, seconds, figure = summary["steps"], summary["seconds_total"], summary["memory_figure"]
    found = [("optimizer steps", str(steps))]
    if summary["reward_first"] is not None:
        reward = f"{format_figure(summary['reward_first'])} → {format_figure(summary['reward_last'])}"
        found.append(("reward, first and last tenth of the steps", reward))
    if steps and seconds:
        found += [("training time", duration(seconds)), ("a step", f"{seconds / steps:.2f} s")]
    peak = highest_peak(summary, figure)
    return found if peak is None else [*found, (MEANING[figure], format_mib(peak))]


def duration(seconds: float) -> str:
    """Seconds in readable units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


@dataclass(frozen=True)
class Text:
    """A prompt or completion; a long one is folded behind its beginning."""

    whole: str

    @property
    def folded(self) -> bool:
        """Whether it is long."""
        return len(self.whole) > _LONG[0] or self.whole.count("\n") >= _LONG[1]

    @property
    def head(self) -> str:
        """What stays in sight of a folded one."""
        characters, lines = _HEAD
        return "\n".join(self.whole[:characters].split("\n")[:lines]).rstrip()

    @property
    def length(self) -> str:
        """Characters in all."""
        return f"{len(self.whole):,}"


def _samples(records: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Completions of the first, a middle and the last step that have some."""
    records = [record for record in records if record.keys() >= {"step", "prompt", "completion", "rewards"}]
    steps = sorted({record["step"] for record in records})
    chosen = dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]]) if steps else {}
    names = ["First", "Middle", "Last"] if len(chosen) == 3 else ["First", "Last"]
    for name, step in zip(names, chosen, strict=False):
        found = [record for record in records if record["step"] == step][:_SAMPLES]
        completions = [
            {
                "prompt": Text(_text(record["prompt"])),
                "completion": Text(_text(record["completion"])),
                "rewards": _judged(record),
            }
            for record in found
        ]
        yield {"heading": f"{name}: step {step}", "completions": completions}


def _judged(record: dict[str, Any]) -> str:
    rewards = [f"{name} {format_figure(value)}" for name, value in record["rewards"].items()]
    advantage = record.get("advantage")
    return " · ".join(
        rewards if advantage is None else [*rewards, f"advantage {advantage:+.2f}".replace("-", "−")]
    )


def _text(value: Any) -> str:
    """A prompt or completion as text; a conversation as its messages, one per line."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in value)


@lasting_output()
@stopped_in_a_line
def main(arguments: Sequence[str]) -> int:
    """`python -m recipes.report RUN …`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m recipes.report", description="the report of each run")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_FOLDER", help="writes report.html and report.png into it"
    )
    arguments = parser.parse_args(list(arguments)).runs
    for path in arguments:
        try:
            print(write_report(RunFolder(path)))
        except (ConfigError, OSError) as error:
            print(visible(str(error)), file=sys.stderr)
            return 2
    return 0
