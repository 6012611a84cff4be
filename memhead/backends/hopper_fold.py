"""A product folded into the statistics of its rows in one kernel; see ``hopper_tile.py`` for the idea.

All exponentials of a row in one launch must have one reference, but nobody knows the row's maximum
beforehand. So each block of columns takes the reference that the row had before the launch, at
first its target's logit (``hopper_target.py``), unless its own maximum is far from it (statistics.headroom);
the blocks' references are written down, and :func:`_merge_kernel` settles on one and corrects the
rare row where they differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memhead.backends import hopper_tile
from memhead.backends.hopper_tile import cap_slope, capped_product, load_temperature, place, row_factor
from memhead.backends.triton_math import (
    AFTER,
    BEFORE,
    LN_2,
    LOG2_E,
    LOWEST,
    OTHERS,
    REFERENCE,
    SQUARES,
    TARGET,
    TOTAL,
    UNSET,
    WEIGHTED,
)
from memhead.statistics import FoldSpec, Stat, headroom


@triton.jit(do_not_specialize=["num_rows", "stats_stride", "start"])
def _fold_kernel(
    x_desc,  # (R, H)
    w_desc,  # (C, H)
    exps_ptr,  # (R, C), row stride exps_stride
    partial_ptr,  # (len(Stat), R, column blocks): the statistics of each block of columns
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
    depth,
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
        block_row, block_column = place(block, num_row_blocks, num_column_blocks, GROUP)
        row = block_row * BLOCK_M + tl.arange(0, BLOCK_M)
        real = row < num_rows
        lane = tl.arange(0, BLOCK_N)
        end = num_columns - block_column * BLOCK_N  # lanes from here on are no columns
        stats = stats_ptr + row
        partial = partial_ptr + row.to(tl.int64) * num_column_blocks + block_column
        partial_stride = num_rows * num_column_blocks
        target = tl.load(targets_ptr + row, mask=real, other=-1)
        reference = tl.load(stats + REFERENCE * stats_stride, mask=real, other=0.0)
        guess = tl.load(stats + TARGET * stats_stride, mask=real, other=0.0)
        temperature = load_temperature(temperature_ptr, row, real, HAS_TEMPERATURE, BLOCK_M)
        capped = capped_product(
            x_desc, w_desc, bias_ptr, block_row, block_column, num_columns, hidden_size,
            logit_scale, softcap, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        factor = row_factor(temperature, logit_scale, inverse_temperature, softcap)
        target = (target - start).to(tl.int32) - block_column * BLOCK_N

        if WANT_TOTAL:
            total = tl.sum(tl.where((lane < end)[None, :], capped, 0.0), 1) * (factor * LN_2)
            tl.store(partial + TOTAL * partial_stride, total, mask=real)
        if WANT_TOP1:
            column, inside = lane[None, :], (lane < end)[None, :]
            lowest = (1 / factor * LOWEST)[:, None]
            before = tl.max(tl.where(inside & (column < target[:, None]), capped, lowest), 1)
            after = tl.max(tl.where(inside & (column > target[:, None]), capped, lowest), 1)
            tl.store(partial + BEFORE * partial_stride, before * (factor * LN_2), mask=real)
            tl.store(partial + AFTER * partial_stride, after * (factor * LN_2), mask=real)
        # In all blocks: asking whether one holds a target takes longer, for all warps must answer.
        capped = tl.where(lane[None, :] == target[:, None], (1 / factor * LOWEST)[:, None], capped)
        if end < BLOCK_N:
            capped = tl.where((lane < end)[None, :], capped, (1 / factor * LOWEST)[:, None])

        maximum = tl.max(capped, 1) * (factor * LN_2)
        unset = reference <= UNSET
        # Not the logit of a forbidden token, nor of a row with infinities or NaN.
        guess = tl.where((guess > UNSET) & (guess < -UNSET), guess - shift, 0.0)
        reference = tl.where(unset, guess, reference)
        wanted = maximum - shift
        far = (wanted > reference + lazy) | (unset & (wanted < reference - depth) & (maximum > UNSET))
        reference = tl.where(far, wanted, reference)
        tl.store(partial + REFERENCE * partial_stride, reference, mask=real)
        distance = capped * factor[:, None] - (reference * LOG2_E)[:, None]  # in units of log 2
        exps = tl.exp2(distance)
        if WANT_ENTROPY:
            weighted = tl.sum(exps * distance, 1) * LN_2
            tl.store(partial + WEIGHTED * partial_stride, weighted, mask=real)
        tl.store(partial + OTHERS * partial_stride, tl.sum(exps, 1), mask=real)
        if WANT_SQUARES:
            tl.store(partial + SQUARES * partial_stride, tl.sum(exps * exps, 1), mask=real)
        if WANT_EXPS:
            if softcap != 0.0:
                exps *= cap_slope(capped)
            to = exps_ptr + row[:, None].to(tl.int64) * exps_stride + (block_column * BLOCK_N + lane)[None, :]
            tl.store(to, exps.to(exps_ptr.dtype.element_ty), mask=real[:, None] & (lane < end)[None, :])


@triton.jit
def _settle(partial, stats, partial_stride, stats_stride, mask):
    """A row's reference so far and from now on, the sums of its blocks (BLOCKS,) and how far theirs are below it."""
    sums = tl.load(partial + OTHERS * partial_stride, mask=mask, other=0.0)
    references = tl.load(partial + REFERENCE * partial_stride, mask=mask, other=0.0)
    counts = (sums > 0) | (sums != sums)
    old = tl.load(stats + REFERENCE * stats_stride)
    reference = tl.maximum(tl.max(tl.where(counts, references, LOWEST), 0), old)
    return old, reference, sums, tl.where(counts, references - reference, 0.0)


@triton.jit(do_not_specialize=["num_rows", "stats_stride", "acc_stride"])
def _correct_kernel(
    partial_ptr,  # (len(Stat), R, column blocks)
    stats_ptr,  # (len(Stat), R)
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
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,  # at least num_column_blocks
):
    """Bring the rare row whose blocks have different references to the one that :func:`_merge_kernel` takes."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    old, reference, _, distance = _settle(
        partial_ptr + row * num_column_blocks + block,
        stats_ptr + row,
        num_rows * num_column_blocks,
        stats_stride,
        block < num_column_blocks,
    )
    factor = tl.exp(distance)
    if tl.sum((factor == 1.0).to(tl.int32), 0) < BLOCKS:  # NaN is no factor of 1 either
        for i in range(num_column_blocks):
            column = i * BLOCK_N + tl.arange(0, BLOCK_N)
            to = exps_ptr + row * exps_stride + column
            exps = tl.load(to, mask=column < num_columns, other=0.0).to(tl.float32)
            exps *= tl.sum(tl.where(block == i, factor, 0.0), 0)
            tl.store(to, exps.to(exps_ptr.dtype.element_ty), mask=column < num_columns)
    # Two ifs: one is decided when the kernel is compiled, the other for each row.
    if HAS_ACC:  # noqa: SIM102
        if reference != old:
            moved = tl.exp(old - reference)
            for first in range(0, hidden_size, BLOCK_N):
                feature = first + tl.arange(0, BLOCK_N)
                acc = tl.load(acc_ptr + row * acc_stride + feature, mask=feature < hidden_size, other=0.0)
                tl.store(acc_ptr + row * acc_stride + feature, acc * moved, mask=feature < hidden_size)


# A row must give the same bits whatever rows are beside it, and whether a gradient is wanted or not:
# nothing that depends on that may choose another variant of this kernel, with its sums in another order.
@triton.jit(
    do_not_specialize=["num_rows", "stats_stride"],
    do_not_specialize_on_alignment=["partial_ptr", "stats_ptr"],
)
def _merge_kernel(
    partial_ptr,  # (len(Stat), R, column blocks)
    stats_ptr,  # (len(Stat), R), updated
    num_rows,
    num_column_blocks,
    stats_stride,
    WANT_ENTROPY: tl.constexpr,
    WANT_SQUARES: tl.constexpr,
    WANT_TOTAL: tl.constexpr,
    WANT_TOP1: tl.constexpr,
    BLOCKS: tl.constexpr,  # at least num_column_blocks
):
    """Settle on one reference for a row, and add the statistics of its blocks to it."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    mask = block < num_column_blocks
    stats = stats_ptr + row
    partial = partial_ptr + row * num_column_blocks + block
    partial_stride = num_rows * num_column_blocks
    old, reference, sums, distance = _settle(partial, stats, partial_stride, stats_stride, mask)
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
    column_blocks = triton.cdiv(num_columns, hopper_tile.BLOCK_COLUMNS)
    partial = stats.new_empty(len(Stat), num_rows, column_blocks)
    shift, lazy, depth = headroom(operand)
    _fold_kernel[hopper_tile.grid(num_rows, num_columns, x.device)](
        hopper_tile.descriptor(x, hopper_tile.BLOCK_ROWS),
        hopper_tile.descriptor(w, hopper_tile.BLOCK_COLUMNS),
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
        depth,
        softcap=spec.softcap,
        HAS_BIAS=bias is not None,
        HAS_TEMPERATURE=temperature is not None,
        WANT_EXPS=direction,
        WANT_ENTROPY=spec.entropy,
        WANT_SQUARES=spec.squares,
        WANT_TOTAL=spec.total,
        WANT_TOP1=spec.top1,
        **hopper_tile.BLOCKS,
    )
    blocks = triton.next_power_of_2(column_blocks)
    if direction:
        _correct_kernel[(num_rows,)](
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
            BLOCK_N=hopper_tile.BLOCK_COLUMNS,
            BLOCKS=blocks,
            num_warps=1,
        )
    _merge_kernel[(num_rows,)](
        partial,
        stats,
        num_rows,
        column_blocks,
        stats.stride(0),
        WANT_ENTROPY=spec.entropy,
        WANT_SQUARES=spec.squares,
        WANT_TOTAL=spec.total,
        WANT_TOP1=spec.top1,
        BLOCKS=blocks,
        num_warps=1,
    )
    return exps
