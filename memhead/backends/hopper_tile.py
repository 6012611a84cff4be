"""What the kernels of ``hopper_fold.py`` and ``hopper_gradient.py`` share: a product, and what it means.

For GPUs with a tensor memory accelerator. On Hopper (and Blackwell's data-centre chips) Triton's own
product is about as fast as the vendor's library, so the logits need not exist in memory at all, not
even as a tile: the row-wise work is done on the product's registers, and what is written is what the
next product reads, in the operands' dtype.

The mainloop is the plain persistent one: one program per SM, blocks in groups that share their operands
in L2. While a program works on a block's registers its matrix unit idles, so each instruction for
each logit counts (benchmarks/results/gpu_log.md). Therefore

- what is the same for a whole row (scale, temperature, the logarithm's base) is one factor, and
  what it multiplies is called *capped* below: the raw product, or its tanh where there is a softcap;
- blocks are stored whole, the columns after the last one too: a mask that may end anywhere would make
  Triton store one half-precision number at a time;
- what concerns few blocks (the end of the vocabulary) stands in a branch;
- what must be loaded is asked for before the product, and touched only after it, which hides the wait.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memhead.backends.triton_math import LOG2_E, LOWEST, ceil_div
from memhead.products import HALF

# The block of one program: 128 x 256 logits in the registers of eight warps, three stages of
# operands in shared memory. benchmarks/results/gpu_log.md has the alternatives and their times.
BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_K = 128, 256, 64
BLOCKS = {
    "BLOCK_M": BLOCK_ROWS,
    "BLOCK_N": BLOCK_COLUMNS,
    "BLOCK_K": BLOCK_K,
    "GROUP": 16,
    "num_stages": 3,
    "num_warps": 8,
}
# The references of a row's blocks in a tile are compared in the registers of one warp.
MAX_COLUMNS = 1 << 17


def available(operand: torch.dtype, hidden_size: int, device: torch.device) -> bool:
    """Whether the kernels run: half-precision rows of a multiple of 16 bytes, on such a GPU."""
    return operand in HALF and hidden_size % 8 == 0 and multiprocessors(device) > 0


def tile_columns(wanted: int, vocab_size: int, device: torch.device) -> int:
    """At most ``wanted`` columns: all, or one block of them for each SM or a multiple of that, or some whole blocks.

    A launch then has as many blocks as fill all SMs to the end, whatever its rows.
    """
    wanted = min(wanted, MAX_COLUMNS)
    if wanted >= vocab_size:
        return vocab_size
    wave = max(1, multiprocessors(device)) * BLOCK_COLUMNS
    return wanted // wave * wave or max(1, wanted // BLOCK_COLUMNS) * BLOCK_COLUMNS


def padded(columns: int) -> int:
    """``columns`` rounded up to whole blocks."""
    return ceil_div(columns, BLOCK_COLUMNS) * BLOCK_COLUMNS


def whole_blocks(buffer: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """The beginning of the buffer as (R, padded C)."""
    columns = padded(num_columns)
    return buffer[: num_rows * columns].view(num_rows, columns)


@triton.jit
def place(block, num_row_blocks, num_column_blocks, GROUP: tl.constexpr):
    """Row block and column block of the ``block``-th one, in groups of GROUP rows for reuse in L2."""
    in_group = GROUP * num_column_blocks
    first = block // in_group * GROUP
    size = min(num_row_blocks - first, GROUP)
    return first + block % in_group % size, block % in_group // size


@triton.jit
def capped_product(
    x_desc,  # (R, H)
    w_desc,  # (C, H)
    bias_ptr,  # (C,)
    block_row,
    block_column,
    num_columns,
    hidden_size,
    logit_scale,
    softcap: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(M, N) float32: ``x @ w.T``, plus the bias, with the sign of the scale; its tanh under a softcap."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(tl.cdiv(hidden_size, BLOCK_K)):
        x = x_desc.load([block_row * BLOCK_M, k * BLOCK_K])
        w = w_desc.load([block_column * BLOCK_N, k * BLOCK_K])
        acc = tl.dot(x, w.T, acc)
    if HAS_BIAS:
        column = block_column * BLOCK_N + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + column, mask=column < num_columns, other=0.0).to(tl.float32)
        acc += tl.maximum(bias, LOWEST)[None, :]
    if softcap != 0.0:
        # tanh, exact to a part in 10^7 of the cap: 1 - 2 / (1 + exp(2 x))
        acc = 1 - tl.fdiv(2.0, 1 + tl.exp2(acc * (2 * LOG2_E / softcap * logit_scale)))
    elif logit_scale < 0:
        acc = -acc
    return acc


@triton.jit
def load_temperature(temperature_ptr, row, real, HAS_TEMPERATURE: tl.constexpr, BLOCK_M: tl.constexpr):
    """(M,): the temperatures of rows that have their own, else ones."""
    if HAS_TEMPERATURE:
        return tl.load(temperature_ptr + row, mask=real, other=1.0)
    return tl.full((BLOCK_M,), 1.0, tl.float32)


@triton.jit
def row_factor(temperature, logit_scale, inverse_temperature, softcap: tl.constexpr):
    """(M,) positive: what a capped value is multiplied by to give its logit in units of log 2."""
    # Not quite 0 for a scale of 0: the stand-in for minus infinity is divided by it.
    factor = tl.maximum(tl.abs(logit_scale), 1e-8) * LOG2_E
    if softcap != 0.0:
        factor = softcap * LOG2_E
    return factor * inverse_temperature / temperature


@triton.jit
def cap_slope(capped):
    """The softcap's slope 1 - tanh^2; 0 where the value stands for minus infinity."""
    return tl.maximum((1 - capped) * (1 + capped), 0.0)


def grid(num_rows: int, num_columns: int, device: torch.device) -> tuple[int]:
    """One program per SM, or one per block where there are fewer blocks."""
    blocks = ceil_div(num_rows, BLOCK_ROWS) * ceil_div(num_columns, BLOCK_COLUMNS)
    return (min(blocks, multiprocessors(device) or 1),)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of SMs of a GPU that these kernels are for; 0 for any other device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def descriptor(matrix: Tensor, block: int) -> TensorDescriptor:
    """The copy engine wants rows that start at multiples of 16 bytes."""
    if matrix.stride(1) != 1 or matrix.stride(0) * matrix.itemsize % 16 or matrix.data_ptr() % 16:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(matrix, [block, BLOCK_K])
