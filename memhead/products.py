"""Matrix products that keep float32 results from half-precision operands.

A GPU's matrix units accumulate in float32 anyway: asking for that result instead of a rounded one
costs nothing but the wider store. A CPU has no such product in torch, so there the operands, one
tile at a time, are widened first.

On a CPU with AVX-512 a float32 product goes to oneDNN, which torch carries beside MKL: MKL chooses
narrower kernels on processors that are not Intel's (benchmarks/results/head_cpu.md has both).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def result_dtype(operand: torch.dtype) -> torch.dtype:
    """dtype of logits, statistics and accumulators for operands of this dtype: float32, or float64."""
    return torch.float64 if operand == torch.float64 else torch.float32


def operand_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """dtype in which operands enter a product so that its result is not rounded to half precision."""
    return torch.float32 if device.type == "cpu" and compute in HALF else compute


def as_operand(x: Tensor, compute: torch.dtype) -> Tensor:
    """``x`` as it enters a product: rounded to the product's dtype, and widened where torch has no such product."""
    return x.to(compute).to(operand_dtype(compute, x.device))


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out[...] = a @ b``, rounded to the dtype of ``out`` once; a (M, K), b (K, N), out (M, N)."""
    if a.dtype != out.dtype:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)  # type: ignore[call-overload]
    if not _suits_onednn(a):
        return torch.mm(a, b, out=out)
    for rows, columns in _onednn_parts(out):
        out[rows, columns].copy_(_onednn_product(a[rows], b[:, columns]))
    return out


def tile_product(a: Tensor, b: Tensor, buffer: Tensor) -> Tensor:
    """``a @ b`` (M, N): in the buffer's memory, or in new memory where :func:`brings_memory` says so."""
    size = a.shape[0] * b.shape[1]
    if brings_memory(a.dtype, a.device, size):
        return _onednn_product(a, b)
    return product(a, b, buffer[:size].view(a.shape[0], b.shape[1]))


def brings_memory(operand: torch.dtype, device: torch.device, size: int) -> bool:
    """Whether :func:`tile_product` of operands of this dtype, with ``size`` results, needs no buffer."""
    return _has_onednn(device.type, operand) and size * operand.itemsize <= ONEDNN_BYTES


def add_product(acc: Tensor, a: Tensor, b: Tensor, *, first: bool) -> Tensor:
    """``acc += a @ b``, or ``acc = a @ b`` where ``first``; acc (M, N) of :func:`result_dtype`."""
    if first:
        return product(a, b, acc)
    if a.dtype != acc.dtype:
        return torch.addmm(acc, a, b, out_dtype=acc.dtype, out=acc)  # type: ignore[call-overload]
    if not _suits_onednn(a):
        return torch.addmm(acc, a, b, out=acc)
    for rows, columns in _onednn_parts(acc):
        acc[rows, columns].add_(_onednn_product(a[rows], b[:, columns]))
    return acc


# oneDNN's product returns new memory: at most so many bytes at a time, which stay in cache until they are used.
ONEDNN_BYTES = 8 << 20


def _onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in new memory. torch has no public function for it; its compiler calls this one."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def _onednn_parts(out: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of ``out`` (M, N) in blocks of at most :data:`ONEDNN_BYTES`, cut along the longer side."""
    rows, columns = out.shape
    everything = slice(None)
    if rows < columns:
        step = max(1, ONEDNN_BYTES // (rows * out.itemsize))
        return ((everything, slice(i, i + step)) for i in range(0, columns, step))
    step = max(1, ONEDNN_BYTES // (columns * out.itemsize))
    return ((slice(i, i + step), everything) for i in range(0, rows, step))


def _suits_onednn(a: Tensor) -> bool:
    return a.numel() > 0 and _has_onednn(a.device.type, a.dtype)


@functools.cache
def _has_onednn(device_type: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN takes such a product, and has kernels here that MKL may not choose."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return device_type == "cpu" and dtype == torch.float32 and wide and torch.backends.mkldnn.is_available()
