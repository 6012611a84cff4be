"""GRPO on two GPUs of one host beside one: DDP, FSDP2, the vocabulary-parallel head; peaks, seconds, the same numbers.

    python -m benchmarks.multi_gpu --output DIR            # under 9 minutes on two H100s
    python -m benchmarks.multi_gpu --output DIR --toy      # the same code on a tiny model, two processes on a CPU
    python -m benchmarks.multi_gpu --output DIR --stages head

Random weights and tokens, LoRA on every linear layer, bfloat16; nothing is generated. One GPU takes all groups of a
rollout, each of two takes half of them: `seconds` is one accumulation window, forward and backward and the exchange of
gradients, `peak_gib` that of each process. `loss` and `gradient_error` compare with one GPU's packed step: the error
relative to the gradient's norm, whose yardstick is that of TRL's way on one GPU. `head` is the head alone. Each stage
is a process, or two under torchrun (benchmarks.multi_gpu_rank); results are stored after every row, and a stage that
ends with an error is started again without the rows that it had begun.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"one": 1, "ddp": 2, "fsdp2": 2, "head": 2}  # name -> processes
SHARES = {"one": 0.28, "ddp": 0.31, "fsdp2": 0.31, "head": 0.1}  # of the time
GRACE = 30  # seconds that a row begun in time may take


def run(options: argparse.Namespace) -> Path:
    """The stages one after another; returns the path of the results."""
    began = time.time()
    options.output.mkdir(parents=True, exist_ok=True)
    path = (options.output / f"multi_{'toy' if options.toy else 'gpu'}.json").resolve()
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": [], "failed": {}}
    results["rows"] = [row for row in results["rows"] if row["stage"] not in options.stages]
    results["failed"] = {name: why for name, why in results["failed"].items() if name not in options.stages}
    results["command"] = "python -m benchmarks.multi_gpu --output DIR"
    path.write_text(json.dumps(results, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        left = {name: SHARES[name] for name in options.stages}
        for stage in options.stages:
            share = left[stage] / sum(left.values())
            until = time.time() + share * (began + options.limit - time.time())
            del left[stage]
            start(stage, path, Path(scratch), until, options)
            path.with_suffix(".md").write_text(tables(json.loads(path.read_text())))
    print(path.with_suffix(".md").read_text())
    return path


def start(stage: str, path: Path, scratch: Path, until: float, options: argparse.Namespace) -> None:
    """One stage's processes, started again after a row that fails, without it. What fails is a line of the table."""
    while True:
        begun = _rows(path, stage)
        why = launch(stage, path, scratch, until, options)
        if why is None:
            return
        print(f"{stage}: {why}", flush=True)
        results = json.loads(path.read_text())
        results["failed"][stage] = why
        path.write_text(json.dumps(results, indent=1) + "\n")
        if _rows(path, stage) == begun or time.time() > until - GRACE:
            return


def launch(stage: str, path: Path, scratch: Path, until: float, options: argparse.Namespace) -> str | None:
    """The stage's processes to their end; why it was no good one, or None."""
    launcher = [sys.executable]
    if STAGES[stage] > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={STAGES[stage]}"]
    command = [*launcher, "-m", "benchmarks.multi_gpu_rank", stage, "--results", str(path)]
    command += ["--scratch", str(scratch), "--until", str(until), "--models", *options.models]
    command += ["--toy"] if options.toy else []
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "NCCL_NVLS_ENABLE": "0",  # multicast over NVLink can put a host's cards out of service for others
    }  # fmt: skip
    if options.toy:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    elif STAGES[stage] == 1:
        environment |= {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    print(f"== {stage}", flush=True)
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    try:
        status = process.wait(timeout=max(until - time.time(), 0) + GRACE)
        return None if status == 0 else f"exit status {status}; the output says why"
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun passes it on
        try:
            process.wait(timeout=35)
        except subprocess.TimeoutExpired:
            process.kill()
        return "ran out of its time"


def _rows(path: Path, stage: str) -> int:
    return sum(row["stage"] == stage for row in json.loads(path.read_text())["rows"])


def tables(results: dict[str, Any]) -> str:
    """Markdown: the steps, the head, what FSDP2 gathered, what failed."""
    steps = [row for row in results["rows"] if "way" in row]
    heads = [row for row in results["rows"] if row["stage"] == "head"]
    gathers = [row for row in results["rows"] if "gathered" in row]
    lines = [results.get("device", "")]
    if steps:
        lines += [
            "",
            "| model | GPUs | way | seconds | of one GPU's | peak GiB by process | loss | gradient error |",
            "|---|---|---|---|---|---|---|---|",
        ]
        alone = {
            (r["model"], r["step"]): r["seconds"] for r in steps if r["stage"] == "one" and "seconds" in r
        }
        lines += [_step_line(row, alone.get((row["model"], row["step"]))) for row in steps]
    if heads:
        lines += ["", "| head alone | milliseconds | of its floor |", "|---|---|---|"]
        lines += [
            f"| {row['what']} | {row.get('error') or _figure(row['ms'], '.3f')} |"
            f" {_figure(row.get('of_floor'), '.2f')} |"
            for row in heads
        ]
    for row in gathers:
        lines += [
            "",
            f"FSDP2, {row['model']}, one window of {row['calls']} heads' calls; elements gathered: times",
        ]
        lines += [f"- {size}: {times}{what}" for size, times, what in row["gathered"]]
    lines += [f"\n{stage}: {why}" for stage, why in results["failed"].items()]
    return "\n".join(lines) + "\n"


def _step_line(row: dict[str, Any], alone: float | None) -> str:
    start = f"| {row['model']} | {row['processes']} | {row['way']} |"
    if "error" in row:
        return f"{start} {row['error']} |||||"
    share = _figure(None if alone is None else row["seconds"] / alone, ".2f")
    peaks = ", ".join(f"{peak:.2f}" for peak in row["peak_gib"])
    error = _figure(row.get("gradient_error"), ".2e")
    return f"{start} {row['seconds']:.3f} | {share} | {peaks} | {row['loss']:.5f} | {error} |"


def _figure(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def main(argv: list[str] | None = None) -> Path:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--limit", type=float, default=480, help="seconds after which nothing more is begun")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--models", nargs="+", default=["llama-1b", "llama-8b"])
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args(argv)
    if options.toy:
        options.models = ["toy"]
    return run(options)


if __name__ == "__main__":
    main()
