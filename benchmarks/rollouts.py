"""Made-up rollouts that benchmarks of the step feed to trainers, and how they are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

SIZE = 8  # completions per group
MIB = 2**20


class Shape(NamedTuple):
    """Prompts uniform between two lengths; completions log-normal around `completion`, or all of that length."""

    name: str
    groups: int
    prompts: tuple[int, int]
    completion: int
    longest: int
    spread: float  # of the logarithm


SHAPES = {
    "gsm8k": Shape("gsm8k", 16, (120, 280), 180, 512, 0.5),
    "256+256": Shape("256+256", 16, (256, 256), 256, 256, 0.0),
    "3072+256": Shape("3072+256", 10, (3072, 3072), 256, 256, 0.0),
    "512+2048": Shape("512+2048", 10, (512, 512), 600, 2048, 0.5),
    "62+70": Shape("62+70", 32, (50, 77), 65, 128, 0.3),  # counting letters
}
FEWER_GROUPS = 4  # of an 8B model at lengths that take long
TOY_SHAPES = {
    "gsm8k": Shape("gsm8k", 4, (12, 28), 18, 51, 0.5),
    "3072+256": Shape("3072+256", 2, (60, 60), 8, 8, 0.0),
}


def shape_for(model: str, name: str) -> Shape:
    """The shape of that name as every benchmark feeds it to that model, so that their seconds compare."""
    shape = SHAPES[name]
    return shape._replace(groups=FEWER_GROUPS) if model == "llama-8b" and name != "gsm8k" else shape


def rollout(shape: Shape, vocab_size: int, zeros: float, device: Any, seed: int = 1) -> dict[str, Any]:
    """The result of the trainer's generation: groups of random tokens, padded as TRL pads them."""
    from trl.trainer.utils import pad

    draw = torch.Generator().manual_seed(seed)
    prompts, completions = [], []
    for _ in range(shape.groups):
        low, high = shape.prompts
        prompt = torch.randint(
            2, vocab_size, (int(torch.randint(low, high + 1, (), generator=draw)),), generator=draw
        )
        for noise in torch.randn(SIZE, generator=draw).tolist():
            length = round(
                min(max(shape.completion * 2.718281828 ** (shape.spread * noise), 4), shape.longest)
            )
            prompts.append(prompt)
            completions.append(torch.randint(2, vocab_size, (length,), generator=draw))
    advantages = torch.randn(shape.groups, SIZE, generator=draw)
    advantages[: round(zeros * shape.groups)] = 0.0

    def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
        ones = [torch.ones_like(row) for row in rows]
        return tuple(pad(x, padding_value=0, padding_side=side).to(device) for x in (rows, ones))  # type: ignore

    prompt_ids, prompt_mask = padded(prompts, "left")
    completion_ids, completion_mask = padded(completions, "right")
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": advantages.flatten().to(device),
        "num_items_in_batch": completion_mask.sum(),
    }


def timed(function: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of a function that has been called before, fewer rounds where it is slow; the peak in MiB."""
    seconds: list[float] = []
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    while len(seconds) < rounds and sum(seconds) < 8:
        began = time.perf_counter()
        function()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / MIB if on_gpu else 0.0
