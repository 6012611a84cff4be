"""Faults at vLLM's start, which it and Unsloth tell by the names of their own settings, in the run's.

A vLLM in the training process takes its share of the card when it starts, and measures the card to do so. Where it
cannot, its message names an argument that no configuration here has.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from recipes.config.load import RunConfig
from recipes.problems import see, shortened
from recipes.training.session import RunError

ALONE = "end what else uses the card (nvidia-smi names it), or choose another by CUDA_VISIBLE_DEVICES"
_FREE = re.compile(r"\(([\d.]+)/([\d.]+) GiB\) on startup")
_LONGEST = re.compile(r"estimated maximum model length is (\d+)")


class VllmStart(RunError):
    """vLLM did not start; the message says what it found, and which settings of the run to change."""


@dataclass(frozen=True)
class Fault:
    """words: in the library's message. meaning: what has happened. remedies: from the run and that message."""

    words: str
    meaning: str
    remedies: Callable[[RunConfig, str], list[str]]


def share_of(config: RunConfig) -> tuple[str, float | None]:
    """The setting of vLLM's share of the card, and its value; None: the library's own."""
    if config.model.loader == "unsloth":
        return "model.gpu_memory_utilization", config.model.gpu_memory_utilization
    return "grpo.vllm_gpu_memory_utilization", config.grpo["vllm_gpu_memory_utilization"]


def other_share(config: RunConfig, than: str) -> str:
    """As advice. than: "lower" or "higher"."""
    key, value = share_of(config)
    return f"{key} {than}" + ("" if value is None else f" than {value:g}")


def smaller_share(config: RunConfig, said: str) -> list[str]:
    """The largest that fits into what is free by vLLM's message, in hundredths."""
    found = _FREE.search(said)
    if found is None:
        return [other_share(config, "lower"), ALONE]
    return [f"{share_of(config)[0]}={int(100 * float(found[1]) / float(found[2])) / 100}", ALONE]


def larger_share(config: RunConfig, said: str) -> list[str]:
    """Room for a cache beside the weights; or smaller weights."""
    smaller = [] if config.model.quantised or config.lora is None else ["model.load_in_4bit=true"]
    return [other_share(config, "higher"), *smaller]


def shorter(config: RunConfig, said: str) -> list[str]:
    """The longest sequence that the cache has room for, by vLLM's message."""
    key = "model.max_seq_length" if config.model.loader == "unsloth" else "grpo.vllm_max_model_length"
    found = _LONGEST.search(said)
    length = f"={found[1]} at most" if found else " smaller"
    return [other_share(config, "higher"), f"{key}{length}, which prompt and completion must fit into"]


def again(config: RunConfig, said: str) -> list[str]:
    """Nothing of the run is at fault."""
    return ["the same command again", ALONE]


def without_segments(config: RunConfig, said: str) -> list[str]:
    """An environment variable's doing, with Unsloth; vLLM alone leaves such segments out of what it puts to sleep."""
    return [
        "unset PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF, or take expandable_segments:True out of them",
        "model.vllm_standby=false",
    ]


FAULTS = (
    Fault("on startup is less than desired GPU memory", "its share of the card is not free", smaller_share),
    Fault(
        "No available memory for the cache blocks",
        "the weights take all of its share of the card",
        larger_share,
    ),
    Fault(
        "To serve at least one request", "its share of the card has no room for the longest sequence", shorter
    ),
    Fault("memory profiling", "another process let go of memory of the card while vLLM measured it", again),
    Fault("vLLM standby mode cannot start", "it cannot sleep with expandable segments", without_segments),
)


def explain_start(error: BaseException, config: RunConfig) -> None:
    """Raises VllmStart if that is what the error means."""
    if isinstance(error, RunError) or not config.own_vllm:
        return
    said = str(error)
    for fault in FAULTS:
        if fault.words in said:
            remedies = (f"  {number}. {line}" for number, line in enumerate(fault.remedies(config, said), 1))
            lines = [
                f"vLLM did not start: {fault.meaning}",
                f"  it says  {shortened(' '.join(said.split()), 600)}",
                "What to do:",
                *remedies,
                f"More: {see('driver-cuda-and-vllm')}",
            ]
            raise VllmStart("\n".join(lines)) from None
