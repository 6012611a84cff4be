"""A loss step of GRPO by Unsloth's own trainer, on the rollouts of benchmarks.packed_gpu: the packed step's peer.

    python -m benchmarks.packed_unsloth --output DIR --checkpoint FOLDER                      # 16-bit weights
    python -m benchmarks.packed_unsloth --output DIR --checkpoint FOLDER --stack unsloth4
    python -m benchmarks.packed_unsloth --output DIR --checkpoint FOLDER --model llama-1b --zeros 0 0.3
    python -m benchmarks.packed_unsloth --output DIR --checkpoint FOLDER --steps own packed   # and memhead's
    python -m benchmarks.packed_unsloth --output DIR --toy                                    # tiny, on a CPU

`own`: Unsloth as it comes, with its own head: its trainer removes padding and shares prompts where it can, and a row
says what its model was given while the time was taken. A window is as in packed_gpu: every group forward and
backward, a group a micro-batch; its own runs shuffle several questions' completions first, and then their loss shares
no prompt. `scoring` is its pass for old log-probabilities. Unsloth computes its activations again in the backward
pass, unless `--no-checkpointing` is given.
`packed`: `step.impl: packed` on the same model, in bins of `--budget` tokens, with memhead's head; it needs no scoring.
Its losses are other ones: its old log-probabilities are the model's own.
`--fresh`: every round has a rollout of its own, as a run's steps have, of other lengths: what is compiled or kept for
a layout is then made again.
Run it beside packed_gpu on one card; importing Unsloth changes TRL, so it is a process of its own. The toy's layers are
transformers' own, which do not know Unsloth's rows of shared prompts: its seconds and losses mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.rollouts import SHAPES, SIZE, TOY_SHAPES, Shape, rollout, shape_for, timed
from benchmarks.step_stack import make_trainer, save_checkpoint

Batch = dict[str, Any]
# What Unsloth's trainer says to its model about a row, and what is in that row. Without either it is padded.
LAYOUTS = {"prefix_seg_info": "shared", "packed_seq_lengths": "packed"}
MEANING = {
    "shared": "each prompt once",
    "packed": "packed, prompts repeated",
    "padded": "padded",
}


def micro_batches(fed: Batch, vocab_size: int) -> list[Batch]:
    """A group each. Old log-probabilities are those of a uniform policy, which a random model nearly is."""
    import torch

    rows = len(fed["completion_ids"])
    uniform = torch.full_like(fed["completion_ids"], -math.log(vocab_size), dtype=torch.float32)
    fed = fed | {"old_per_token_logps": uniform}
    return [
        {name: value[i : i + SIZE] if value.ndim else value for name, value in fed.items()}
        for i in range(0, rows, SIZE)
    ]


def window(trainer: Any, model: Any, parts: list[Batch]) -> float:
    """Forward and backward of one accumulation window; the loss."""
    trainer.current_gradient_accumulation_steps = len(parts)
    total = 0.0
    for part in parts:
        loss = trainer.compute_loss(model, dict(part), num_items_in_batch=part["num_items_in_batch"])
        trainer.accelerator.backward(loss)
        total += float(loss.detach())
    trainer.optimizer.zero_grad(set_to_none=True)
    return total


def score(trainer: Any, model: Any, parts: list[Batch]) -> None:
    """Old log-probabilities of the whole rollout."""
    import torch

    for part in parts:
        ids, mask = (torch.cat([part[f"prompt_{x}"], part[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        with torch.no_grad():
            trainer._get_per_token_logps_and_entropies(model, ids, mask, part["completion_ids"].shape[1])


@contextmanager
def forwards(model: Any, *, gradient: bool) -> Iterator[Counter[str]]:
    """Count the model's forwards by what is in their rows: a key of `MEANING`.

    gradient: leave out those without, by which Unsloth's loss pass compares one kind of row with another.
    """
    import torch

    counts: Counter[str] = Counter()

    def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        if torch.is_grad_enabled() or not gradient:
            given = [kind for name, kind in LAYOUTS.items() if options.get(name) is not None]
            counts[given[0] if given else "padded"] += 1

    handle = model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    try:
        yield counts
    finally:
        handle.remove()


def measure(trainer: Any, model: Any, shape: Shape, zeros: float, rounds: int, fresh: bool) -> dict[str, Any]:
    """Seconds of a window and of scoring, medians, the forwards in them, and the window's peak."""
    vocab_size = trainer.model.config.vocab_size
    fed = rollouts(shape, vocab_size, zeros, trainer.accelerator.device, fresh)
    row, began = described(shape, zeros), time.perf_counter()
    row["loss"] = window(trainer, model, micro_batches(next(fed), vocab_size))
    row["first_seconds"] = time.perf_counter() - began
    parts = iter([micro_batches(next(fed), vocab_size) for _ in range(rounds)])
    with forwards(trainer.model, gradient=True) as row["forwards"]:
        row["seconds"], row["peak_mib"] = timed(lambda: window(trainer, model, next(parts)), rounds)
    score(trainer, model, micro_batches(next(fed), vocab_size))
    scored = iter([micro_batches(next(fed), vocab_size) for _ in range(rounds)])
    with forwards(trainer.model, gradient=False) as row["scoring_forwards"]:
        row["scoring"], _ = timed(lambda: score(trainer, model, next(scored)), rounds)
    return row


def rollouts(shape: Shape, vocab_size: int, zeros: float, device: Any, fresh: bool) -> Iterator[Batch]:
    """The same one again and again, or one after another."""
    for seed in itertools.count(1):
        yield rollout(shape, vocab_size, zeros, device, seed if fresh else 1)


def described(shape: Shape, zeros: float) -> dict[str, Any]:
    """The beginning of a row."""
    return {"shape": shape.name, "groups": shape.groups, "zeros": round(zeros * shape.groups) / shape.groups}


def measure_packed(
    model: Any, shape: Shape, zeros: float, rounds: int, fresh: bool, *, toy: bool, budget: int | None
) -> dict[str, Any]:
    """The same of memhead's packed step on this model, which needs no scoring; the first window by itself."""
    import trl

    from benchmarks import packed_gpu  # imports TRL, which comes after Unsloth
    from recipes.training.packed_unsloth import packed_unsloth

    kind = packed_unsloth(trl.GRPOTrainer)
    trainer = packed_gpu.make_trainer(kind, model, toy, shape, budget=budget or 0, epsilon_high=0.2)
    model.for_training(use_gradient_checkpointing=getattr(model, "_unsloth_gradient_checkpointing", True))
    fed = rollouts(shape, model.config.vocab_size, zeros, trainer.accelerator.device, fresh)
    row = described(shape, zeros) | {"scoring": 0.0, "scoring_forwards": {}}

    def one() -> float:
        loss = packed_gpu.window(trainer)
        trainer.model.zero_grad(set_to_none=True)
        return loss

    trainer.fed, began = next(fed), time.perf_counter()
    row["loss"] = one()
    row["first_seconds"] = time.perf_counter() - began
    each = iter([next(fed) for _ in range(rounds)])

    def another() -> None:
        trainer.fed = next(each)
        one()

    with forwards(trainer.model, gradient=True) as row["forwards"]:
        row["seconds"], row["peak_mib"] = timed(another, rounds)
    row["computed"] = trainer._metrics["train"]["step/tokens_computed"][-1]
    return row


def kinds(counts: dict[str, int] | None) -> str:
    """What a row's forwards were given; of several kinds, how often each."""
    if counts is None:
        return "not recorded"
    if len(counts) == 1:
        return MEANING[next(iter(counts))]
    return "; ".join(f"{MEANING[kind]}: {n}" for kind, n in sorted(counts.items())) or "none"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | shape | step | zero groups | loss, s | its rows | scoring, s | its rows | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        zeros = f"{row['zeros']:.0%}" if "zeros" in row else "–"
        step = f"packed, bins of {row['budget']}" if row.get("step") == "packed" else "own"
        start = f"| {row['model']} | {row['shape']} | {step} | {zeros} |"
        if "error" in row:
            lines.append(f"{start} {row['error'].splitlines()[0]} |||||")
            continue
        lines.append(
            f"{start} {row['seconds']:.3f} | {kinds(row.get('forwards'))} | {row['scoring']:.3f} |"
            f" {kinds(row.get('scoring_forwards'))} | {row['peak_mib'] / 1024:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> Path:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="where the model's random weights lie, or shall lie")
    parser.add_argument("--model", choices=["llama-1b", "llama-8b"], default="llama-8b")
    parser.add_argument("--stack", choices=["unsloth16", "unsloth4"], default="unsloth16")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.0], help="shares without advantage")
    parser.add_argument("--steps", nargs="+", choices=["own", "packed"], default=["own"])
    parser.add_argument(
        "--budget", type=int, help="tokens of a bin of memhead's step; as a padded micro-batch without"
    )
    parser.add_argument("--fresh", action="store_true", help="another rollout in every round")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--limit", type=float, default=300, help="seconds after which nothing more is begun")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args(argv)
    until = time.time() + options.limit
    shapes = TOY_SHAPES if options.toy else {s: shape_for(options.model, s) for s in options.shapes}
    scratch = Path(tempfile.mkdtemp())
    checkpoint = options.checkpoint or scratch / "checkpoint"
    if not options.toy and not checkpoint.exists():
        from benchmarks.packed_models import new_model

        save_checkpoint(new_model(options.model, toy=False), checkpoint)
    trainer, model, head = make_trainer(
        options.stack,
        options.toy,
        checkpoint,
        scratch / "trainer",
        size=SIZE,
        prompt=max(max(shape.prompts) for shape in shapes.values()),
        completion=max(shape.longest for shape in shapes.values()),
        checkpointing=options.checkpointing,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    path, rows = options.output / f"packed_{options.stack}.json", []
    for shape, zeros, step in itertools.product(shapes.values(), options.zeros, options.steps):
        if time.time() > until:
            break
        row: dict[str, Any] = {"model": "toy" if options.toy else options.model}
        row |= {"step": step, "checkpointing": options.checkpointing, "fresh": options.fresh}
        given = (shape, zeros, options.rounds, options.fresh)
        try:
            if step == "packed":
                row["budget"] = options.budget or "slots"
                with head.install("memhead"):
                    row |= measure_packed(trainer.model, *given, toy=options.toy, budget=options.budget)
            else:
                row |= measure(trainer, model, *given)
        except Exception as error:  # one shape's failure is one row of the table
            traceback.print_exc()
            row |= {"shape": shape.name, "error": f"{type(error).__name__}: {error}"[:200]}
        rows.append(row)
        print(json.dumps(rows[-1]), flush=True)
        path.write_text(json.dumps({"stack": options.stack, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return path


if __name__ == "__main__":
    main()
