"""How far a trainer's probabilities are from vLLM's: its head, or ours, times vLLM's head as it comes, or in float32.

    python -m benchmarks.mismatch_gpu --model FOLDER --output DIR [--rollouts 2]

Four short runs of configs/smollm2_135m_char_count_published.yaml without its supervised start, one process each,
since a process starts one engine. FOLDER: best what that start left, RUN/warm_start. Of the first step of each rollout,
where nothing has been updated since: the mean difference of log-probabilities in nats, the part that rounding the head
explains, and the share of tokens whose ratio is more than 1 or 10 per cent from 1. Written: mismatch.json and
mismatch.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from recipes.table import Table
from recipes.tracking.files import MetricsFile
from recipes.tracking.ratios import outside

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "smollm2_135m_char_count_published.yaml"
HEADS = ("trl", "memhead")
ENGINES = {"as it comes": "null", "float32 head": "{hf_overrides: {head_dtype: float32}}"}
UPDATES = 8  # of a rollout in that configuration


def overrides(model: str, head: str, engine: str, rollouts: int, place: Path) -> list[str]:
    """Of the configuration, for one cell."""
    return [
        f"model.name={model}",
        f"model.vllm_engine={ENGINES[engine]}",
        f"head.impl={head}",
        "grpo.use_vllm=true",
        "grpo.vllm_gpu_memory_utilization=0.3",
        "grpo.vllm_max_model_length=256",
        "grpo.cache_implementation=null",
        f"grpo.max_steps={UPDATES * rollouts}",
        "tracking.mismatch_every=1",
        "run.warm_start=null",
        "run.save_every=null",
        "run.evaluation.size=8",
        "run.evaluation.every=null",
        f"run.name={head}-{engine.replace(' ', '-')}",
        f"run.output_root={place}",
    ]


def cell(records: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the rollouts' first steps: those whose mismatch was taken apart."""
    seen = [record for record in records if "mismatch" in record]
    if not seen:
        raise ValueError("no step's mismatch was measured")
    found = {
        name: sum(record["mismatch"][name] for record in seen) / len(seen)
        for name in ("tokens", "mean", "head", "rest", "head_share")
    }
    for percent in (1, 10):
        shares = [outside(record["ratios"]["sampler"], percent) for record in seen]
        found[f"outside_{percent}"] = sum(shares) / len(shares)
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """A line a cell."""
    header = ("trainer's head", "vLLM's head", "mean |Δ|", "by rounding", "rest", "share", "> 1 %", "> 10 %")
    cells = [
        (
            row["head"],
            row["engine"],
            *(f"{row['figures'][name]:.5f}" for name in ("mean", "head", "rest")),
            *(f"{100 * row['figures'][name]:.2f} %" for name in ("head_share", "outside_1", "outside_10")),
        )
        for row in rows
    ]
    return Table(header, cells)


def main() -> None:
    """Run the cells, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="SmolLM2's folder")
    parser.add_argument("--rollouts", type=int, default=2)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for head in options.heads:
        for engine in ENGINES:
            given = overrides(options.model, head, engine, options.rollouts, options.output / "runs")
            command = [sys.executable, str(ROOT / "train_grpo.py"), "--config", str(CONFIG), *given]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
            if done.returncode:
                print(head, engine, "failed:", (done.stdout + done.stderr)[-3000:], flush=True)
                continue
            place = max((options.output / "runs").glob(f"{head}-{engine.replace(' ', '-')}*"))
            rows.append(
                {"head": head, "engine": engine, "figures": cell(MetricsFile(place / "metrics.jsonl").read())}
            )
            (options.output / "mismatch.json").write_text(json.dumps(rows, indent=1) + "\n")
            print(rows[-1], flush=True)
    (options.output / "mismatch.md").write_text(table(rows).markdown() + "\n")
    print(table(rows).markdown())


if __name__ == "__main__":
    main()
