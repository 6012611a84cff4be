"""One configuration under several settings at once, a run a GPU, and their curves side by side.

    python -m benchmarks.recipe_search --config configs/smollm2_135m_char_count.yaml --output DIR \\
      --run "published" --run "warmed: grpo.learning_rate=3.0e-6 grpo.lr_scheduler_type=constant_with_warmup" \\
      [--limit SECONDS] [model.name=FOLDER …]

Each `--run` is a name and, after a colon, its overrides; those at the end hold for all. More runs than GPUs wait their
turn; without a GPU they run one after another. A run that the limit ends is stopped by Ctrl-C, in order. Writes
search.json, search.md and each run's log into DIR, which stays after the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from recipes.tracking.run_folder import RunFolder

GRACE = 60.0  # seconds that a run has to end in order


@dataclass(frozen=True)
class Run:
    """One setting. overrides: `section.key=value`."""

    name: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Run:
        """From `name: overrides`, or a name alone."""
        name, _, rest = text.partition(":")
        return cls(name.strip().replace(" ", "-"), tuple(shlex.split(rest)))


def main(argv: list[str] | None = None) -> int:
    """Run them all; the files are written after each. Status 1 if one did not end as it should."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--run", action="append", type=Run.parse, required=True, metavar="NAME[: OVERRIDES]")
    parser.add_argument("--limit", type=float, default=86400.0, help="seconds of a run at most")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    devices = [str(index) for index in range(torch.cuda.device_count())] or [""]
    waiting: Queue[Run] = Queue()
    for run in options.run:
        waiting.put(run)
    done: dict[str, dict[str, Any]] = {}

    def work(device: str) -> None:
        while not waiting.empty():
            run = waiting.get()
            done[run.name] = take(run, device, options)
            write([done[each.name] for each in options.run if each.name in done], options)

    threads = [threading.Thread(target=work, args=(device,)) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print((options.output / "search.md").read_text(encoding="utf-8"))
    return int(any(found["status"] not in (0, 130) for found in done.values()))


def take(run: Run, device: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run to its end or the limit, and its figures."""
    root = options.output.resolve()
    words = [
        sys.executable, "train_grpo.py", "--config", options.config, f"run.output_root={root}",
        f"run.name={run.name}", *options.overrides, *run.overrides,
    ]  # fmt: skip
    place = dict(os.environ, CUDA_VISIBLE_DEVICES=device) if device else None
    began = time.perf_counter()
    with (root / f"{run.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(words, env=place, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = process.wait(options.limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                status = process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
    return {"run": run.name, "overrides": run.overrides, "status": status, **figures(root / run.name),
            "seconds": time.perf_counter() - began}  # fmt: skip


def figures(path: Path) -> dict[str, Any]:
    """Accuracies by step, the sampled reward's curve, and seconds a step by phase after the first generation."""
    folder = RunFolder(path)
    lines = folder.metrics.read() if path.is_dir() else []
    steps = [line for line in lines if "time" in line]
    first = next((place for place, line in enumerate(steps[1:], 1) if "generation" in line["time"]), 0)
    later = steps[first:]
    return {
        "accuracy": [(line["step"], line["accuracy"]) for line in lines if line.get("accuracy") is not None],
        "reward": [(line["step"], line["reward"]) for line in lines if line.get("reward") is not None],
        "step_seconds": {
            phase: statistics.fmean(line["time"].get(phase, 0.0) for line in later)
            for phase in dict.fromkeys(phase for line in later for phase in line["time"])
        },
        "peak_mib": max(
            (peaks.get("allocated_peak_mib", 0.0) for line in steps for peaks in line["memory"].values()),
            default=None,
        ),
    }


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Both files, from the runs so far."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = {"config": options.config, "overrides": options.overrides, "device": device, "runs": rows}
    (options.output / "search.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [
        "| run | settings | first accuracy | last | at step | best | reward, first tenth | last tenth | seconds a step "
        "| all |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracy, rewards = row["accuracy"], [value for _, value in row["reward"]]
        tenth = max(1, len(rewards) // 10)
        ends = [
            f"{statistics.fmean(part):.3f}" if part else "–" for part in (rewards[:tenth], rewards[-tenth:])
        ]
        seen = [
            f"{accuracy[0][1]:.3f}", f"{accuracy[-1][1]:.3f}", str(accuracy[-1][0]),
            f"{max(value for _, value in accuracy):.3f}",
        ] if accuracy else ["–"] * 4  # fmt: skip
        cells = [row["run"], " ".join(row["overrides"]) or "as it stands", *seen, *ends,
                 f"{sum(row['step_seconds'].values()):.2f}", f"{row['seconds']:.0f} s"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    (options.output / "search.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
