"""A product folded into the statistics of its rows in one kernel; see ``hopper_tile.py`` for the idea.

All exponentials of a row must have one reference, but the row's maximum is not known beforehand. So
each block of columns takes the same guess, the logit of the row's target (``hopper_target.py``), unless
its own maximum is far from it (statistics.headroom), and writes down its sums and their reference. They
depend on the row and the block alone: not on how the vocabulary is cut into tiles, not on whether a
gradient is wanted. Two kernels turn them into the statistics of a row:

- :func:`_merge_kernel` adds up the blocks of a row that has seen the vocabulary;
- :func:`_correct_kernel`, where a gradient is wanted, settles on one reference after each tile, and
  rescales the exponentials of the rare block that has another one.
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
    ceil_div,
    power_of_2,
)
from memhead.statistics import FoldSpec, Stat, Tile, headroom

LANES = 256


@triton.jit(do_not_specialize=["num_rows", "num_columns", "stats_stride", "start", "first_block"])
def _fold_kernel(
    x_desc,  # (R, H)
    w_desc,  # (C, H)
    exps_ptr,  # (R, >= C), whole blocks, row stride exps_stride
    partial_ptr,  # (planes, R, all blocks): the statistics of each block of columns
    stats_ptr,  # (len(Stat), R), stride stats_stride between statistics
    targets_ptr,
    bias_ptr,
    temperature_ptr,
    start,
    first_block,
    all_blocks,
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
        partial = partial_ptr + row.to(tl.int64) * all_blocks + (first_block + block_column)
        partial_stride = num_rows * all_blocks
        target = tl.load(targets_ptr + row, mask=real, other=-1)
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
        # Not the logit of a forbidden token, nor of a row with infinities or NaN.
        reference = tl.where((guess > UNSET) & (guess < -UNSET), guess - shift, 0.0)
        wanted = maximum - shift
        far = (wanted > reference + lazy) | ((wanted < reference - depth) & (maximum > UNSET))
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
            tl.store(to, exps.to(exps_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit
def _counts(sums):
    """Whether a block has any logit that is not forbidden, or has NaN."""
    return (sums > 0) | (sums != sums)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "first_block", "stats_stride", "acc_stride"])
def _correct_kernel(
    partial_ptr,  # (planes, R, all blocks)
    stats_ptr,  # (len(Stat), R), REFERENCE updated
    exps_ptr,  # (R, >= C), whole blocks
    acc_ptr,  # (R, H)
    first_block,
    all_blocks,
    num_rows,
    num_columns,
    hidden_size,
    stats_stride,
    exps_stride,
    acc_stride,
    HAS_ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,  # at least the tile's
):
    """Settle on one reference for the rows of a tile and of those before it; the references rarely differ."""
    row = tl.program_id(0).to(tl.int64)
    num_blocks = tl.cdiv(num_columns, BLOCK_N)
    block = tl.arange(0, BLOCKS)
    mask = block < num_blocks
    partial = partial_ptr + row * all_blocks + first_block + block
    stride = num_rows * all_blocks
    sums = tl.load(partial + OTHERS * stride, mask=mask, other=0.0)
    references = tl.load(partial + REFERENCE * stride, mask=mask, other=0.0)
    to = stats_ptr + REFERENCE * stats_stride + row
    old = tl.load(to)
    reference = tl.maximum(tl.max(tl.where(_counts(sums), references, LOWEST), 0), old)
    tl.store(to, reference)
    factor = tl.exp(tl.where(_counts(sums), references - reference, 0.0))
    if tl.sum((factor == 1.0).to(tl.int32), 0) < BLOCKS:  # NaN is no factor of 1 either
        for i in range(num_blocks):
            column = i * BLOCK_N + tl.arange(0, BLOCK_N)
            at = exps_ptr + row * exps_stride + column
            exps = tl.load(at).to(tl.float32)
            exps *= tl.sum(tl.where(block == i, factor, 0.0), 0)
            tl.store(at, exps.to(exps_ptr.dtype.element_ty))
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
    partial_ptr,  # (planes, R, all blocks)
    stats_ptr,  # (len(Stat), R), updated
    all_blocks,
    num_rows,
    stats_stride,
    WANT_ENTROPY: tl.constexpr,
    WANT_SQUARES: tl.constexpr,
    WANT_TOTAL: tl.constexpr,
    WANT_TOP1: tl.constexpr,
    LANES: tl.constexpr,
):
    """The statistics of a row from those of all its blocks, LANES of them at a time."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    stats = stats_ptr + row
    partial = partial_ptr + row * all_blocks + lane
    stride = num_rows * all_blocks
    highest = tl.full((LANES,), LOWEST, tl.float32)
    for first in range(0, all_blocks, LANES):
        mask = first + lane < all_blocks
        sums = tl.load(partial + OTHERS * stride + first, mask=mask, other=0.0)
        references = tl.load(partial + REFERENCE * stride + first, mask=mask, other=0.0)
        highest = tl.maximum(highest, tl.where(_counts(sums), references, LOWEST))
    reference = tl.maximum(tl.max(highest, 0), UNSET)
    tl.store(stats + REFERENCE * stats_stride, reference)

    others = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    squares = tl.zeros((LANES,), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    before = tl.full((LANES,), LOWEST, tl.float32)
    after = tl.full((LANES,), LOWEST, tl.float32)
    for first in range(0, all_blocks, LANES):
        mask = first + lane < all_blocks
        at = partial + first
        sums = tl.load(at + OTHERS * stride, mask=mask, other=0.0)
        references = tl.load(at + REFERENCE * stride, mask=mask, other=0.0)
        distance = tl.where(_counts(sums), references - reference, 0.0)
        factor = tl.exp(distance)
        others += sums * factor
        if WANT_ENTROPY:
            own = tl.load(at + WEIGHTED * stride, mask=mask, other=0.0)
            weighted += factor * (own + distance * sums)
        if WANT_SQUARES:
            squares += tl.load(at + SQUARES * stride, mask=mask, other=0.0) * factor * factor
        if WANT_TOTAL:
            total += tl.load(at + TOTAL * stride, mask=mask, other=0.0)
        if WANT_TOP1:
            before = tl.maximum(before, tl.load(at + BEFORE * stride, mask=mask, other=LOWEST))
            after = tl.maximum(after, tl.load(at + AFTER * stride, mask=mask, other=LOWEST))
    tl.store(stats + OTHERS * stats_stride, tl.sum(others, 0))
    if WANT_ENTROPY:
        tl.store(stats + WEIGHTED * stats_stride, tl.sum(weighted, 0))
    if WANT_SQUARES:
        tl.store(stats + SQUARES * stats_stride, tl.sum(squares, 0))
    if WANT_TOTAL:
        tl.store(stats + TOTAL * stats_stride, tl.sum(total, 0))
    if WANT_TOP1:
        tl.store(stats + BEFORE * stats_stride, tl.max(before, 0))
        tl.store(stats + AFTER * stats_stride, tl.max(after, 0))


def new_partial(num_rows: int, vocab_size: int, spec: FoldSpec, like: Tensor) -> Tensor:
    """Memory for the statistics of all blocks of columns, (planes, R, blocks); no more planes than are wanted."""
    last = Stat.OTHERS
    if spec.entropy:
        last = Stat.WEIGHTED
    if spec.squares or spec.total or spec.top1:
        last = Stat.AFTER
    return like.new_empty(last + 1, num_rows, ceil_div(vocab_size, hopper_tile.BLOCK_COLUMNS))


def fold_product(
    x: Tensor,  # (R, H)
    w: Tensor,  # (C, H)
    buffer: Tensor,  # of whole blocks of the operand dtype, if a direction is wanted
    partial: Tensor,  # (planes, R, blocks) of new_partial, updated
    stats: Tensor,  # (len(Stat), R), REFERENCE updated if a direction is wanted
    tile: Tile,  # starting at a multiple of a block's columns
    acc: Tensor | None,  # (R, H) sums so far, rescaled where the reference moves
    operand: torch.dtype,
    direction: bool,
) -> Tensor:
    """``fold_tile(x @ w.T, ...)`` of the other backends, without ``x @ w.T``; :func:`merge` must follow the last."""
    (num_rows, hidden_size), num_columns = x.shape, w.shape[0]
    targets, start, bias, temperature, spec = tile
    exps = hopper_tile.whole_blocks(buffer, num_rows, num_columns) if direction else buffer.view(1, -1)
    first_block, all_blocks = start // hopper_tile.BLOCK_COLUMNS, partial.shape[2]
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
        first_block,
        all_blocks,
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
    if direction:
        _correct_kernel[(num_rows,)](
            partial,
            stats,
            exps,
            acc,
            first_block,
            all_blocks,
            num_rows,
            num_columns,
            hidden_size,
            stats.stride(0),
            exps.stride(0),
            0 if acc is None else acc.stride(0),
            HAS_ACC=acc is not None,
            BLOCK_N=hopper_tile.BLOCK_COLUMNS,
            BLOCKS=power_of_2(ceil_div(num_columns, hopper_tile.BLOCK_COLUMNS)),
            num_warps=1,
        )
    return exps[:, :num_columns]


def merge(partial: Tensor, stats: Tensor, spec: FoldSpec) -> None:
    """Write the rows' statistics (len(Stat), R) from those of their blocks (planes, R, blocks)."""
    _, num_rows, all_blocks = partial.shape
    _merge_kernel[(num_rows,)](
        partial,
        stats,
        all_blocks,
        num_rows,
        stats.stride(0),
        WANT_ENTROPY=spec.entropy,
        WANT_SQUARES=spec.squares,
        WANT_TOTAL=spec.total,
        WANT_TOP1=spec.top1,
        LANES=LANES,
        num_warps=1,
    )
