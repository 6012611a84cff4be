"""Counts the matrix products of a computation, however deep inside an operator they are."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torch.profiler import ProfilerActivity, profile

# Where the two operands stand among a product's arguments.
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "mkldnn::_linear_pointwise": 0}


def count_products(function: Callable[[], object], rows: int, vocab: int, features: int) -> float:
    """Operations of the matrix products of ``function``, in units of (rows, features) by (features, vocab)."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
        function()
    operations = 0.0
    for event in prof.events():
        if event.name in PRODUCTS:
            first = PRODUCTS[event.name]
            a, b = event.input_shapes[first : first + 2]
            operations += prod(a) * prod(b) / a[1]  # M K, and K N either way round
    return operations / (rows * vocab * features)
