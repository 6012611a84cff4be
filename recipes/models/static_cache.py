"""Fast sampling by transformers: a cache of fixed size, so that a decoding step is compiled and run as a CUDA graph.

A step of a small model takes less time than launching its kernels one by one; a graph launches them all at once.
transformers compiles the step where the cache is static, but makes a new cache for every call, and a graph is bound to
the addresses that it was captured with. So one cache is kept and emptied.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from recipes.models.decoding_attention import use_for_decoding
from recipes.models.mode import in_evaluation_mode
from recipes.models.precision import Precision

ROUND_TO = 64  # tokens: a slightly longer prompt than ever before need not compile anew


class OneDtypeCache(StaticCache):
    """Under autocast the rotated keys are float32 beside values in half precision; the layers keep one dtype."""

    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **options: Any) -> Any:
        """Both (B, heads, L, D). Attention under autocast would round the keys to the same dtype."""
        return super().update(key_states.to(value_states.dtype), value_states, *rest, **options)


def keep_cache(model: Any) -> None:
    """Let every `model.generate` with `cache_implementation: static` use one cache, as long as it is large enough."""
    kept: dict[Any, tuple[int, StaticCache]] = {}  # length and cache, by number of sequences and autocast

    def prepare(*, batch_size: int, max_cache_len: int, **_: Any) -> StaticCache:
        device = model.device.type
        key = batch_size, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        length, cache = kept.get(key, (0, None))
        if cache is not None and length >= max_cache_len:
            cache.reset()
            return cache
        kept.clear()  # free before the next is made
        length = -(-max_cache_len // ROUND_TO) * ROUND_TO
        cache = OneDtypeCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
        kept[key] = length, cache
        return cache

    model._prepare_static_cache = prepare


def sample_by_graphs(trainer: Any, model: Any) -> None:
    """Let TRL's trainer sample so. model: the causal language model that it trains, without wrappers.

    TRL makes the configuration with `disable_compile`: a new cache for every call would compile and capture anew.
    """
    keep_cache(model)
    use_for_decoding(model)
    sample_as_evaluations_do(model, Precision.of(trainer.args))
    trainer.generation_config.disable_compile = False


def sample_as_evaluations_do(model: Any, precision: Precision) -> None:
    """Let every `model.generate` be in evaluation mode and within the run's autocast; the mode is put back.

    TRL samples in training mode, with dropout where there is any, and enters autocast in each forward pass. To
    torch.compile and to the kept cache either is another case: an evaluation had its own steps and its own cache.
    """
    generate = model.generate

    @wraps(generate)
    def sampled(*args: Any, **options: Any) -> Any:
        with in_evaluation_mode(model), precision.autocast(model.device):
            return generate(*args, **options)

    model.generate = sampled


def rows_by_graphs(trainer: Any) -> int | None:
    """The completions that a process of such a trainer samples at once; None where it does not sample so."""
    if getattr(getattr(trainer, "generation_config", None), "disable_compile", True) is not False:
        return None
    return trainer.args.generation_batch_size // trainer.args.world_size
