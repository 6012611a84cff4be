"""Fast sampling by transformers: a cache of fixed size, so that a decoding step is compiled and run as a CUDA graph.

A step of a small model takes less time than launching its kernels one by one; a graph launches them all at once.
transformers compiles the step where the cache is static, but makes a new cache for every call, and a graph is bound to
the addresses that it was captured with. So one cache is kept and emptied.
"""

from __future__ import annotations

from typing import Any


def keep_cache(model: Any) -> None:
    """Let every `model.generate` with `cache_implementation: static` use one cache, as long as it is large enough."""
    make = model._prepare_static_cache
    kept: dict[int, tuple[int, Any]] = {}  # length and cache, by number of sequences

    def prepare(*, batch_size: int, max_cache_len: int, **options: Any) -> Any:
        length, cache = kept.get(batch_size, (0, None))
        if length >= max_cache_len:
            cache.reset()
            return cache
        kept.clear()  # free before the next is made
        cache = make(batch_size=batch_size, max_cache_len=max_cache_len, **options)
        kept[batch_size] = max_cache_len, cache
        return cache

    model._prepare_static_cache = prepare
