"""The targets' logits, before the first tile.

The fused kernel of ``hopper_fold.py`` then only needs to leave the target's column out. And it has a
reference for a row's exponentials before it has seen the row: in a trained model the target's logit
is rarely far from the largest, and where it is, the row is brought to another reference.

They are the diagonal of the product of a block of hidden states with the weight rows of their
targets, a thousandth of the whole product. A matrix unit's sums lack some of the last bits; taken by
the same unit in the same order, a target's logit lacks the same as its rivals', where an exact one
would be off from them (benchmarks/results/gpu_log.md has the errors).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memhead.backends.hopper_fold import new_partial
from memhead.backends.hopper_tile import BLOCK_K
from memhead.backends.triton_math import SLOPE, TARGET, ceil_div, to_logits
from memhead.statistics import Tile
from memhead.weights import Weight

BLOCK_ROWS = 64


@triton.jit(do_not_specialize=["num_rows", "stats_stride"])
def _target_kernel(
    x_ptr,  # (R, H), row stride x_stride
    target_rows_ptr,  # (R, H) W_t, row stride target_stride
    stats_ptr,  # (len(Stat), R), stride stats_stride between statistics
    targets_ptr,
    bias_ptr,
    temperature_ptr,
    vocab_size,
    num_rows,
    hidden_size,
    x_stride,
    target_stride,
    stats_stride,
    logit_scale,
    inverse_temperature,
    softcap: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    lane = tl.arange(0, BLOCK_M)
    row = (tl.program_id(0) * BLOCK_M + lane).to(tl.int64)
    real = row < num_rows
    product = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for first in range(0, hidden_size, BLOCK_K):
        feature = (first + tl.arange(0, BLOCK_K))[None, :]
        inside = real[:, None] & (feature < hidden_size)
        x = tl.load(x_ptr + row[:, None] * x_stride + feature, mask=inside, other=0.0)
        w = tl.load(target_rows_ptr + row[:, None] * target_stride + feature, mask=inside, other=0.0)
        product = tl.dot(x, w.T, product)
    raw = tl.sum(tl.where(lane[:, None] == lane[None, :], product, 0.0), 1)
    target = tl.load(targets_ptr + row, mask=real, other=-1)
    here = (target >= 0) & (target < vocab_size)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + target, mask=here, other=0.0).to(tl.float32)
    if HAS_TEMPERATURE:
        inverse_temperature = 1.0 / tl.load(temperature_ptr + row, mask=real, other=1.0)
    z, slope = to_logits(raw, bias, logit_scale, inverse_temperature, softcap, HAS_BIAS)
    tl.store(stats_ptr + TARGET * stats_stride + row, z, mask=here)
    if softcap != 0.0:
        tl.store(stats_ptr + SLOPE * stats_stride + row, slope, mask=here)


def start_rows(
    x: Tensor,  # (R, H)
    weight: Weight,  # (V, H)
    stats: Tensor,  # (len(Stat), R), TARGET and SLOPE updated
    tile: Tile,  # the whole vocabulary
    operand: torch.dtype,
) -> Tensor:
    """See :func:`memhead.backends.torch.start_rows`."""
    targets, _, bias, temperature, spec = tile
    target_rows = weight.rows(targets, operand)
    _target_kernel[(ceil_div(len(x), BLOCK_ROWS),)](
        x,
        target_rows,
        stats,
        targets,
        bias,
        temperature,
        weight.shape[0],
        len(x),
        x.shape[1],
        x.stride(0),
        target_rows.stride(0),
        stats.stride(0),
        spec.logit_scale,
        1 / spec.temperature,
        softcap=spec.softcap,
        HAS_BIAS=bias is not None,
        HAS_TEMPERATURE=temperature is not None,
        BLOCK_M=BLOCK_ROWS,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        num_stages=4,
    )
    return new_partial(len(x), weight.shape[0], spec, stats)
