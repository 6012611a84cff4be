"""The command line's `--plan`: memory, time and disk of a run, without training.

python train_grpo.py --config … --plan [--device L4] [--lengths 40+100]
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import torch
from rich.console import Console

from recipes.config.load import EXIT_STATUS, RunConfig
from recipes.models.prompts import check_problems, prompt_lengths, trained_on_too
from recipes.plan.plan import Plan, parse_device, plan
from recipes.plan.processes import by_way
from recipes.plan.rate import Rate, published, rate_here
from recipes.plan.time import plan_time
from recipes.problems import ConfigError, Problem


def show(config: RunConfig, device: str | None, lengths: str | None = None) -> int:
    """Prints the plan; the exit status is 2 for a mistake, else 0.

    Data and tokenizer that lie on this machine are looked at as a run looks at them.
    device: a card or a size. lengths: mean tokens of a prompt and a completion.
    """
    try:
        mean = None if lengths is None else parse_lengths(lengths, config.completion_length)
        size = None if device is None else parse_device(device)
        if size is not None and config.grpo["use_cpu"]:
            remedy = "leave it out, or grpo.use_cpu"
            raise ConfigError(
                [Problem("--device", "is a GPU, and grpo.use_cpu keeps off it", device, remedy)]
            )
        task = config.make_task()
        unseen = check_problems(config, task, network=False)
        seen = None if unseen else prompt_lengths(config, task)
        if seen is not None:
            config = config.model_copy(update={"longest_prompt": seen.longest})
        found = plan(config, size)
        notes = unseen or trained_on_too(task)
        replace(found, notes=[*found.notes, *notes]).print()
        lines = _time(config, found, device, mean, seen and seen.mean)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_STATUS
    if config.processes > 1:
        Console().print(by_way(found, config.processes).terminal())
    print(*lines, sep="\n")
    return 0


def parse_lengths(text: str, longest: int) -> tuple[int, int]:
    """Tokens of a prompt and a completion, from "40+100" or "40.3+99.5". Raises ConfigError for others, or longer."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*\+\s*(\d+(?:\.\d+)?)\s*", text)
    means = [float(mean) for mean in match.groups()] if match else []
    if not means or min(means) < 1:
        remedy = "write mean tokens of a prompt and of a completion: 40+100; --pilot measures them"
        raise ConfigError([Problem("--lengths", "no two lengths", text, remedy)])
    if means[1] > longest:
        message = f"a mean completion is longer than the longest, grpo.max_completion_length {longest}"
        raise ConfigError([Problem("--lengths", message, text, "lower it, or raise the other")])
    return round(means[0]), round(means[1])


def _time(
    config: RunConfig, found: Plan, device: str | None, mean: tuple[int, int] | None, prompt: int | None
) -> list[str]:
    """mean: tokens of a prompt and a completion; without it, prompt: those of a prompt, where they were seen."""
    rate = _rate(found, device)
    if rate is None:
        return ["time is not planned: name a card, --device H100, or plan for this CPU, grpo.use_cpu=true"]
    s = found.setting
    planned = plan_time(config, s, rate, mean or (None if prompt is None else (prompt, s.completion)))
    if planned is None:
        return [f"time is not planned: a token's way through {found.setting.shape.kind} is not known"]
    if mean:
        return planned.lines()
    which = "these lengths are" if prompt is None else "the prompts are this task's; completions are"
    return [*planned.lines(), f"note: {which} the longest possible: --lengths would say the mean ones"]


def _rate(found: Plan, device: str | None) -> Rate | None:
    """Of the card that was named, else of this machine; None for a GPU of which only the size is known."""
    if device is not None:
        return published(device)
    if found.setting.device_type == "cuda" and not torch.cuda.is_available():
        return None
    return rate_here(torch.float16 if found.setting.precision.e == 2 else torch.float32)
