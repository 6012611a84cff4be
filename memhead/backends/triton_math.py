"""What the Triton kernels share: the layout of the statistics, and the arithmetic of a logit."""

from __future__ import annotations

import triton
import triton.language as tl

from memhead.statistics import LOWEST as _LOWEST
from memhead.statistics import UNSET as _UNSET
from memhead.statistics import Stat

LOWEST = tl.constexpr(_LOWEST)
UNSET = tl.constexpr(_UNSET)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
REFERENCE = tl.constexpr(int(Stat.REFERENCE))
OTHERS = tl.constexpr(int(Stat.OTHERS))
TARGET = tl.constexpr(int(Stat.TARGET))
SLOPE = tl.constexpr(int(Stat.SLOPE))
WEIGHTED = tl.constexpr(int(Stat.WEIGHTED))
SQUARES = tl.constexpr(int(Stat.SQUARES))
TOTAL = tl.constexpr(int(Stat.TOTAL))
BEFORE = tl.constexpr(int(Stat.BEFORE))
AFTER = tl.constexpr(int(Stat.AFTER))


# Triton's own versions of these two wrap constants for the compiler, which slows down every launch.
def ceil_div(total: int, size: int) -> int:
    """How many blocks of ``size`` hold ``total``; on the host."""
    return -(-total // size)


def power_of_2(least: int) -> int:
    """The smallest power of 2 that is at least ``least``; on the host."""
    return 1 << max(0, least - 1).bit_length()


@triton.jit
def to_logits(raw, bias, scale, inverse_temperature, softcap: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Logits and the softcap's slope (1 without softcap) of raw products; see torch.to_logits."""
    x = raw
    if HAS_BIAS:
        x += tl.maximum(bias, LOWEST)
    if softcap == 0.0:
        return x * (scale * inverse_temperature), tl.full(x.shape, 1.0, tl.float32)
    x *= scale / softcap
    decay = tl.exp(-2 * tl.abs(x))
    slope = 4 * decay / ((1 + decay) * (1 + decay))
    x = tl.where(x < 0, -softcap, softcap) * ((1 - decay) / (1 + decay))
    return x * inverse_temperature, slope


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0, by its series where the difference would cancel."""
    series = -x * (1 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * (0.008333334 + x * 0.001388889)))))
    return tl.where(x > -0.25, series, 1 - tl.exp(x))
