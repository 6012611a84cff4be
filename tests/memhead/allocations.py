"""Records every allocation that a computation makes, however deep inside an operator.

A dispatch mode does not look inside a custom operator, nor inside torch's own C++; the profiler's
memory events come from the allocator itself, and miss nothing that is a tensor.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocations(function: Callable[[], object]) -> list[int]:
    """Sizes in bytes of all tensor storages that ``function`` allocates on the CPU, largest first."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    events = prof.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sorted((e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0), reverse=True)
