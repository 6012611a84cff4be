"""A loss step of GRPO on a GPU: TRL's padded way with its own head and with memhead, and the packed step.

    python -m benchmarks.packed_gpu --output DIR           # under 9 minutes on an H100
    python -m benchmarks.packed_gpu --output DIR --toy     # the same code on a tiny model, on a CPU
    python -m benchmarks.packed_gpu --output DIR --budget 8192 16384

Each gets the same rollouts in turn: random tokens, LoRA on every linear layer, bfloat16; smollm2-135m in full, float32
under autocast; with `--checkpoint FOLDER` the 8B weights that benchmarks.packed_unsloth leaves there, in 4 bits.
`compiled` is the packed step with `model.compile_layers`. `seconds` is one accumulation window, forward and backward;
`scoring`, timed once, is the pass for old log-probabilities that TRL makes where vLLM samples, and that the packed step
does not need. Groups without advantage cost TRL as much as others, so they are
measured for the packed step alone. That runs in bins of as many tokens as a padded micro-batch has slots, and in those
that `step.token_budget: null` gives a run on this card, or in each of `--budget`. Under `agreement`: gradients against
those of TRL's way, and of TRL's way in float32 where the model is small enough. `share`: the time that the arithmetic a
way cannot do without would take at the card's measured matrix rate, of the time it took; TRL's way computes a prompt
once a completion, and recomputation and padding count for nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.packed_models import CHECKPOINTING, HUB, IN_FULL, LAYERS, MODELS, make_model
from benchmarks.rollouts import SHAPES, SIZE, TOY_SHAPES, Shape, rollout, shape_for, timed
from recipes.models.adapters import without_adapters
from recipes.models.compiled import compile_layers
from recipes.plan.rate import matrix_rate
from recipes.plan.shapes import sizes
from recipes.plan.work import Flow, Work
from recipes.tracking.speed import padded_flow
from recipes.training.packed_attention import PREFIX
from recipes.training.packed_step import PackedStep, packed

if TYPE_CHECKING:
    from recipes.config.load import RunConfig

WAYS = ("packed", "compiled", "padded")


def arithmetic(model: Any) -> Work:
    """Of the benchmark's model, adapters included."""
    adapters = getattr(model, "peft_config", {}).get("default")
    shape, trained = sizes(without_adapters(model).config, adapters)
    work = Work.of(shape, trained)
    assert work is not None  # these are models that the plan covers
    return work


def flow_of(trainer: Any, way: str) -> Flow:
    """What went through the model in the window before."""
    if way != "padded":
        return trainer.take_flow()
    prompts, completions = (trainer.fed[f"{part}_mask"] for part in ("prompt", "completion"))
    return padded_flow(torch.cat([prompts, completions], 1), completions.shape[1])


def run_config(name: str, shape: Shape, *overrides: str) -> RunConfig:
    """A run of this model and shape, as `train_grpo.py` would read it."""
    import tempfile

    import yaml

    from recipes.config.load import load_config

    run = {
        "model": {
            "loader": "transformers", "name": HUB[name], "dtype": "auto" if name in IN_FULL else "bfloat16",
            "max_seq_length": shape.prompts[1] + shape.longest, "gradient_checkpointing": CHECKPOINTING[name],
        },
        "task": {"name": "gsm8k"},
        "grpo": {
            "per_device_train_batch_size": SIZE, "num_generations": SIZE, "max_completion_length": shape.longest,
            "gradient_accumulation_steps": shape.groups,
        },
        "lora": None if name in IN_FULL else {"r": 16, "alpha": 16, "target_modules": LAYERS},
    }  # fmt: skip
    path = Path(tempfile.mkdtemp()) / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return load_config(path, overrides)


def planned_budget(name: str, shape: Shape) -> int:
    """What a run of this model and shape would take on this card."""
    from recipes.plan.plan import token_budget
    from recipes.plan.setting import Setting

    config = run_config(name, shape)
    device_bytes = torch.cuda.get_device_properties(0).total_memory
    budget = token_budget(config, Setting.of(config, device=True), device_bytes)
    assert budget is not None  # these are models that the plan covers
    return budget


def make_trainer(kind: type, model: Any, toy: bool, shape: Shape, *, budget: int = 0, **settings: Any) -> Any:
    """A trainer as `train()` leaves it before the first step; one group a micro-batch, one window a generation."""
    import tempfile

    from datasets import Dataset
    from trl import GRPOConfig

    from recipes.models.tokenizers import character_tokenizer

    class Fed(kind):  # type: ignore[misc, valid-type]
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            return dict(self.fed)

    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=toy, per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=shape.groups, num_generations=SIZE, max_completion_length=shape.longest,
        **{"bf16": not toy, "gradient_checkpointing": False, **settings},
    )  # fmt: skip
    trainer = Fed(
        model=model,
        processing_class=character_tokenizer("0123456789"),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * SIZE),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        **({"token_budget": budget or None} if issubclass(kind, PackedStep) else {}),
    )
    if arguments.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.create_optimizer()
    trainer.wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = shape.groups
    trainer.model.train()
    return trainer


def window(trainer: Any) -> float:
    """Forward and backward of one accumulation window; the loss."""
    trainer._step, trainer._buffered_inputs = 0, None
    count = trainer.args.gradient_accumulation_steps
    losses = []
    for place in range(count):
        trainer.accelerator.gradient_state._set_sync_gradients(place == count - 1)
        losses.append(trainer.training_step(trainer.wrapped, None, None))
    return float(torch.stack(losses).sum())


def score(trainer: Any) -> None:
    """Old log-probabilities of the whole generation, as TRL computes them under vLLM."""
    fed = trainer.fed
    ids, mask = (torch.cat([fed[f"prompt_{x}"], fed[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(
            trainer.wrapped, ids, mask, fed["completion_ids"].shape[1], batch_size=SIZE
        )


def gradient(trainer: Any) -> Tensor:
    """The gradients of all adapters as one float32 vector; the trainer's parameters no longer hold them afterwards."""
    found = [p.grad.float().flatten() for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad(set_to_none=True)
    return torch.cat(found)


def exact_gradient(name: str, fed: dict[str, Any], shape: Shape, toy: bool) -> Tensor:
    """TRL's padded way in float32 without autocast, on the same weights in a new model: autocast stays on a model."""
    from trl import GRPOTrainer

    trainer = make_trainer(GRPOTrainer, make_model(name, toy).float(), toy, shape, bf16=False)
    trainer.fed = fed
    window(trainer)
    return gradient(trainer)


def measure(
    name: str, model: Any, shape: Shape, options: argparse.Namespace, rows: list[dict], until: float
) -> None:
    """All contestants at one shape."""
    from trl import GRPOTrainer

    from memhead.integrations import trl as memhead_trl

    device = next(model.parameters()).device
    vocab_size = MODELS[name]["vocab_size"]
    config = without_adapters(model).config
    checkpointing = {"gradient_checkpointing": CHECKPOINTING[name]}
    budgets = options.budget or ([] if options.toy else [planned_budget(name, shape)])
    stock = "full" if options.toy else "trl"  # TRL 1.15 has no head for a CPU
    gradients: dict[str, Tensor] = {}
    work, rate = (
        arithmetic(model),
        matrix_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32),
    )
    contestants = [
        ("packed", "memhead", 0.0, 0),
        *((way, "memhead", 0.0, budget) for budget in budgets for way in ("packed", "compiled")),
        *((way, "memhead", 0.3, budget) for budget in budgets[:1] for way in ("packed", "compiled")),
        ("padded", stock, 0.0, 0),
    ]
    if name != "llama-8b" or shape.name == "gsm8k":  # where the head is a hundredth of the step, time is dear
        contestants.append(("padded", "memhead", 0.0, 0))
    for way, head, zeros, budget in contestants:
        if way not in options.ways:
            continue
        if time.time() > until:
            return
        row: dict[str, Any] = {
            "model": name,
            "shape": shape.name,
            "way": way,
            "head": head,
            "budget": budget or "slots",
            "zeros": round(zeros * shape.groups) / shape.groups,
        }
        config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)
        for layer in model.modules():
            layer._compiled_call_impl = None
        if way == "compiled":
            compile_layers(model)
        try:
            with memhead_trl.install(head):
                kind = GRPOTrainer if way == "padded" else packed(GRPOTrainer)
                trainer = make_trainer(kind, model, options.toy, shape, budget=budget, **checkpointing)
                trainer.fed = rollout(shape, vocab_size, zeros, device)
                began = time.perf_counter()
                row["loss"] = window(trainer)
                row["first_seconds"] = time.perf_counter() - began  # compiling included
                needed = work.training(flow_of(trainer, way)) / rate  # seconds
                if zeros == 0.0:
                    gradients[f"{way} {head}"] = gradient(trainer).cpu()
                trainer.model.zero_grad(set_to_none=True)

                def run(trainer: Any = trainer) -> None:
                    window(trainer)
                    trainer.model.zero_grad(set_to_none=True)

                row["seconds"], row["peak_mib"] = timed(run, options.rounds)
                if way == "padded":
                    row["scoring"], _ = timed(lambda t=trainer: score(t), options.rounds)
                real = int(trainer.fed["prompt_mask"].sum() + trainer.fed["completion_mask"].sum())
                slots = trainer.fed["prompt_mask"].numel() + trainer.fed["completion_mask"].numel()
                computed = trainer._metrics["train"].get("step/tokens_computed", [slots])[-1]
                row |= {"real": real, "computed": computed, "real_per_second": real / row["seconds"]}
                row["share"] = needed / row["seconds"]
        except torch.OutOfMemoryError as error:
            row["error"] = f"out of memory: {error}".splitlines()[0][:120]
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        rows.append(row)
        print(json.dumps(row), flush=True)
        trainer = run = None  # type: ignore[assignment]
        gc.collect()
    config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)
    if "packed memhead" in gradients and f"padded {stock}" in gradients:
        ours, theirs = gradients["packed memhead"], gradients[f"padded {stock}"]
        agreement = {
            "model": name,
            "shape": shape.name,
            "packed_against_padded": float((ours - theirs).norm() / theirs.norm()),
        }
        if "compiled memhead" in gradients:
            compiled = gradients["compiled memhead"]
            agreement["compiled_against_packed"] = float((compiled - ours).norm() / ours.norm())
        if name != "llama-8b" and shape.name in ("gsm8k", "62+70") and time.time() < until:
            with memhead_trl.install("memhead"):
                exact = exact_gradient(
                    name, rollout(shape, vocab_size, 0.0, device), shape, options.toy
                ).cpu()
            gc.collect()  # that model: it would count in the next peak
            agreement |= {
                f"{way}_against_float32": float((found - exact).norm() / exact.norm())
                for way, found in gradients.items()
            }
        rows.append({"agreement": agreement})
        print(json.dumps(agreement), flush=True)


def table(rows: list[dict]) -> str:
    """Markdown: seconds as a share of TRL's own, with and without its scoring pass."""
    lines = [
        "| model | shape | way | bins of | zero groups | seconds | scoring | of TRL's loss | of TRL's with scoring |"
        " peak GiB | tokens computed | real tokens/s | share of the matrix rate |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    stock = {
        (r["model"], r["shape"]): r
        for r in rows
        if r.get("way") == "padded" and r["head"] != "memhead" and "seconds" in r
    }
    for r in rows:
        if "agreement" in r:
            continue
        start = (
            f"| {r['model']} | {r['shape']} | {r['way']}, {r['head']} | {r['budget']} | {r['zeros']:.0%} |"
        )
        if "seconds" not in r:
            lines.append(f"{start} {r.get('error', '')} ||||||||")
            continue
        base = stock.get((r["model"], r["shape"]))
        scoring = r.get("scoring", 0.0)
        shares = ("", "") if base is None else (
            f"{r['seconds'] / base['seconds']:.2f}",
            f"{(r['seconds'] + scoring) / (base['seconds'] + base['scoring']):.2f}",
        )  # fmt: skip
        lines.append(
            f"{start} {r['seconds']:.3f} | {scoring:.3f} | {shares[0]} | {shares[1]} | {r['peak_mib'] / 1024:.1f} |"
            f" {r['computed']:.0f} | {r['real_per_second']:.0f} | {r['share']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> Path:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--models", nargs="+", default=["llama-1b", "llama-8b"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--checkpoint", type=Path, help="the 8B model's weights instead of new ones, read in 4 bits"
    )
    parser.add_argument("--limit", type=float, default=500, help="seconds after which nothing more is begun")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--budget", type=int, nargs="+", help="tokens of a bin, one after another; as planned without"
    )
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args(argv)
    until = time.time() + options.limit
    models = ["toy"] if options.toy else options.models
    rows: list[dict] = []
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"packed_{'toy' if options.toy else 'gpu'}.json"
    for name in models:
        model = make_model(name, options.toy, options.checkpoint)
        for shape in TOY_SHAPES.values() if options.toy else [shape_for(name, s) for s in options.shapes]:
            measure(name, model, shape, options, rows, until)
            device = "cpu" if options.toy else torch.cuda.get_device_name()
            path.write_text(
                json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
            )
            path.with_suffix(".md").write_text(table(rows))
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(table(rows))
    return path


if __name__ == "__main__":
    main()
