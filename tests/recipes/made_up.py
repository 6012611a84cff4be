"""A run folder as a run on a GPU leaves it, with figures that are made up."""

import math

from recipes.tracking.run_folder import RunFolder

GIB = 1024.0
PEAKS = {"generation": 31.0, "scoring": 19.0, "forward": 41.0, "backward": 45.0}  # GiB
PLANNED = {"generation": 33, "scoring without gradient": 20, "forward, loss and backward": 44}  # GiB
LONG = "<reasoning>\n" + "n = n.\n" * 40 + "</reasoning> \\boxed{2}"


def run_folder(root, name="char-count", *, gain=0.4, steps=40):
    """Every kind of figure that the report knows, words from outside that would be marks, and long completions."""
    folder = RunFolder(root / name)
    folder.path.mkdir(parents=True)
    folder.metrics.append({"warm_start": {"step": 1, "loss": 2.5}})  # a line of before step 0, without a step
    _evaluate(folder, 0, 0.43)
    for step in range(1, steps + 1):
        learnt = gain * (1 - math.exp(-3 * step / steps))
        folder.metrics.write({"step": step, **_figures(learnt, step)})
        for number in range(2):
            sample = {
                "prompt": [{"role": "user", "content": "How many n?"}],
                "completion": LONG if number else "2",
            }
            judged = {"rewards": {"right": 1.0, "form <b>": None}, "advantage": -0.5}
            folder.completions.append({"step": step, **sample, **judged})
    _evaluate(folder, steps, 0.43 + gain)
    folder.write_json("plan.json", {"phases": {phase: size * 2**30 for phase, size in PLANNED.items()}})
    folder.write_json(
        "environment.json", {"cpu": "a CPU " * 20, "packages": {"torch": "2.11.0"}, "command": ["x" * 200]}
    )
    (folder.path / "config.yaml").write_text(f"run:\n  name: {name}\ntask:\n  prompt: think in <reasoning>\n")
    return folder


def _figures(learnt, step):
    trl = {
        "rewards/right/std": 0.36,
        "completions/min_length": 40,
        "completions/max_length": 256,
        "clip_ratio/low_mean": 0.0004,
        "clip_ratio/high_mean": 0.0011,
        "sampling/importance_sampling_ratio/mean": 0.999,
        "sampling/importance_sampling_ratio/min": 0.4,
        "sampling/importance_sampling_ratio/max": 1.9,
    }
    return {
        "reward": 0.3 + learnt,
        "reward_std": 0.35,
        "rewards": {"right": 0.2 + learnt, "form <b>": 0.5},
        "entropy": 1.2 - learnt,
        "kl": 0.001 * step,
        "completion_length": 180.0 - step,
        "clipped_share": 0.1,
        "zero_std_share": 0.2,
        "loss": 0.01 * learnt,
        "trl": trl,
        "steps": 1,
        "device": "cuda",
        "time": {
            "generation": 6.0,
            "rewards": 0.01,
            "scoring": 0.8,
            "forward": 1.2,
            "backward": 2.2,
            "other": 0.1,
        },
        "memory": {phase: {"allocated_peak_mib": GIB * peak} for phase, peak in PEAKS.items()},
        "tokens": {"computed": 148_000, "real": 131_000, "left_out_share": 0.3},
    }


def _evaluate(folder, step, accuracy):
    figures = {"accuracy": accuracy, "accuracy_interval": [accuracy - 0.03, accuracy + 0.03]}
    folder.metrics.write({"step": step, **figures, "accuracy_problems": 1000})
