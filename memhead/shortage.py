"""Out of memory in a pass over tiles: the tile is halved, and the pass repeated from its beginning.

A smaller tile gives the same result, to rounding, in more launches. What a pass needs beside its tile (outputs, sums
over rows) no smaller tile makes smaller; where that does not fit, the last error is the caller's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
Tile = TypeVar("Tile")

# torch has a class of its own for a GPU's caching allocator alone.
_WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "bad_alloc")
# The whole of what oneDNN tells where it had no room for a primitive's code or scratch space. What it cannot compute
# at all it refuses earlier, for the "primitive descriptor".
_ONEDNN = ("could not create a primitive", "could not execute a primitive")
# Unsloth, of two faults at vLLM's start that it does not want to be taken for one.
_DENIED = "not an out of memory"
SAID = (
    "memhead: out of memory with a tile of logits; the pass was repeated with a smaller one, to the same result. "
    "A smaller chunk (head.chunk in a recipe) saves the attempt"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device and in whichever library."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error)
    if not isinstance(error, RuntimeError) or _DENIED in said.lower():
        return False
    return said in _ONEDNN or any(word in said for word in _WORDS)


def in_smaller_tiles(tile: Tile, halved: Callable[[Tile], Tile | None], run: Callable[[Tile], T]) -> T:
    """``run(tile)``, repeated with ``halved(tile)`` as long as memory fails and there is a half.

    ``run`` starts from nothing each time. That a tile was halved is a ``RuntimeWarning``, whose text is always the
    same: Python's default filter shows it once.
    """
    attempt: Tile | None = tile
    while attempt is not None:
        try:
            found = run(attempt)
        except (RuntimeError, MemoryError) as error:
            smaller = halved(attempt) if is_out_of_memory(error) else None
            if smaller is None:
                raise
        else:
            if attempt is not tile:
                warnings.warn(SAID, RuntimeWarning, stacklevel=1)  # one place, so once whoever calls
            return found
        attempt = smaller  # out here, where the error no longer keeps the failed pass's tensors
    raise AssertionError("the loop ends by return or raise")
