"""Tokens per second of a rollout inside the training process, by engine, and what its options cost.

    python -m benchmarks.generation_gpu --model FOLDER --output DIR        # about six minutes on an H100
    python -m benchmarks.generation_gpu --model FOLDER --output DIR --engine "graphs, kept cache"

One process for each engine: vLLM as TRL makes it (`trl.generation.vllm_generation`) or with other limits, and
`model.generate` of transformers; in each engine every way of sampling in turn, medians of `--rounds`. The rollout is
128 prompts with 8 completions each of 128 tokens (no end token is sampled: every way computes the same number).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

PROMPTS, GROUP, LENGTH = 128, 8, 128
Ways = dict[str, Callable[[], object]]  # a way of sampling, and one rollout of it

VLLM: dict[str, dict[str, Any]] = {
    "vLLM as TRL makes it": {},
    "vLLM, 512 at once": {"max_num_seqs": 512},
    "vLLM, graphs to 1024": {"max_cudagraph_capture_size": PROMPTS * GROUP, "max_num_batched_tokens": 16384},
}
VLLM_SAMPLING: dict[str, dict[str, Any]] = {
    "as TRL asks": {"logprobs": 0},
    "no text": {"logprobs": 0, "detokenize": False},
    "no text, no log-probabilities": {"logprobs": None, "detokenize": False},
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "transformers, growing cache": {},
    "transformers, static cache": {"cache_implementation": "static", "disable_compile": True},
    "transformers, graphs": {"cache_implementation": "static"},
    "transformers, graphs, kept cache": {"kept": True},
    "transformers, graphs, kept cache, decoding by products": {"kept": True, "products": True},
}


def main() -> None:
    """One process for each engine; the table is written after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="folder of a small model, such as SmolLM2-135M-Instruct"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", nargs="+", choices=[*VLLM, *TRANSFORMERS], help="these alone")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        print("ROWS " + json.dumps(measure(options.model, options.engine[0], options.rounds)))
        return
    rows: list[dict[str, Any]] = []
    options.output.mkdir(parents=True, exist_ok=True)
    common = ["--model", options.model, "--output", str(options.output), "--rounds", str(options.rounds)]
    for engine in options.engine or [*TRANSFORMERS, *VLLM]:
        call = [
            sys.executable, "-m", "benchmarks.generation_gpu", *common, "--engine", engine, "--in-this-process",
        ]  # fmt: skip
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("ROWS ")]
        if not found:
            print(engine, "failed:", done.stderr[-3000:], flush=True)
            continue
        here = json.loads(found[0].removeprefix("ROWS "))
        rows += here
        (options.output / "generation.json").write_text(json.dumps(rows, indent=1))
        for row in here:
            print(
                f"{row['engine']:54s} {row['sampling']:30s} {row['tokens_per_second']:8.0f} tokens/s "
                f"{row['seconds']:.2f} s (start {row['start_seconds']:.0f} s)",
                flush=True,
            )


def measure(model: str, engine: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one engine."""
    started = time.perf_counter()
    ways = vllm_ways(model, engine) if engine in VLLM else transformers_ways(model, engine)
    for rollout in ways.values():
        rollout()  # warms up: compiles, captures
    start = time.perf_counter() - started
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, rollout in ways.items():
            begun = time.perf_counter()
            rollout()
            seconds[name].append(time.perf_counter() - begun)
    return [
        {
            "engine": engine,
            "sampling": name,
            "seconds": statistics.median(times),
            "tokens_per_second": PROMPTS * GROUP * LENGTH / statistics.median(times),
            "start_seconds": start,
        }
        for name, times in seconds.items()
    ]


def chats(tokenizer: Any) -> list[str]:
    """The prompts as text, of slightly different lengths."""
    return [
        tokenizer.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": f"How many n are there in word n-i-n-e-{'-'.join('abcdefg'[: i % 7 + 1])}?",
                }
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
        for i in range(PROMPTS)
    ]


def vllm_ways(model: str, engine: str) -> Ways:
    """An engine of vLLM in this process."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    for name, value in {**alone, "MASTER_PORT": "29511", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        os.environ.setdefault(name, value)
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    settings = {"max_num_batched_tokens": 4096, "max_num_seqs": PROMPTS * GROUP, **VLLM[engine]}
    llm = LLM(
        model=model,
        gpu_memory_utilization=0.3,
        max_model_len=256,
        distributed_executor_backend="external_launcher",
        logprobs_mode="processed_logprobs",
        **settings,
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in chats(tokenizer)]
    repeated = [{"prompt_token_ids": prompt} for prompt in ids for _ in range(GROUP)]
    return {
        name: partial(
            llm.generate,
            repeated,
            SamplingParams(temperature=1.0, max_tokens=LENGTH, ignore_eos=True, **asked),
            use_tqdm=False,
        )
        for name, asked in VLLM_SAMPLING.items()
    }


def transformers_ways(model: str, engine: str) -> Ways:
    """`model.generate`, with weights in bfloat16, and in float32 under autocast as a trained model's are."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from recipes.models.decoding_attention import use_for_decoding
    from recipes.models.static_cache import keep_cache

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [text for text in chats(tokenizer) for _ in range(GROUP)]
    batch = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    ).to("cuda")
    options = dict(TRANSFORMERS[engine])
    kept, products = options.pop("kept", False), options.pop("products", False)
    if kept:
        options["cache_implementation"] = "static"
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )
    ways: Ways = {}
    for name, dtype in {"bfloat16": torch.bfloat16, "float32 in autocast": torch.float32}.items():
        network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).cuda().eval()
        if kept:
            keep_cache(network)
        if products:
            use_for_decoding(network)

        def rollout(network: Any = network, dtype: Any = dtype) -> None:
            half = torch.autocast("cuda", torch.bfloat16) if dtype == torch.float32 else nullcontext()
            with torch.no_grad(), half:
                tokens = network.generate(**batch, generation_config=config)
            assert tokens.shape[1] == batch["input_ids"].shape[1] + LENGTH
            torch.cuda.synchronize()

        ways[name] = rollout
    return ways


if __name__ == "__main__":
    main()
