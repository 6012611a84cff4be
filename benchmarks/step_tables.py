"""The table of benchmarks.step_gpu.

python -m benchmarks.step_tables benchmarks/results/step_h100.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PHASES = ("scoring", "forward", "backward", "optimizer")
STACKS = {
    "trl": "TRL and transformers, bf16",
    "unsloth4": "Unsloth, 4-bit",
    "unsloth16": "Unsloth, 16-bit",
}
MIB_OF_GIB = 1024


def write(path: Path) -> None:
    """``step_x.md`` beside ``step_x.json``."""
    path.with_suffix(".md").write_text(markdown(json.loads(path.read_text())))


def markdown(results: dict[str, Any]) -> str:
    """One table per stack."""
    versions = ", ".join(f"{name} {release}" for name, release in results.get("versions", {}).items())
    lines = [
        "# A GRPO step, by head",
        "",
        f"{results.get('machine', '')}; {versions}; {results['date']}. `{results['command']}`",
        "",
        "The Llama-3.1-8B architecture with random weights, LoRA of rank 16 on every linear layer but the head,",
        "gradient checkpointing (Unsloth: its own, which offloads), SDPA attention. A prompt of 128 random tokens and",
        "completions of the length given; two sequences a batch up to 4k tokens, then one. Nothing is generated: the",
        "batch goes to the trainer's own functions for scoring without gradient (as for the old policy or the",
        "reference) and for the loss. Unsloth sizes its micro-batches by the memory that is free.",
        "",
        "A phase: seconds, and in brackets the allocator's peak in GiB above the model, adapters and optimizer state.",
        "Step: seconds of all phases, the optimizer among them. The heads take turns, there and back, each with an",
        "untimed step and a timed one; the faster of two (one at the greatest length). Peak: GiB in all. Weights stay",
        "as they are, so the losses of a length agree as far as the heads do. The head *trl* is the stack's own.",
    ]
    for stack, title in STACKS.items():
        rows = [row for row in results["rows"] if row["stack"] == stack]
        if rows:
            lines += ["", f"## {title}", "", *_table(rows)]
        if stack in results["failed"]:
            lines += ["", f"{title}: {results['failed'][stack]}."]
    if "checkpoint" in results["failed"]:
        lines += ["", f"Unsloth's checkpoint: {results['failed']['checkpoint']}."]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| completion | head | scoring | forward and loss | backward | step | peak | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["length"]):
        bold = "**" if row["head"] == "memhead" else ""
        cells = [f"{row['sequences']} × {row['length']}", f"{bold}{row['head']}{bold}"]
        if "error" in row:
            cells += [row["error"].replace("|", "/").replace("\n", " "), *[""] * 5]
        else:
            cells += [_phase(row, name) for name in PHASES[:3]]
            cells += [f"{row['seconds']['step']:.2f} s", _gib(max(row["peak_mib"].values()))]
            cells += [f"{row['loss']:.6f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _phase(row: dict[str, Any], name: str) -> str:
    above = row["peak_mib"][name] - row["loaded_mib"]
    return f"{row['seconds'][name]:.2f} s ({_gib(above)})"


def _gib(mib: float) -> str:
    return f"{mib / MIB_OF_GIB:.2f}"


if __name__ == "__main__":
    write(Path(sys.argv[1]))
