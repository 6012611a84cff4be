"""The row-wise work on a tile of logits as Triton kernels: twins of ``backends/torch.py``.

One program works on one row of a tile and holds all of it in registers, so that a tile is read
once and written once, whatever is asked of it. The half-precision result overwrites the float32
logits it came from: the matrix products read it from there, and no second buffer is needed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memhead.backends import hopper_fold, hopper_gradient, hopper_target, hopper_tile
from memhead.backends.torch import raw_product
from memhead.backends.triton_math import (
    AFTER,
    BEFORE,
    LOWEST,
    OTHERS,
    REFERENCE,
    SLOPE,
    SQUARES,
    TARGET,
    TOTAL,
    WEIGHTED,
    ceil_div,
    one_minus_exp,
    power_of_2,
    to_logits,
)
from memhead.products import brings_memory, result_dtype
from memhead.statistics import FoldSpec, Tile, Upstream, headroom

# The widest tile whose rows fit the registers of one program.
MAX_COLUMNS = 16384


@triton.jit
def _fold_kernel(
    logits_ptr,  # (R, C) float32, row stride logits_stride
    exps_ptr,  # (R, C) operand dtype, row stride exps_stride: the same memory
    stats_ptr,  # (len(Stat), R), stride stats_stride between statistics
    targets_ptr,  # (R,)
    bias_ptr,  # (C,)
    temperature_ptr,  # (R,)
    acc_ptr,  # (R, H), row stride acc_stride
    start,
    num_columns,
    hidden_size,
    logits_stride,
    exps_stride,
    stats_stride,
    acc_stride,
    logit_scale,
    inverse_temperature,
    shift,
    lazy,
    softcap: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ACC: tl.constexpr,
    WANT_EXPS: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_SQUARES: tl.constexpr,
    WANT_TOTAL: tl.constexpr,
    WANT_TOP1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    raw = tl.load(logits_ptr + row * logits_stride + column, mask=inside, other=0.0)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_TEMPERATURE:
        inverse_temperature = 1.0 / tl.load(temperature_ptr + row)
    z, slope = to_logits(raw, bias, logit_scale, inverse_temperature, softcap, HAS_BIAS)
    stats = stats_ptr + row

    target = tl.load(targets_ptr + row) - start
    is_target = column == target
    if (target >= 0) & (target < num_columns):
        tl.store(stats + TARGET * stats_stride, tl.sum(tl.where(is_target, z, 0.0), 0))
        if softcap != 0.0:
            tl.store(stats + SLOPE * stats_stride, tl.sum(tl.where(is_target, slope, 0.0), 0))
    if WANT_TOTAL:
        total = tl.load(stats + TOTAL * stats_stride)
        tl.store(stats + TOTAL * stats_stride, total + tl.sum(tl.where(inside, z, 0.0), 0))
    if WANT_TOP1:
        before = tl.max(tl.where(inside & (column < target), z, LOWEST), 0)
        after = tl.max(tl.where(inside & (column > target), z, LOWEST), 0)
        tl.store(stats + BEFORE * stats_stride, tl.maximum(before, tl.load(stats + BEFORE * stats_stride)))
        tl.store(stats + AFTER * stats_stride, tl.maximum(after, tl.load(stats + AFTER * stats_stride)))

    z = tl.where(inside & (column != target), z, LOWEST)
    # NaN must reach the reference, where it makes the whole row NaN as it would in a softmax.
    maximum = tl.max(z, 0) + 0.0 * tl.sum(tl.where(z != z, z, 0.0), 0)
    old = tl.load(stats + REFERENCE * stats_stride)
    moved = (maximum - shift > old + lazy) | (maximum != maximum)
    reference = tl.where(moved, maximum - shift, old)
    factor = tl.exp(old - reference)
    z -= reference
    exps = tl.exp(z)

    others = tl.load(stats + OTHERS * stats_stride)
    tl.store(stats + REFERENCE * stats_stride, reference)
    tl.store(stats + OTHERS * stats_stride, others * factor + tl.sum(exps, 0))
    if WANT_ENTROPY:
        weighted = factor * (tl.load(stats + WEIGHTED * stats_stride) + (old - reference) * others)
        tl.store(stats + WEIGHTED * stats_stride, weighted + tl.sum(exps * z, 0))
    if WANT_SQUARES:
        squares = tl.load(stats + SQUARES * stats_stride) * factor * factor
        tl.store(stats + SQUARES * stats_stride, squares + tl.sum(exps * exps, 0))
    if WANT_EXPS:
        tl.store(
            exps_ptr + row * exps_stride + column, (exps * slope).to(exps_ptr.dtype.element_ty), mask=inside
        )
    if HAS_ACC and moved:
        for first in range(0, hidden_size, BLOCK):
            feature = first + column
            acc = tl.load(acc_ptr + row * acc_stride + feature, mask=feature < hidden_size, other=0.0)
            tl.store(acc_ptr + row * acc_stride + feature, acc * factor, mask=feature < hidden_size)


def fold_tile(
    logits: Tensor,  # (R, C) raw products, overwritten
    stats: Tensor,  # (len(Stat), R), updated
    tile: Tile,
    acc: Tensor | None,  # (R, H) sums so far, rescaled where the reference moves
    operand: torch.dtype,
    direction: bool,
) -> Tensor:
    """See :func:`memhead.backends.torch.fold_tile`; C is at most :data:`MAX_COLUMNS`."""
    rows, columns = logits.shape
    targets, start, bias, temperature, spec = tile
    exps = _overlay(logits, operand)
    shift, lazy, _ = headroom(operand)
    block = power_of_2(columns)
    _fold_kernel[(rows,)](
        logits,
        exps,
        stats,
        targets,
        bias,
        temperature,
        acc,
        start,
        columns,
        0 if acc is None else acc.shape[1],
        logits.stride(0),
        exps.stride(0),
        stats.stride(0),
        0 if acc is None else acc.stride(0),
        spec.logit_scale,
        1 / spec.temperature,
        shift,
        lazy,
        softcap=spec.softcap,
        HAS_BIAS=bias is not None,
        HAS_TEMPERATURE=temperature is not None,
        HAS_ACC=acc is not None,
        WANT_EXPS=direction,
        WANT_ENTROPY=spec.entropy,
        WANT_SQUARES=spec.squares,
        WANT_TOTAL=spec.total,
        WANT_TOP1=spec.top1,
        BLOCK=block,
        num_warps=_num_warps(block),
    )
    return exps


def start_rows(x: Tensor, *rest: Any) -> Tensor | None:
    """See :func:`memhead.backends.torch.start_rows`."""
    return hopper_target.start_rows(x, *rest) if fuses(x.dtype, x.shape[1], x.device) else None


def fold_product(x: Tensor, w: Tensor, buffer: Tensor, partial: Tensor | None, *fold: Any) -> Tensor:
    """See :func:`memhead.backends.torch.fold_product`; one kernel where memhead.backends.hopper_fold runs."""
    if partial is not None:
        return hopper_fold.fold_product(x, w, buffer, partial, *fold)
    return fold_tile(raw_product(x, w, buffer), *fold)


def end_rows(partial: Tensor | None, stats: Tensor, spec: FoldSpec) -> None:
    """See :func:`memhead.backends.torch.end_rows`."""
    if partial is not None:
        hopper_fold.merge(partial, stats, spec)


def gradient_product(x: Tensor, w: Tensor, buffer: Tensor, *rest: Any) -> Tensor:
    """See :func:`memhead.backends.torch.gradient_product`."""
    if fuses(x.dtype, x.shape[1], x.device):
        return hopper_gradient.gradient_product(x, w, buffer, *rest)
    return logit_gradient(raw_product(x, w, buffer), *rest)


def fuses(operand: torch.dtype, hidden_size: int, device: torch.device) -> bool:
    """See :func:`memhead.backends.torch.fuses`; where the kernels of memhead.backends.hopper_tile run."""
    return hopper_tile.available(operand, hidden_size, device)


def tile_columns(
    wanted: int, vocab_size: int, operand: torch.dtype, hidden_size: int, device: torch.device
) -> int:
    """At most ``wanted``: as many as fit the registers of a program, where one program works on one row."""
    if fuses(operand, hidden_size, device):
        return hopper_tile.tile_columns(wanted, vocab_size, device)
    return min(wanted, MAX_COLUMNS)


def buffer_columns(
    rows: int, columns: int, operand: torch.dtype, hidden_size: int, device: torch.device
) -> int:
    """See :func:`memhead.backends.torch.buffer_columns`; whole blocks of them where logits are never written."""
    if fuses(operand, hidden_size, device):
        return hopper_tile.padded(columns)
    return 0 if brings_memory(operand, device, rows * columns) else columns


def tile_dtype(operand: torch.dtype, hidden_size: int, device: torch.device) -> torch.dtype:
    """dtype of the buffer that holds a tile: half precision where the logits are never written."""
    return operand if fuses(operand, hidden_size, device) else result_dtype(operand)


@triton.jit
def _finish_kernel(
    acc_ptr,  # (R, H)
    stats_ptr,  # (len(Stat), R)
    target_rows_ptr,  # (R, H)
    out_ptr,  # (R, H)
    hidden_size,
    acc_stride,
    stats_stride,
    target_stride,
    out_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < hidden_size
    others = tl.load(stats_ptr + OTHERS * stats_stride + row)
    slope = tl.load(stats_ptr + SLOPE * stats_stride + row)
    mean = tl.where(others > 0, 1.0 / others, 0.0) * tl.load(
        acc_ptr + row * acc_stride + feature, mask=inside
    )
    at_target = tl.load(target_rows_ptr + row * target_stride + feature, mask=inside).to(tl.float32)
    out = (slope * at_target - mean).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + feature, out, mask=inside)


def finish_direction(
    acc: Tensor,  # (R, H)
    stats: Tensor,  # (len(Stat), R)
    target_rows: Tensor,  # (R, H) W_t
    out: Tensor,  # (R, H); may be acc itself
) -> None:
    """See :func:`memhead.backends.torch.finish_direction`."""
    rows, hidden_size = acc.shape
    block = min(1024, power_of_2(hidden_size))
    _finish_kernel[(rows, ceil_div(hidden_size, block))](
        acc,
        stats,
        target_rows,
        out,
        hidden_size,
        acc.stride(0),
        stats.stride(0),
        target_rows.stride(0),
        out.stride(0),
        BLOCK=block,
        num_warps=4,
    )


@triton.jit
def _gradient_kernel(
    logits_ptr,  # (R, C) float32
    grad_ptr,  # (R, C) operand dtype: the same memory
    targets_ptr,
    bias_ptr,
    temperature_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    logprobs_ptr,
    entropy_ptr,
    lse_others_ptr,
    start,
    num_columns,
    logits_stride,
    grad_stride,
    logit_scale,
    inverse_temperature,
    softcap: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    raw = tl.load(logits_ptr + row * logits_stride + column, mask=inside, other=0.0)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_TEMPERATURE:
        inverse_temperature = 1.0 / tl.load(temperature_ptr + row)
    z, slope = to_logits(raw, bias, logit_scale, inverse_temperature, softcap, HAS_BIAS)

    is_target = column == tl.load(targets_ptr + row) - start
    logp = tl.load(logprobs_ptr + row)
    lse_others = tl.load(lse_others_ptr + row)
    uncertain = one_minus_exp(logp)
    q = tl.where(is_target, -1.0, tl.exp(z - lse_others))
    grad = -(tl.load(grad_logprobs_ptr + row) * uncertain) * q
    if HAS_ENTROPY:
        lse = tl.where(uncertain > 0, lse_others - tl.log(uncertain), -LOWEST)
        log_p = tl.maximum(tl.where(is_target, logp, z - lse), LOWEST)
        grad -= tl.load(grad_entropy_ptr + row) * tl.exp(log_p) * (log_p + tl.load(entropy_ptr + row))
    grad *= slope
    # The results overlay logits that another warp may not have read yet.
    tl.debug_barrier()
    tl.store(grad_ptr + row * grad_stride + column, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def logit_gradient(
    logits: Tensor,  # (R, C) raw products, overwritten
    tile: Tile,
    upstream: Upstream,  # each (R,); the gradients times logit_scale / T
    operand: torch.dtype,
) -> Tensor:
    """See :func:`memhead.backends.torch.logit_gradient`; C is at most :data:`MAX_COLUMNS`."""
    rows, columns = logits.shape
    targets, start, bias, temperature, spec = tile
    grad = _overlay(logits, operand)
    block = power_of_2(columns)
    _gradient_kernel[(rows,)](
        logits,
        grad,
        targets,
        bias,
        temperature,
        upstream.grad_logprobs,
        upstream.grad_entropy,
        upstream.logprobs,
        upstream.entropy,
        upstream.lse_others,
        start,
        columns,
        logits.stride(0),
        grad.stride(0),
        spec.logit_scale,
        1 / spec.temperature,
        softcap=spec.softcap,
        HAS_BIAS=bias is not None,
        HAS_TEMPERATURE=temperature is not None,
        HAS_ENTROPY=upstream.grad_entropy is not None,
        BLOCK=block,
        num_warps=_num_warps(block),
    )
    return grad


def _overlay(logits: Tensor, operand: torch.dtype) -> Tensor:
    """(R, C) of ``operand`` in the memory of float32 ``logits`` (R, C): the start of each row."""
    return logits.view(operand)[:, : logits.shape[1]]


def _num_warps(block: int) -> int:
    """About 32 elements a thread: enough loads in flight, and no spilling."""
    return max(1, min(16, block // 1024))
