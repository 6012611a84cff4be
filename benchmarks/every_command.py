"""Every command of the README and every kind of configuration, once, on this machine, at toy size.

    python -m benchmarks.every_command --output DIR      # on a GPU with vLLM and Unsloth: 31 commands
    python -m benchmarks.every_command --output DIR --only quickstart lora

The models are made here, with random weights: a Llama of two layers with a chat template. What a command needs and this
machine lacks (a GPU, vLLM, Unsloth) is said, not tried. Ends with status 1 if a command did not end as it should.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Command:
    """One line to run. needs: "gpu" and packages, without which it is left out."""

    name: str
    words: list[str]
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> str:
        """What this machine lacks for it."""
        lacking = [need for need in self.needs if need != "gpu" and importlib.util.find_spec(need) is None]
        if "gpu" in self.needs and not torch.cuda.is_available():
            lacking.append("a GPU")
        return ", ".join(lacking)


def commands(root: Path) -> list[Command]:
    """In an order in which each finds what it needs."""
    model, data, mathematics = str(root / "model"), str(root / "data.jsonl"), str(root / "math.jsonl")
    prompts = str(root / "prompts.jsonl")
    train = ["train_grpo.py", "--config"]
    here = [f"run.output_root={root}"]
    first = [*train, "configs/quickstart.yaml", *here, "run.save_every=2", "run.warm_start.steps=20"]
    small = [
        *here, f"model.name={model}", "run.evaluation.size=8", "grpo.max_steps=2", "grpo.num_generations=4",
        "grpo.per_device_train_batch_size=8", "grpo.gradient_accumulation_steps=1", "run.save_every=1",
        "grpo.learning_rate=0.05", "grpo.warmup_steps=0",
    ]  # fmt: skip
    # Nothing that a random model says earns a reward; the entropy's gradient is there all the same, but in Unsloth's
    # own step, which computes it past every head.
    bonus = ["grpo.entropy_coef=1.0"]
    short = ["task.held_out=8", "grpo.max_completion_length=32"]
    gsm8k = [*small, *short, f"task.dataset={data}"]

    def as_in(config: str, *words: str) -> list[str]:
        return [*train, f"configs/{config}.yaml", f"run.name={config}", *words]

    lora = [*train, "configs/llama3.2_1b_gsm8k.yaml", *gsm8k, *bonus]
    flagship = [*train, "configs/llama3.1_8b_gsm8k.yaml", *gsm8k, "model.max_seq_length=512"]
    sixteen = as_in("llama3.1_8b_gsm8k_16bit", *gsm8k, *bonus, "model.max_seq_length=512")
    count = [*train, "configs/smollm2_135m_char_count.yaml", *small, *bonus, "task.train_size=64", "task.held_out=8",
             "run.warm_start.steps=2", "run.warm_start.batch_size=8", "run.evaluation.batch_size=8"]  # fmt: skip
    vllm = ["grpo.use_vllm=true", "grpo.vllm_gpu_memory_utilization=0.2", "grpo.vllm_max_model_length=512"]
    quick = str(root / "quickstart")
    return [
        Command("quickstart", [*first, "grpo.max_steps=4"]),
        Command("resume", [*first, "grpo.max_steps=6", "--resume"]),
        Command("evaluate", [*first, "--evaluate", f"{quick}/final"]),
        Command("plan", [*first, "--plan", "--device", "24 GiB"]),
        Command("full", [*first, "grpo.max_steps=4", "run.name=quickstart-full", "head.impl=full"]),
        Command("trl step", [*first, "grpo.max_steps=4", "run.name=quickstart-trl", "step.impl=trl"]),
        Command("compare", ["-m", "recipes.report.compare", quick, f"{quick}-full", "--out", str(root / "both")]),
        Command("report", ["-m", "recipes.report", quick]),
        Command("ask", ["-m", "recipes.ask", quick, "27+15="]),
        Command("ask, base", ["-m", "recipes.ask", quick, "27+15=", "--base"]),
        Command("pilot", [*first, "--pilot"]),
        Command("minimal", ["-m", "recipes.minimal", "--steps", "2"]),
        Command("lora", [*lora, "run.name=lora"]),
        Command("merge", ["-m", "recipes.export", str(root / "lora"), "--merge"]),
        Command("lora, evaluate", [*lora, "run.name=lora", "--evaluate", str(root / "lora" / "final")]),
        Command("char_count", [*count, "run.name=count", "grpo.steps_per_generation=2"]),
        Command("scratch", as_in("gsm8k_scratch", *here, *short, f"task.dataset={data}", "run.warm_start.steps=2",
                                 "run.warm_start.batch_size=8", "run.evaluation.size=8", "grpo.max_steps=2",
                                 "grpo.per_device_train_batch_size=8", "grpo.num_generations=4", *bonus)),
        Command("full, float32", as_in("qwen2.5_0.5b_gsm8k_slime", *gsm8k, *bonus)),
        Command("reference", as_in("qwen2.5_0.5b_gsm8k_verl", *gsm8k, *bonus)),
        Command("countdown", as_in("qwen2.5_3b_countdown", *small, *short, *bonus)),
        Command("math, top-p", as_in("qwen3_0.6b_math", *small, *short, f"task.dataset={mathematics}", *bonus)),
        Command("own data", as_in("own_data", *small, *short, f"task.dataset={prompts}",
                                  "task.rewards={benchmarks.flagship_gpu.coin: 1, "
                                  "my_rewards.exact: null, my_rewards.short: null}")),
        Command("lora, 4-bit", [*lora, "run.name=four", "model.load_in_4bit=true"], ("gpu", "bitsandbytes")),
        Command("lora, 8-bit", [*lora, "run.name=eight", "model.load_in_8bit=true"], ("gpu", "bitsandbytes")),
        Command("lora, vLLM", [*lora, "run.name=vllm", *vllm], ("gpu", "vllm")),
        Command("char_count, vLLM", [*count, "run.name=count-vllm", "grpo.steps_per_generation=2", *vllm,
                                      "grpo.cache_implementation=null"], ("gpu", "vllm")),
        Command(
            "packed, vLLM, 4-bit",
            as_in("llama3.1_8b_gsm8k_packed", *gsm8k, *bonus, "model.max_seq_length=512", *vllm),
            ("gpu", "bitsandbytes", "vllm"),
        ),
        Command(
            "unsloth, 16-bit",
            [*flagship, "run.name=unsloth", "model.load_in_4bit=false", "model.fast_inference=false",
             "model.vllm_standby=false", "model.gpu_memory_utilization=null"],
            ("gpu", "unsloth"),
        ),
        Command("unsloth, vLLM, 16-bit", sixteen, ("gpu", "unsloth", "vllm")),
        Command("unsloth, vLLM, 4-bit", [*flagship, "run.name=flagship"], ("gpu", "unsloth", "vllm")),
        Command("unsloth, vLLM, packed", [*flagship, "run.name=flagship-packed", "step.impl=packed", *bonus],
                ("gpu", "unsloth", "vllm")),
    ]  # fmt: skip


def make_model(root: Path) -> None:
    """A tiny Llama in bfloat16 with a BPE tokenizer, and forty questions in GSM8K's form, in MATH's and alone."""
    from recipes.config.schema import ScratchConfig
    from recipes.models.load import scratch_llama
    from recipes.models.tokenizers import bpe_tokenizer

    rows = [
        {
            "question": f"Ann has {n} nuts and finds {n % 7}. How many now?",
            "answer": f"{n}+{n % 7}\n#### {n + n % 7}",
        }
        for n in range(40)
    ]
    solved = [
        {"problem": f"What is {n}+{n % 7}?", "solution": rf"It is $\boxed{{{n + n % 7}}}$."}
        for n in range(40)
    ]
    asked = [{"prompt": row["question"]} for row in rows]
    for name, of in (("data", rows), ("math", solved), ("prompts", asked)):
        text = "".join(json.dumps(row) + "\n" for row in of)
        (root / f"{name}.jsonl").write_text(text, encoding="utf-8")
    tokenizer = bpe_tokenizer([text for row in rows for text in row.values()], 600)
    shape = ScratchConfig(hidden_size=256, layers=2, heads=4, intermediate_size=512, max_positions=2048)
    scratch_llama(shape, tokenizer, seed=0).bfloat16().save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")


def main(argv: list[str] | None = None) -> int:
    """Run them, keep what each printed, and say how each ended."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder for the runs and the logs")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these alone; their needs must be there already"
    )
    parser.add_argument("--limit", type=float, default=180.0, help="seconds of one command at most")
    options = parser.parse_args(argv)
    root = options.output.resolve()
    logs = root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if not (root / "model").is_dir():
        make_model(root)
    failed = False
    for command in commands(root):
        if options.only and command.name not in options.only:
            continue
        if command.missing:
            print(f"{command.name:24s} not tried: needs {command.missing}", flush=True)
            continue
        started = time.perf_counter()
        log = logs / f"{command.name.replace(', ', '-').replace(' ', '-')}.log"
        with log.open("w", encoding="utf-8") as file:
            try:
                call = [sys.executable, *command.words]
                status = subprocess.run(
                    call, stdout=file, stderr=subprocess.STDOUT, timeout=options.limit, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                status = -1
        ended = "ended well" if status == 0 else "ran too long" if status == -1 else f"status {status}"
        print(f"{command.name:24s} {ended}, {time.perf_counter() - started:.0f} s", flush=True)
        if status:
            failed = True
            print("    " + "\n    ".join(log.read_text(encoding="utf-8").splitlines()[-12:]), flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
