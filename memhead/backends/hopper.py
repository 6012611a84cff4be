"""A product and the row-wise work on it in one kernel, for GPUs with tensor memory accelerators.

On Hopper (and Blackwell's data-centre chips) Triton's own product runs within a few per cent of the
vendor's library, so the logits need not exist in memory at all, not even as a tile: what is
written is what the second product reads, in the operands' dtype. The mainloop is the plain
persistent one: a program an SM, tiles in groups that share their operands in L2.

All exponentials of a row in one launch must have one reference, but nobody knows the row's maximum
beforehand. So each block of columns takes the reference that the row had before the launch,
unless its own maximum is far from it (statistics.headroom); the blocks' references are written
down, and :func:`_merge_kernel` settles on one and corrects the rare row where they differ.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memhead.backends.triton_math import (
    AFTER,
    BEFORE,
    LOG2_E,
    LOWEST,
    OTHERS,
    REFERENCE,
    SLOPE,
    SQUARES,
    TARGET,
    TOTAL,
    UNSET,
    WEIGHTED,
    one_minus_exp,
)
from memhead.products import HALF
from memhead.statistics import FoldSpec, Stat, Upstream, headroom

# The tile of one program: 128 x 256 logits in the registers of eight warps, three stages of
# operands in shared memory. benchmarks/results/gpu_log.md has the alternatives and their times.
BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_K, STAGES, WARPS, GROUP = 128, 256, 64, 3, 8, 16
# The statistics of a row's blocks are merged in the registers of one warp.
MAX_COLUMNS = 1 << 16


def available(operand: torch.dtype, hidden_size: int, device: torch.device) -> bool:
    """Whether the kernels of this file run: half-precision rows of a multiple of 16 bytes, on such a GPU."""
    return operand in HALF and hidden_size % 8 == 0 and _multiprocessors(device) > 0


@triton.jit
def _block_product(
    x_desc,
    w_desc,
    block_row,
    block_column,
    hidden_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32 of x @ w.T."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(tl.cdiv(hidden_size, BLOCK_K)):
        x = x_desc.load([block_row * BLOCK_M, k * BLOCK_K])
        w = w_desc.load([block_column * BLOCK_N, k * BLOCK_K])
        acc = tl.dot(x, w.T, acc)
    return acc


@triton.jit
def _place(block, num_row_blocks, num_column_blocks, GROUP: tl.constexpr):
    """Row block and column block of the ``block``-th one, in groups of GROUP rows for reuse in L2."""
    in_group = GROUP * num_column_blocks
    first = block // in_group * GROUP
    size = min(num_row_blocks - first, GROUP)
    return first + block % in_group % size, block % in_group // size


@triton.jit
def _block_logits(
    raw,
    bias_ptr,
    row_inverse_temperature,
    column,
    num_columns,
    logit_scale,
    inverse_temperature,
    softcap: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """Logits (M, N) of a block of raw products; column (N,), row_inverse_temperature (M,)."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < num_columns, other=0.0).to(tl.float32)
        raw += tl.maximum(bias, LOWEST)[None, :]
    if softcap != 0.0:
        # tanh, as (1 - u) / (1 + u) with u = exp(-2 |x|)
        decay = tl.exp2(tl.abs(raw) * (-2 * LOG2_E * logit_scale / softcap))
        raw = tl.where(raw < 0, -softcap, softcap) * tl.fdiv(1 - decay, 1 + decay)
        if HAS_TEMPERATURE:
            raw *= row_inverse_temperature[:, None]
        else:
            raw *= inverse_temperature
    elif HAS_TEMPERATURE:
        raw *= (logit_scale * row_inverse_temperature)[:, None]
    else:
        raw *= logit_scale * inverse_temperature
    return raw


@triton.jit
def _slope(
    z, row_inverse_temperature, inverse_temperature, softcap: tl.constexpr, HAS_TEMPERATURE: tl.constexpr
):
    """The softcap's slope 1 - tanh^2 at logits z (M, N), from z itself: a second block of it would spill.

    Zero where z stands for minus infinity.
    """
    if HAS_TEMPERATURE:
        tanh = z / (softcap * row_inverse_temperature)[:, None]
    else:
        tanh = z * (1 / (softcap * inverse_temperature))
    return tl.maximum((1 - tanh) * (1 + tanh), 0.0)


@triton.jit(do_not_specialize=["num_rows", "stats_stride", "start"])
def _fold_kernel(
    x_desc,  # (R, H)
    w_desc,  # (C, H)
    exps_ptr,  # (R, C), row stride exps_stride
    partial_ptr,  # (len(Stat), column blocks, R): the statistics of each block of columns
    stats_ptr,  # (len(Stat), R), stride stats_stride between statistics
    targets_ptr,
    bias_ptr,
    temperature_ptr,
    start,
    num_rows,
    num_columns,
    hidden_size,
    exps_stride,
    stats_stride,
    logit_scale,
    inverse_temperature,
    shift,
    lazy,
    softcap: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    WANT_EXPS: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_SQUARES: tl.constexpr,
    WANT_TOTAL: tl.constexpr,
    WANT_TOP1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_row_blocks = tl.cdiv(num_rows, BLOCK_M)
    num_column_blocks = tl.cdiv(num_columns, BLOCK_N)
    for block in tl.range(tl.program_id(0), num_row_blocks * num_column_blocks, tl.num_programs(0)):
        block_row, block_column = _place(block, num_row_blocks, num_column_blocks, GROUP)
        raw = _block_product(x_desc, w_desc, block_row, block_column, hidden_size, BLOCK_M, BLOCK_N, BLOCK_K)
        row = block_row * BLOCK_M + tl.arange(0, BLOCK_M)
        column = block_column * BLOCK_N + tl.arange(0, BLOCK_N)
        real = row < num_rows
        row_inverse_temperature = tl.full((BLOCK_M,), 1.0, tl.float32)
        if HAS_TEMPERATURE:
            row_inverse_temperature = 1.0 / tl.load(temperature_ptr + row, mask=real, other=1.0)
        z = _block_logits(
            raw, bias_ptr, row_inverse_temperature, column, num_columns, logit_scale,
            inverse_temperature, softcap, HAS_BIAS, HAS_TEMPERATURE,
        )  # fmt: skip
        stats = stats_ptr + row
        partial = partial_ptr + block_column * num_rows + row
        partial_stride = num_column_blocks * num_rows

        target = (tl.load(targets_ptr + row, mask=real, other=-1) - start).to(tl.int32)
        is_target = column[None, :] == target[:, None]
        here = (target >= block_column * BLOCK_N) & (
            target < tl.minimum((block_column + 1) * BLOCK_N, num_columns)
        )
        if tl.max(here.to(tl.int32), 0) > 0:
            at_target = tl.sum(tl.where(is_target, z, 0.0), 1)
            tl.store(stats + TARGET * stats_stride, at_target, mask=here & real)
            if softcap != 0.0:
                slope = _slope(
                    at_target[:, None], row_inverse_temperature, inverse_temperature, softcap, HAS_TEMPERATURE
                )
                tl.store(stats + SLOPE * stats_stride, tl.sum(slope, 1), mask=here & real)
        inside = (column < num_columns)[None, :]
        if WANT_TOTAL:
            tl.store(partial + TOTAL * partial_stride, tl.sum(tl.where(inside, z, 0.0), 1), mask=real)
        if WANT_TOP1:
            before = tl.max(tl.where(inside & (column[None, :] < target[:, None]), z, LOWEST), 1)
            after = tl.max(tl.where(inside & (column[None, :] > target[:, None]), z, LOWEST), 1)
            tl.store(partial + BEFORE * partial_stride, before, mask=real)
            tl.store(partial + AFTER * partial_stride, after, mask=real)

        z = tl.where(is_target | (column >= num_columns)[None, :], LOWEST, z)
        maximum = tl.max(z, 1)
        reference = tl.load(stats + REFERENCE * stats_stride, mask=real, other=0.0)
        # A row of which nothing is known starts from zero, around which most logits lie.
        unset = reference <= UNSET
        reference = tl.where(unset, 0.0, reference)
        wanted = maximum - shift
        far = (wanted > reference + lazy) | (unset & (wanted < reference - lazy) & (maximum > UNSET))
        reference = tl.where(far, wanted, reference)
        tl.store(partial + REFERENCE * partial_stride, reference, mask=real)
        exps = tl.exp2((z - reference[:, None]) * LOG2_E)
        if WANT_ENTROPY:
            weighted = tl.sum(exps * (z - reference[:, None]), 1)
            tl.store(partial + WEIGHTED * partial_stride, weighted, mask=real)
        tl.store(partial + OTHERS * partial_stride, tl.sum(exps, 1), mask=real)
        if WANT_SQUARES:
            tl.store(partial + SQUARES * partial_stride, tl.sum(exps * exps, 1), mask=real)
        if WANT_EXPS:
            if softcap != 0.0:
                exps *= _slope(z, row_inverse_temperature, inverse_temperature, softcap, HAS_TEMPERATURE)
            place = exps_ptr + row[:, None].to(tl.int64) * exps_stride + column[None, :]
            tl.store(place, exps.to(exps_ptr.dtype.element_ty), mask=real[:, None] & inside)


# A row must give the same bits whatever rows are beside it, so no number or address that depends on
# them may choose another variant of the kernel, with its sums in another order.
@triton.jit(
    do_not_specialize=["num_rows", "stats_stride", "acc_stride"],
    do_not_specialize_on_alignment=["partial_ptr", "stats_ptr"],
)
def _merge_kernel(
    partial_ptr,  # (len(Stat), column blocks, R)
    stats_ptr,  # (len(Stat), R), updated
    exps_ptr,  # (R, C)
    acc_ptr,  # (R, H)
    num_rows,
    num_columns,
    num_column_blocks,
    hidden_size,
    stats_stride,
    exps_stride,
    acc_stride,
    HAS_ACC: tl.constexpr,
    WANT_EXPS: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_SQUARES: tl.constexpr,
    WANT_TOTAL: tl.constexpr,
    WANT_TOP1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,  # at least num_column_blocks
):
    """Settle on one reference for a row, and bring to it what was computed against another."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    mask = block < num_column_blocks
    stats = stats_ptr + row
    partial = partial_ptr + block.to(tl.int64) * num_rows + row
    partial_stride = num_column_blocks * num_rows

    sums = tl.load(partial + OTHERS * partial_stride, mask=mask, other=0.0)
    references = tl.load(partial + REFERENCE * partial_stride, mask=mask, other=0.0)
    counts = (sums > 0) | (sums != sums)
    old = tl.load(stats + REFERENCE * stats_stride)
    reference = tl.maximum(tl.max(tl.where(counts, references, LOWEST), 0), old)
    distance = tl.where(counts, references - reference, 0.0)
    factor = tl.exp(distance)
    moved = tl.exp(old - reference)

    others = tl.load(stats + OTHERS * stats_stride)
    tl.store(stats + REFERENCE * stats_stride, reference)
    tl.store(stats + OTHERS * stats_stride, others * moved + tl.sum(sums * factor, 0))
    if WANT_ENTROPY:
        weighted = tl.load(partial + WEIGHTED * partial_stride, mask=mask, other=0.0) + distance * sums
        before = tl.load(stats + WEIGHTED * stats_stride) + (old - reference) * others
        tl.store(stats + WEIGHTED * stats_stride, moved * before + tl.sum(factor * weighted, 0))
    if WANT_SQUARES:
        squares = tl.load(partial + SQUARES * partial_stride, mask=mask, other=0.0) * factor * factor
        before = tl.load(stats + SQUARES * stats_stride) * moved * moved
        tl.store(stats + SQUARES * stats_stride, before + tl.sum(squares, 0))
    if WANT_TOTAL:
        total = tl.sum(tl.load(partial + TOTAL * partial_stride, mask=mask, other=0.0), 0)
        tl.store(stats + TOTAL * stats_stride, tl.load(stats + TOTAL * stats_stride) + total)
    if WANT_TOP1:
        before = tl.max(tl.load(partial + BEFORE * partial_stride, mask=mask, other=LOWEST), 0)
        after = tl.max(tl.load(partial + AFTER * partial_stride, mask=mask, other=LOWEST), 0)
        tl.store(stats + BEFORE * stats_stride, tl.maximum(before, tl.load(stats + BEFORE * stats_stride)))
        tl.store(stats + AFTER * stats_stride, tl.maximum(after, tl.load(stats + AFTER * stats_stride)))

    # Two ifs: one is decided when the kernel is compiled, the other for each row. NaN is no factor of 1 either.
    if WANT_EXPS:  # noqa: SIM102
        if tl.sum((factor == 1.0).to(tl.int32), 0) < BLOCKS:
            for i in range(num_column_blocks):
                column = i * BLOCK_N + tl.arange(0, BLOCK_N)
                place = exps_ptr + row * exps_stride + column
                exps = tl.load(place, mask=column < num_columns, other=0.0).to(tl.float32)
                exps *= tl.sum(tl.where(block == i, factor, 0.0), 0)
                tl.store(place, exps.to(exps_ptr.dtype.element_ty), mask=column < num_columns)
    if HAS_ACC:  # noqa: SIM102
        if moved != 1.0:
            for first in range(0, hidden_size, BLOCK_N):
                feature = first + tl.arange(0, BLOCK_N)
                acc = tl.load(acc_ptr + row * acc_stride + feature, mask=feature < hidden_size, other=0.0)
                tl.store(acc_ptr + row * acc_stride + feature, acc * moved, mask=feature < hidden_size)


def fold_product(
    x: Tensor,  # (R, H)
    w: Tensor,  # (C, H)
    buffer: Tensor,  # (>= R * C,) of the operand dtype
    stats: Tensor,  # (len(Stat), R), updated
    targets: Tensor,  # (R,) int64
    start: int,
    bias: Tensor | None,  # (C,)
    temperature: Tensor | None,  # (R,)
    spec: FoldSpec,
    acc: Tensor | None,  # (R, H) sums so far, rescaled where the reference moves
    operand: torch.dtype,
    direction: bool,
) -> Tensor:
    """``fold_tile(x @ w.T, ...)`` of the other backends, without ``x @ w.T``."""
    (num_rows, hidden_size), num_columns = x.shape, w.shape[0]
    exps = buffer[: num_rows * num_columns].view(num_rows, num_columns)
    column_blocks = triton.cdiv(num_columns, BLOCK_COLUMNS)
    partial = stats.new_empty(len(Stat), column_blocks, num_rows)
    shift, lazy = headroom(operand)
    _fold_kernel[_grid(num_rows, num_columns, x.device)](
        _descriptor(x, BLOCK_ROWS),
        _descriptor(w, BLOCK_COLUMNS),
        exps,
        partial,
        stats,
        targets,
        bias,
        temperature,
        start,
        num_rows,
        num_columns,
        hidden_size,
        exps.stride(0),
        stats.stride(0),
        spec.logit_scale,
        1 / spec.temperature,
        shift,
        lazy,
        softcap=spec.softcap,
        HAS_BIAS=bias is not None,
        HAS_TEMPERATURE=temperature is not None,
        WANT_EXPS=direction,
        WANT_ENTROPY=spec.entropy,
        WANT_SQUARES=spec.squares,
        WANT_TOTAL=spec.total,
        WANT_TOP1=spec.top1,
        **_BLOCKS,
    )
    _merge_kernel[(num_rows,)](
        partial,
        stats,
        exps,
        acc,
        num_rows,
        num_columns,
        column_blocks,
        hidden_size,
        stats.stride(0),
        exps.stride(0),
        0 if acc is None else acc.stride(0),
        HAS_ACC=acc is not None,
        WANT_EXPS=direction,
        WANT_ENTROPY=spec.entropy,
        WANT_SQUARES=spec.squares,
        WANT_TOTAL=spec.total,
        WANT_TOP1=spec.top1,
        BLOCK_N=BLOCK_COLUMNS,
        BLOCKS=triton.next_power_of_2(column_blocks),
        num_warps=1,
    )
    return exps


@triton.jit
def _gradient_kernel(
    x_desc,  # (R, H)
    w_desc,  # (C, H)
    grad_ptr,  # (R, C)
    targets_ptr,
    bias_ptr,
    temperature_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    logprobs_ptr,
    entropy_ptr,
    lse_others_ptr,
    start,
    num_rows,
    num_columns,
    hidden_size,
    grad_stride,
    logit_scale,
    inverse_temperature,
    softcap: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_row_blocks = tl.cdiv(num_rows, BLOCK_M)
    num_column_blocks = tl.cdiv(num_columns, BLOCK_N)
    for block in tl.range(tl.program_id(0), num_row_blocks * num_column_blocks, tl.num_programs(0)):
        block_row, block_column = _place(block, num_row_blocks, num_column_blocks, GROUP)
        raw = _block_product(x_desc, w_desc, block_row, block_column, hidden_size, BLOCK_M, BLOCK_N, BLOCK_K)
        row = block_row * BLOCK_M + tl.arange(0, BLOCK_M)
        column = block_column * BLOCK_N + tl.arange(0, BLOCK_N)
        real = row < num_rows
        row_inverse_temperature = tl.full((BLOCK_M,), 1.0, tl.float32)
        if HAS_TEMPERATURE:
            row_inverse_temperature = 1.0 / tl.load(temperature_ptr + row, mask=real, other=1.0)
        z = _block_logits(
            raw, bias_ptr, row_inverse_temperature, column, num_columns, logit_scale,
            inverse_temperature, softcap, HAS_BIAS, HAS_TEMPERATURE,
        )  # fmt: skip
        target = (tl.load(targets_ptr + row, mask=real, other=-1) - start).to(tl.int32)
        is_target = column[None, :] == target[:, None]
        logp = tl.load(logprobs_ptr + row, mask=real, other=-1.0)
        lse_others = tl.load(lse_others_ptr + row, mask=real, other=0.0)
        uncertain = one_minus_exp(logp)
        coefficient = tl.load(grad_logprobs_ptr + row, mask=real, other=0.0) * uncertain
        q = tl.where(is_target, -1.0, tl.exp2(z * LOG2_E - (lse_others * LOG2_E)[:, None]))
        grad = -coefficient[:, None] * q
        if HAS_ENTROPY:
            lse = tl.where(uncertain > 0, lse_others - tl.log(uncertain), -LOWEST)
            log_p = tl.maximum(tl.where(is_target, logp[:, None], z - lse[:, None]), LOWEST)
            entropy = tl.load(entropy_ptr + row, mask=real, other=0.0)
            grad_entropy = tl.load(grad_entropy_ptr + row, mask=real, other=0.0)
            grad -= grad_entropy[:, None] * tl.exp(log_p) * (log_p + entropy[:, None])
        if softcap != 0.0:
            grad *= _slope(z, row_inverse_temperature, inverse_temperature, softcap, HAS_TEMPERATURE)
        place = grad_ptr + row[:, None].to(tl.int64) * grad_stride + column[None, :]
        tl.store(
            place, grad.to(grad_ptr.dtype.element_ty), mask=real[:, None] & (column < num_columns)[None, :]
        )


def gradient_product(
    x: Tensor,  # (R, H)
    w: Tensor,  # (C, H)
    buffer: Tensor,  # (>= R * C,) of the operand dtype
    targets: Tensor,  # (R,)
    start: int,
    bias: Tensor | None,  # (C,)
    temperature: Tensor | None,  # (R,)
    spec: FoldSpec,
    upstream: Upstream,  # each (R,); the gradients times logit_scale / T
    operand: torch.dtype,
) -> Tensor:
    """``logit_gradient(x @ w.T, ...)`` of the other backends, without ``x @ w.T``."""
    (num_rows, hidden_size), num_columns = x.shape, w.shape[0]
    grad = buffer[: num_rows * num_columns].view(num_rows, num_columns)
    _gradient_kernel[_grid(num_rows, num_columns, x.device)](
        _descriptor(x, BLOCK_ROWS),
        _descriptor(w, BLOCK_COLUMNS),
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
        num_rows,
        num_columns,
        hidden_size,
        grad.stride(0),
        spec.logit_scale,
        1 / spec.temperature,
        softcap=spec.softcap,
        HAS_BIAS=bias is not None,
        HAS_TEMPERATURE=temperature is not None,
        HAS_ENTROPY=upstream.grad_entropy is not None,
        **_BLOCKS,
    )
    return grad


_BLOCKS = {
    "BLOCK_M": BLOCK_ROWS,
    "BLOCK_N": BLOCK_COLUMNS,
    "BLOCK_K": BLOCK_K,
    "GROUP": GROUP,
    "num_stages": STAGES,
    "num_warps": WARPS,
}


def _grid(num_rows: int, num_columns: int, device: torch.device) -> tuple[int]:
    """One program an SM, or one a block where there are fewer."""
    blocks = triton.cdiv(num_rows, BLOCK_ROWS) * triton.cdiv(num_columns, BLOCK_COLUMNS)
    return (min(blocks, _multiprocessors(device) or 1),)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU that these kernels are for; 0 of any other device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor(matrix: Tensor, block: int) -> TensorDescriptor:
    """The copy engine wants rows that start at multiples of 16 bytes."""
    if matrix.stride(1) != 1 or matrix.stride(0) * matrix.itemsize % 16 or matrix.data_ptr() % 16:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(matrix, [block, BLOCK_K])
