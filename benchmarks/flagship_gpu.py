"""A configuration of a large model through its whole life on one GPU, with random weights of the same shapes.

    python -m benchmarks.flagship_gpu --config configs/llama3.1_8b_gsm8k.yaml --output DIR          # nine minutes
    python -m benchmarks.flagship_gpu --config configs/llama3.1_8b_gsm8k_16bit.yaml --output DIR --then evaluate export
    python -m benchmarks.flagship_gpu --config configs/llama3.2_1b_gsm8k.yaml --output DIR --toy     # tiny, on a CPU

It trains, is resumed, measures what it saved and merges it, each a command as a user gives it, and keeps what each
printed. What a random model says earns nothing, so a reward by the completion's checksum lets groups differ. Written:
flagship.json and flagship.md, memory by phase beside the plan, seconds by phase.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch

from benchmarks.packed_models import MODELS
from recipes.rewards.final_answer import text_of
from recipes.tracking.run_folder import RunFolder

SAVED = 2  # steps between two checkpoints
QUESTIONS = 400
MIB = 2**20


def coin(completions: list[Any], **_: Any) -> list[float]:
    """A reward: 0 or 1 by the text alone."""
    return [float(zlib.crc32(text_of(completion).encode()) % 2) for completion in completions]


def make_model(place: Path, toy: bool, name: str = "llama-8b", ends: float = 0.0) -> None:
    """Random weights in bfloat16, a tokenizer with as many entries as the model has, questions in GSM8K's form.

    ends: as in `end_with`; 0 leaves the weights alone, and completions as long as they may be.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from recipes.models.tokenizers import bpe_tokenizer

    place.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": f"Ann has {n} nuts and finds {n % 7}. How many now?", "answer": f"#### {n + n % 7}"}
        for n in range(QUESTIONS)
    ]
    lines = (json.dumps(row) + "\n" for row in rows)
    (place / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    shape = MODELS["toy" if toy else name] | ({"vocab_size": 600} if toy else {})
    bpe_tokenizer([text for row in rows for text in row.values()], 600).save_pretrained(place)
    fill(place / "tokenizer.json", shape["vocab_size"])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    if ends:
        end_with(model, ends)
    model.save_pretrained(place)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the commands have the card to themselves


@torch.no_grad()
def end_with(model: Any, probability: float, end: int = 1) -> None:
    """Let the model end its text after each token with about this probability, so that lengths differ.

    model: a causal language model whose head is not its embedding; both are changed in place.

    The head's row for the token `end` (the tokenizer's `<eos>`) is laid along the mean last hidden state, which a
    component common to all embeddings keeps away from 0, and is as long as makes the probability's mean what is asked.
    """
    model.get_input_embeddings().weight += 0.02
    ids = torch.randint(model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    hidden = model.model(ids.to(model.device)).last_hidden_state.flatten(0, 1).float()  # (N, H)
    head = model.get_output_embeddings().weight  # (V, H)
    logits = hidden @ head.float().T  # (N, V)
    logits[:, end] = -torch.inf
    others = logits.logsumexp(-1)  # (N,)
    along = hidden.mean(0) / hidden.mean(0).square().sum()  # (H,): a logit of about 1
    low, high = 0.0, 100.0
    for _ in range(40):
        length = (low + high) / 2
        mean = torch.sigmoid(length * (hidden @ along) - others).mean()
        low, high = (length, high) if mean < probability else (low, length)
    head[end] = (low * along).to(head.dtype)


def fill(path: Path, size: int) -> None:
    """Give a tokenizer entries that it never writes, so that it can read whatever a model of that vocabulary says."""
    file = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = file["model"]["vocab"]
    vocabulary |= {f"Filler{number}": number for number in range(len(vocabulary), size)}
    path.write_text(json.dumps(file), encoding="utf-8")


def commands(options: argparse.Namespace, root: Path) -> dict[str, list[str]]:
    """Name -> words, in an order in which each finds what it needs."""
    run = root / "flagship"
    train = [
        "train_grpo.py", "--config", options.config, f"model.name={root / 'model'}", f"run.output_root={root}",
        f"run.name={run.name}", f"task.dataset={root / 'model' / 'data.jsonl'}", "task.held_out=64",
        "task.rewards={benchmarks.flagship_gpu.coin: 1.0}", f"run.evaluation.size={options.evaluated}",
        f"run.save_every={SAVED}", *options.overrides,
    ]  # fmt: skip
    later = {
        "resume": [*train, f"grpo.max_steps={options.steps + 1}", "--resume"],
        "evaluate": [*train, "--evaluate", str(run / "final")],
        "export": ["-m", "recipes.export", str(run), "--merge"],
    }
    return {"train": [*train, f"grpo.max_steps={options.steps}"]} | {
        name: later[name] for name in options.then
    }


def carry_out(words: list[str], log: Path, limit: float) -> dict[str, Any]:
    """One command: status (None where its time ended) and seconds."""
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        try:
            status = subprocess.run(
                [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
    return {"status": status, "seconds": time.perf_counter() - began}


def figures(run: RunFolder) -> dict[str, Any]:
    """Memory by phase in MiB, planned and measured, and seconds of each step by phase."""
    plan = json.loads((run.path / "plan.json").read_text(encoding="utf-8"))
    measured = plan.get("measured", {})
    memory = {
        phase: [planned / MIB, measured[phase] / MIB if phase in measured else None]
        for phase, planned in plan["phases"].items()
    }
    lines = [line for line in run.metrics.read() if "time" in line]
    return {
        "memory_mib": memory,
        "figure": plan.get("measured_figure"),
        "step_seconds": [line["time"] for line in lines],
        "mean_length": [line.get("completion_length") for line in lines],
    }


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"{record['config']} on {record['device']}, torch {record['torch']}", ""]
    lines += ["| command | ended | seconds |", "|---|---|---|"]
    for name, found in record["commands"].items():
        ended = {0: "well", None: "its time was over"}.get(found["status"], f"status {found['status']}")
        lines.append(f"| {name} | {ended} | {found['seconds']:.0f} |")
    if "memory_mib" in record:
        lines += ["", "| phase | planned GiB | measured | measured of planned |", "|---|---|---|---|"]
        for phase, (planned, measured) in record["memory_mib"].items():
            cells = (
                ["–", "–"] if measured is None else [f"{measured / 1024:.2f}", f"{measured / planned:.2f}"]
            )
            lines.append(f"| {phase} | {planned / 1024:.2f} | {' | '.join(cells)} |")
        for number, (seconds, length) in enumerate(
            zip(record["step_seconds"], record["mean_length"], strict=True), 1
        ):
            phases = ", ".join(f"{phase} {value:.2f}" for phase, value in seconds.items())
            long = "" if length is None else f"; completions {length:.0f} tokens long"
            lines.append(f"\nstep {number}: {phases}{long}")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """All of it; the files are written after each command. Status 1 if one did not end well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--then", nargs="*", choices=["resume", "evaluate", "export"], default=["resume"])
    parser.add_argument(
        "--steps", type=int, default=3, help="of the first command; what is resumed takes one more"
    )
    parser.add_argument("--evaluated", type=int, default=16, help="problems of an evaluation")
    parser.add_argument("--limit", type=float, default=540, help="seconds in all")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument(
        "--ends", type=float, default=0.0, help="probability that a completion ends with a token"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    until = time.time() + options.limit
    root = options.output.resolve()
    if not (root / "model").is_dir():
        make_model(root / "model", options.toy, ends=options.ends)
    record: dict[str, Any] = {
        "config": options.config,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "commands": {},
    }
    for name, words in commands(options, root).items():
        record["commands"][name] = carry_out(words, root / f"{name}.log", max(1.0, until - time.time()))
        run = RunFolder(root / "flagship")
        if (run.path / "plan.json").is_file():
            record |= figures(run)
        (root / "flagship.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (root / "flagship.md").write_text(table(record), encoding="utf-8")
    print((root / "flagship.md").read_text(encoding="utf-8"))
    return int(any(found["status"] != 0 for found in record["commands"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
