"""The quickstart on three seeds, and what the same number of supervised examples achieves instead.

    python benchmarks/quickstart_seeds.py [--seeds 0 1 2] [section.key=value …]

Each seed is one `train_grpo.py --config configs/quickstart.yaml run.seed=N` in its own process. The control takes the
model as the warm start left it and trains it further by supervision, for as many examples as GRPO had completions, with
the warm start's own recipe and fresh draws of the same train problems. Unlike GRPO it is shown right answers.
Writes benchmarks/results/quickstart_seeds.json and .md.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script is run by its path

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from recipes.config.load import RunConfig, load_config  # noqa: E402
from recipes.models.generation import by_transformers  # noqa: E402
from recipes.models.precision import Precision  # noqa: E402
from recipes.tracking.environment import environment  # noqa: E402
from recipes.tracking.run_folder import RunFolder  # noqa: E402
from recipes.training.evaluation import evaluator  # noqa: E402
from recipes.training.warm_start import warm_start  # noqa: E402

CONFIG = "configs/quickstart.yaml"
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    """Run every seed and its control, write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-control", action="store_true", help="the GRPO runs alone")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    rows = []
    for seed in options.seeds:
        config = load_config(ROOT / CONFIG, [f"run.seed={seed}", *options.overrides])
        row = run(config, seed, options.overrides)
        if not options.no_control:
            row["control"] = control(config, RunFolder(ROOT / row["folder"]), row["completions"])
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(rows, options.overrides)
    return 0


def run(config: RunConfig, seed: int, overrides: list[str]) -> dict:
    """Run one quickstart and return its figures, from the files of its run folder."""
    root = ROOT / config.run.output_root
    before = set(root.glob("*")) if root.is_dir() else set()
    command = [sys.executable, "train_grpo.py", "--config", CONFIG, *overrides]
    command += [f"run.seed={seed}", f"run.name=quickstart-seed{seed}"]
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    seconds = time.perf_counter() - started
    (path,) = set(root.glob("*")) - before
    folder = RunFolder(path)
    summary, warm = folder.read_json("summary.json"), folder.read_json("warm_start.json")
    lines = folder.metrics.read()
    return {
        "seed": seed,
        "folder": str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path),
        "problems": next(line["accuracy_problems"] for line in lines if "accuracy" in line),
        "accuracy_before": summary["accuracy_before"],
        "accuracy_after": summary["accuracy_after"],
        "reward_first": summary["reward_first"],
        "reward_last": summary["reward_last"],
        "warm_start_steps": warm["steps"],
        "warm_start_seconds": warm["seconds"],
        "grpo_seconds": summary["seconds_total"],
        "evaluation_seconds": sum(line.get("evaluation_seconds", 0.0) for line in lines),
        "process_seconds": seconds,
        "completions": summary["steps"] * config.grpo["per_device_train_batch_size"],
    }


def control(config: RunConfig, folder: RunFolder, examples: int) -> dict:
    """The warm-started model, trained further by supervision for `examples` examples."""
    task, settings = config.make_task(), config.run.warm_start
    start = folder.path / "warm_start"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    measure = evaluator(config, task, by_transformers(model, tokenizer))

    def accuracy() -> float:
        return measure(sampled=False)["accuracy"]

    steps = examples // settings.batch_size
    # Another seed would split the problems differently: the draws continue where the warm start's ended.
    shown = settings.steps * settings.batch_size
    drawn = task.warm_start_examples(shown + examples)[shown:]
    longer = settings.model_copy(
        update={"steps": steps, "target_accuracy": None, "check_every": max(1, steps // 8)}
    )
    curve: list[tuple[int, float]] = [(0, accuracy())]
    started = time.perf_counter()
    warm_start(
        model,
        tokenizer,
        drawn,
        longer,
        precision=Precision(),
        probe=accuracy,
        on_step=lambda taken: (
            curve.append((taken.step, taken.accuracy)) if taken.step % longer.check_every == 0 else None
        ),
    )
    return {
        "steps": steps,
        "examples": steps * settings.batch_size,
        "seconds": time.perf_counter() - started,
        "accuracy_before": curve[0][1],
        "accuracy_after": accuracy(),
        "curve": curve,
    }


def write(rows: list[dict], overrides: list[str]) -> None:
    """Both result files, from the rows so far."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = environment()
    machine.pop("command")
    record = {"config": CONFIG, "overrides": overrides, "seeds": rows, "machine": machine}
    (RESULTS / "quickstart_seeds.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# The quickstart on several seeds",
        "",
        f"`python benchmarks/quickstart_seeds.py`; torch {torch.__version__}, {machine['cpu']}, "
        f"{machine['cores']} cores. Greedy accuracy on {rows[0]['problems']} held-out problems; reward: the mean of "
        "the first and of the last tenth of the steps; control: the warm start trained on by supervision for as "
        "many examples as GRPO had completions.",
        "",
        "| seed | accuracy before | after | gained | reward first | last | warm start | GRPO | evaluations | control |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gained = row["accuracy_after"] - row["accuracy_before"]
        other = f"{row['control']['accuracy_after']:.3f}" if "control" in row else "–"
        lines.append(
            f"| {row['seed']} | {row['accuracy_before']:.3f} | {row['accuracy_after']:.3f} | {gained:+.3f} "
            f"| {row['reward_first']:.3f} | {row['reward_last']:.3f} | {row['warm_start_seconds']:.0f} s "
            f"| {row['grpo_seconds']:.0f} s | {row['evaluation_seconds']:.0f} s | {other} |"
        )
    (RESULTS / "quickstart_seeds.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
