"""Matrix products that keep float32 results from half-precision operands.

A GPU's matrix units accumulate in float32 anyway: asking for that result instead of a rounded one
costs nothing but the wider store. A CPU has no such product in torch, so there the operands, one
tile at a time, are widened first.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def result_dtype(operand: torch.dtype) -> torch.dtype:
    """dtype of logits, statistics and accumulators for operands of this dtype: float32, or float64."""
    return torch.float64 if operand == torch.float64 else torch.float32


def operand_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """dtype in which operands enter a product so that its result is not rounded to half precision."""
    return torch.float32 if device.type == "cpu" and compute in HALF else compute


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out[...] = a @ b``, rounded to the dtype of ``out`` once; a (M, K), b (K, N), out (M, N)."""
    if a.dtype != out.dtype:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)  # type: ignore[call-overload]
    return torch.mm(a, b, out=out)


def add_product(acc: Tensor, a: Tensor, b: Tensor, *, first: bool) -> Tensor:
    """``acc += a @ b``, or ``acc = a @ b`` where ``first``; acc (M, N) of :func:`result_dtype`."""
    if first:
        return product(a, b, acc)
    if a.dtype != acc.dtype:
        return torch.addmm(acc, a, b, out_dtype=acc.dtype, out=acc)  # type: ignore[call-overload]
    return torch.addmm(acc, a, b, out=acc)
