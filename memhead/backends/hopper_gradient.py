"""The gradient of the logits in the kernel that recomputes them; see ``hopper_tile.py`` for the idea."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memhead.backends import hopper_tile
from memhead.backends.hopper_tile import cap_slope, capped_product, load_temperature, place, row_factor
from memhead.backends.triton_math import LN_2, LOG2_E, LOWEST, one_minus_exp
from memhead.statistics import Tile, Upstream


@triton.jit(do_not_specialize=["num_rows", "num_columns", "start"])
def _gradient_kernel(
    x_desc,  # (R, H)
    w_desc,  # (C, H)
    grad_ptr,  # (R, >= C), whole blocks
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
        block_row, block_column = place(block, num_row_blocks, num_column_blocks, GROUP)
        row = block_row * BLOCK_M + tl.arange(0, BLOCK_M)
        real = row < num_rows
        lane = tl.arange(0, BLOCK_N)
        target = tl.load(targets_ptr + row, mask=real, other=-1)
        logp = tl.load(logprobs_ptr + row, mask=real, other=-1.0)
        lse_others = tl.load(lse_others_ptr + row, mask=real, other=0.0)
        grad_logprobs = tl.load(grad_logprobs_ptr + row, mask=real, other=0.0)
        if HAS_ENTROPY:
            entropy = tl.load(entropy_ptr + row, mask=real, other=0.0)
            grad_entropy = tl.load(grad_entropy_ptr + row, mask=real, other=0.0)
        temperature = load_temperature(temperature_ptr, row, real, HAS_TEMPERATURE, BLOCK_M)
        capped = capped_product(
            x_desc, w_desc, bias_ptr, block_row, block_column, num_columns, hidden_size,
            logit_scale, softcap, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        factor = row_factor(temperature, logit_scale, inverse_temperature, softcap)
        target = (target - start).to(tl.int32) - block_column * BLOCK_N
        uncertain = one_minus_exp(logp)
        coefficient = grad_logprobs * uncertain
        is_target = lane[None, :] == target[:, None]
        q = tl.exp2(capped * factor[:, None] - (lse_others * LOG2_E)[:, None])
        grad = tl.where(is_target, -1.0, q) * -coefficient[:, None]
        if HAS_ENTROPY:
            lse = tl.where(uncertain > 0, lse_others - tl.log(uncertain), -LOWEST)
            log_p = capped * (factor * LN_2)[:, None] - lse[:, None]
            log_p = tl.maximum(tl.where(is_target, logp[:, None], log_p), LOWEST)
            grad -= grad_entropy[:, None] * tl.exp2(log_p * LOG2_E) * (log_p + entropy[:, None])
        if softcap != 0.0:
            grad *= cap_slope(capped)
        to = grad_ptr + row[:, None].to(tl.int64) * grad_stride + (block_column * BLOCK_N + lane)[None, :]
        tl.store(to, grad.to(grad_ptr.dtype.element_ty), mask=real[:, None])


def gradient_product(
    x: Tensor,  # (R, H)
    w: Tensor,  # (C, H)
    buffer: Tensor,  # of whole blocks of the operand dtype
    tile: Tile,
    upstream: Upstream,  # each (R,); the gradients times logit_scale / T
    operand: torch.dtype,
) -> Tensor:
    """``logit_gradient(x @ w.T, ...)`` of the other backends, without ``x @ w.T``."""
    (num_rows, hidden_size), num_columns = x.shape, w.shape[0]
    targets, start, bias, temperature, spec = tile
    grad = hopper_tile.whole_blocks(buffer, num_rows, num_columns)
    _gradient_kernel[hopper_tile.grid(num_rows, num_columns, x.device)](
        hopper_tile.descriptor(x, hopper_tile.BLOCK_ROWS),
        hopper_tile.descriptor(w, hopper_tile.BLOCK_COLUMNS),
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
        **hopper_tile.BLOCKS,
    )
    return grad[:, :num_columns]
