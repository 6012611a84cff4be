"""Tokens per second that vLLM samples inside the training process, and what its options cost.

    python -m benchmarks.generation_gpu --model FOLDER --output DIR        # about four minutes on an H100

One engine per process, as TRL makes it (`trl.generation.vllm_generation`) or with larger CUDA graphs and batches; in
each engine every way of sampling in turn, medians of `--rounds`. The rollout is 128 prompts with 8 completions each of
128 tokens (`ignore_eos`, so that every way computes the same number of tokens).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS, GROUP, LENGTH = 128, 8, 128
ENGINES: dict[str, dict[str, Any]] = {
    "as TRL makes it": {},
    "graphs to 1024": {"max_cudagraph_capture_size": PROMPTS * GROUP, "max_num_batched_tokens": 16384},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "as TRL asks": {"logprobs": 0},
    "no text": {"logprobs": 0, "detokenize": False},
    "no text, no log-probabilities": {"logprobs": None, "detokenize": False},
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
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine is not None:
        print("ROWS " + json.dumps(measure(options.model, options.engine, options.rounds)))
        return
    rows: list[dict[str, Any]] = []
    options.output.mkdir(parents=True, exist_ok=True)
    for engine in ENGINES:
        call = [sys.executable, "-m", "benchmarks.generation_gpu", *sys.argv[1:], "--engine", engine]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("ROWS ")]
        if not found:
            print(engine, "failed:", done.stderr[-3000:], flush=True)
            continue
        rows += json.loads(found[0].removeprefix("ROWS "))
        (options.output / "generation.json").write_text(json.dumps(rows, indent=1))
        for row in rows[-len(SAMPLING) :]:
            print(
                f"{row['engine']:18s} {row['sampling']:30s} {row['tokens_per_second']:8.0f} tokens/s "
                f"{row['seconds']:.2f} s (start {row['start_seconds']:.0f} s)",
                flush=True,
            )


def measure(model: str, engine: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one engine."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29511")
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    llm = LLM(
        model=model,
        gpu_memory_utilization=0.3,
        max_model_len=256,
        max_num_seqs=PROMPTS * GROUP,
        distributed_executor_backend="external_launcher",
        logprobs_mode="processed_logprobs",
        **{"max_num_batched_tokens": 4096, **ENGINES[engine]},
    )
    start = time.perf_counter() - started
    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [
        [
            {
                "role": "user",
                "content": f"How many n are there in word n-i-n-e-{'-'.join('abcdefg'[: i % 7 + 1])}?",
            }
        ]
        for i in range(PROMPTS)
    ]
    texts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
    ]
    prompts = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]
    repeated = [prompt for prompt in prompts for _ in range(GROUP)]
    seconds: dict[str, list[float]] = {name: [] for name in SAMPLING}
    for turn in range(rounds + 1):  # the first warms up
        for name, asked in SAMPLING.items():
            sampling = SamplingParams(temperature=1.0, max_tokens=LENGTH, ignore_eos=True, **asked)
            begun = time.perf_counter()
            llm.generate(repeated, sampling, use_tqdm=False)
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    tokens = PROMPTS * GROUP * LENGTH
    return [
        {
            "engine": engine,
            "sampling": name,
            "seconds": statistics.median(times),
            "tokens_per_second": tokens / statistics.median(times),
            "start_seconds": start,
        }
        for name, times in seconds.items()
    ]


if __name__ == "__main__":
    main()
