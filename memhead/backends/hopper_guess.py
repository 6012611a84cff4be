"""A guess at a row's largest logit: its target's, which of a trained model is rarely far from it.

The fused kernel of ``hopper_fold.py`` must choose a reference for a row's exponentials before it has
seen the row. A good one spares the pass that brings a row's tiles to a common reference: a
twentieth of a frozen head's time where the logits are peaked. Of the result it changes only the rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memhead.backends.triton_math import GUESS, UNSET, to_logits
from memhead.statistics import FoldSpec, headroom
from memhead.weights import Weight

BLOCK = 512


@triton.jit(do_not_specialize=["stats_stride"], do_not_specialize_on_alignment=["stats_ptr"])
def _guess_kernel(
    x_ptr,  # (R, H), row stride x_stride
    target_rows_ptr,  # (R, H) W_t, contiguous
    stats_ptr,  # (len(Stat), R), stride stats_stride between statistics
    targets_ptr,
    bias_ptr,
    temperature_ptr,
    vocab_size,
    hidden_size,
    x_stride,
    stats_stride,
    logit_scale,
    inverse_temperature,
    shift,
    softcap: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, hidden_size, BLOCK):
        feature = first + tl.arange(0, BLOCK)
        inside = feature < hidden_size
        x = tl.load(x_ptr + row * x_stride + feature, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(target_rows_ptr + row * hidden_size + feature, mask=inside, other=0.0).to(tl.float32)
        total += x * w
    target = tl.load(targets_ptr + row)
    here = (target >= 0) & (target < vocab_size)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + target, mask=here, other=0.0).to(tl.float32)
    if HAS_TEMPERATURE:
        inverse_temperature = 1.0 / tl.load(temperature_ptr + row)
    z, _ = to_logits(tl.sum(total, 0), bias, logit_scale, inverse_temperature, softcap, HAS_BIAS)
    # Neither of a forbidden token nor of a row with infinities or NaN.
    good = here & (z > UNSET) & (z < -UNSET)
    tl.store(stats_ptr + GUESS * stats_stride + row, tl.where(good, z - shift, 0.0))


def guess_reference(
    x: Tensor,  # (R, H)
    weight: Weight,  # (V, H)
    stats: Tensor,  # (len(Stat), R), GUESS updated
    targets: Tensor,  # (R,); outside 0..V-1 where another process holds the target
    bias: Tensor | None,  # (V,)
    temperature: Tensor | None,  # (R,)
    spec: FoldSpec,
    operand: torch.dtype,
) -> None:
    """Put each row's target logit into ``stats[Stat.GUESS]``."""
    target_rows = weight.rows(targets, operand).contiguous()
    _guess_kernel[(len(x),)](
        x,
        target_rows,
        stats,
        targets,
        bias,
        temperature,
        weight.shape[0],
        x.shape[1],
        x.stride(0),
        stats.stride(0),
        spec.logit_scale,
        1 / spec.temperature,
        headroom(operand)[0],
        softcap=spec.softcap,
        HAS_BIAS=bias is not None,
        HAS_TEMPERATURE=temperature is not None,
        BLOCK=BLOCK,
        num_warps=4,
    )
