"""A GRPO step of the Llama-3.1-8B architecture on a GPU, with each head: time and peak memory by phase.

    python -m benchmarks.step_gpu --output DIR            # all of it, 12 minutes on an H100
    python -m benchmarks.step_gpu --output DIR --toy      # the same code on a tiny model, on a CPU

Weights and tokens are random, and nothing is generated: sampling 16k tokens without vLLM takes minutes and has
nothing to do with the head. The batch goes to the trainer's own functions. Each stack runs in its own process
(benchmarks.step_stack), because importing Unsloth changes TRL permanently; results are stored after every row, beside
the rows that DIR already has of other stacks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.step_tables import write

ROOT = Path(__file__).resolve().parents[1]
STACKS = ("trl", "unsloth4", "unsloth16")
CHECKPOINT_BYTES = 17 * 10**9
GRACE = 25  # seconds that a row begun in time may take
# For every stack's process: no questions to the hub, and peaks that do not depend on fragmentation.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
# For toy ones: no GPU; TRL's Triton head by the interpreter, and Unsloth's GPU trainer nevertheless.
TOY_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "1",
    "UNSLOTH_ALLOW_CPU": "1",
    "UNSLOTH_COMPILE_DISABLE": "1",
}


def run(options: argparse.Namespace) -> Path:
    """Run the stacks one after another, each with its share of the remaining time; returns the results' path."""
    began = time.time()
    options.output.mkdir(parents=True, exist_ok=True)
    path = (options.output / f"step_{'toy' if options.toy else _gpu_name()}.json").resolve()
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results |= {"command": "python -m benchmarks.step_gpu --output DIR", "date": date.today().isoformat()}
    for name in ("setup_s", "failed"):
        results[name] = {k: v for k, v in results.get(name, {}).items() if k not in options.stacks}
    results["rows"] = [row for row in results.get("rows", []) if row["stack"] not in options.stacks]
    path.write_text(json.dumps(results, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = (options.checkpoint or Path(scratch) / "checkpoint").resolve()
        for place, stack in enumerate(options.stacks):
            if stack != "trl" and not options.toy and not checkpoint.exists():
                if shutil.disk_usage(scratch).free < CHECKPOINT_BYTES:
                    _note(path, stack, f"needs {CHECKPOINT_BYTES // 10**9} GB of disk for the checkpoint")
                    continue
                _start("checkpoint", path, checkpoint, began + options.limit, options.toy)
            left = began + options.limit - time.time()
            _start(stack, path, checkpoint, time.time() + left / (len(options.stacks) - place), options.toy)
    return path


def _start(stack: str, path: Path, checkpoint: Path, until: float, toy: bool) -> None:
    """One stack's process. One that fails or hangs becomes a line of the table."""
    command = [sys.executable, "-m", "benchmarks.step_stack", stack, "--results", str(path)]
    command += ["--checkpoint", str(checkpoint), "--until", str(until), *(["--toy"] if toy else [])]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | ENVIRONMENT | (TOY_ENVIRONMENT if toy else {}) | {"PYTHONPATH": paths}
    print(f"== {stack}", flush=True)
    try:
        # Unsloth writes its compiled cache into the working folder.
        subprocess.run(
            command, env=environment, cwd=checkpoint.parent, check=True,
            timeout=max(until - time.time(), 0) + GRACE,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        _note(path, stack, f"exit status {error.returncode}; the output says why")
    except subprocess.TimeoutExpired:
        _note(path, stack, "ran out of its time")


def _note(path: Path, stack: str, why: str) -> None:
    results: dict[str, Any] = json.loads(path.read_text())
    results["failed"][stack] = why
    path.write_text(json.dumps(results, indent=1) + "\n")
    write(path)
    print(f"{stack}: {why}", flush=True)


def _gpu_name() -> str:
    """Asked of the driver, because this process must not hold memory on the card."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1].lower()


def main(argv: list[str] | None = None) -> Path:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument(
        "--limit", type=float, default=800, help="seconds after which no further row is begun"
    )
    parser.add_argument("--toy", action="store_true")
    parser.add_argument(
        "--checkpoint", type=Path, help="what Unsloth loads: kept there, and used if it is there"
    )
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
