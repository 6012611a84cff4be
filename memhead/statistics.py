"""What is remembered of a row of logits once its tiles are gone, and what follows from it.

Throughout memhead, for a row with target t:

    z_v = softcap(logit_scale * (h . W_v + b_v)) / T        the logits
    others                                                  the vocabulary without t
    q_v = exp(z_v) / sum_{u != t} exp(z_u)                  the distribution over the others

The target is kept apart from the others, because everything that matters is then a sum of terms
of one sign: with ``gap = logsumexp(others) - z_t``,

    log p_t     = -softplus(gap)
    1 - p_t     = sigmoid(gap)
    d log p_t   = (1 - p_t) (d z_t - sum_{v != t} q_v d z_v)

keep their relative precision however sure the model is, where ``z_t - logsumexp(all)`` and
``onehot - p`` cancel to nothing.
"""

from __future__ import annotations

import functools
import math
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Stat(IntEnum):
    """Rows of the (len(Stat), N) float32 statistics that a sweep over the vocabulary leaves."""

    REFERENCE = 0  # r: the exponentials are taken against it; near the others' maximum, see headroom
    OTHERS = 1  # sum_{v != t} exp(z_v - r)
    WEIGHTED = 2  # sum_{v != t} exp(z_v - r) (z_v - r), for the entropy
    SQUARES = 3  # sum_{v != t} exp(z_v - r)^2
    TOTAL = 4  # sum_v z_v, the target included
    BEFORE = 5  # max z_v over v < t
    AFTER = 6  # max z_v over v > t
    TARGET = 7  # z_t
    SLOPE = 8  # softcap'(z_t), 1 without softcap


# Stands for minus infinity in the arithmetic, where the real one would give 0 * inf = NaN.
LOWEST = -1e30
# Above every forbidden logit (scaled and tempered as it may be), below every real one: the first
# real logit always replaces it.
UNSET = -1e25


class FoldSpec(NamedTuple):
    """What turns raw products into logits, and which optional statistics are wanted."""

    logit_scale: float
    softcap: float  # 0.0: none
    temperature: float  # used where there is no per-row temperature
    entropy: bool = False
    squares: bool = False
    total: bool = False
    top1: bool = False

    @property
    def numbers(self) -> list[float]:
        """Logit scale, softcap and temperature."""
        return list(self[:3])

    @property
    def wanted(self) -> list[bool]:
        """Which of :data:`memhead.arguments.OUTPUTS` are wanted."""
        return list(self[3:])

    def slope(self, temperature: Tensor | None) -> Tensor | float:
        """d z / d (h . W) without the softcap's part; ``temperature`` (N,) replaces the number."""
        return self.logit_scale / (self.temperature if temperature is None else temperature)


class Tile(NamedTuple):
    """What a tile (R, C) of raw products is beside its numbers: whose rows, which columns, what makes them logits."""

    targets: Tensor  # (R,) int64, numbers in the vocabulary
    start: int  # the number of the first of the C columns
    bias: Tensor | None  # (C,)
    temperature: Tensor | None  # (R,)
    spec: FoldSpec


class Rows(NamedTuple):
    """Per-row results (N,), float32 (float64 for float64 operands)."""

    logprobs: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor  # bool
    lse_others: Tensor


class Upstream(NamedTuple):
    """What the backward pass starts from, each (N,)."""

    grad_logprobs: Tensor
    grad_entropy: Tensor | None
    logprobs: Tensor
    entropy: Tensor | None
    lse_others: Tensor


def headroom(operand: torch.dtype) -> tuple[float, float, float]:
    """(shift, lazy, depth) of a reference: the maximum less ``shift``, renewed when exceeded by ``lazy``.

    A guessed reference is also renewed where all logits are lower than it by more than ``depth``.

    The exponentials enter the second product in the operands' dtype. float32 and bfloat16 have the
    range for a reference that is far from the maximum, so that it almost never has to move;
    float16 ends at 65504 and loses everything below 6e-8, so its exponentials are pushed up to
    e^7 = 1097 for the maximum and renewed at e^11 = 59874.
    """
    return (7.0, 4.0, 4.0) if operand == torch.float16 else (0.0, 20.0, 50.0)


def new_statistics(num_rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Statistics (len(Stat), num_rows) of rows before their first tile."""
    return _unseen(dtype, like.device).repeat(1, num_rows)


@functools.cache
def _unseen(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Statistics (len(Stat), 1): a GPU starts with one copy of it, not with a launch for each value."""
    values = dict.fromkeys(Stat, 0.0)
    values[Stat.REFERENCE], values[Stat.SLOPE] = UNSET, 1.0
    values[Stat.BEFORE] = values[Stat.AFTER] = values[Stat.TARGET] = LOWEST
    return torch.tensor(list(values.values()), dtype=dtype, device=device)[:, None]


def restore_infinity(values: Tensor) -> Tensor:
    """Turn forbidden logits, kept as :data:`LOWEST`, back into -inf."""
    return F.threshold(values, UNSET, float("-inf"))


def finish(stats: Tensor, vocab_size: int, spec: FoldSpec) -> Rows:
    """Per-row results from complete statistics (len(Stat), N); unwanted ones have no elements."""
    others = stats[Stat.OTHERS]
    lse_others = stats[Stat.REFERENCE] + others.log()
    lead = restore_infinity(stats[Stat.TARGET]) - lse_others  # -gap
    # softplus would do, but on a CPU its last bits depend on where in the batch a row stands.
    logprobs = F.logsigmoid(lead)
    entropy = _entropy(stats, lead, logprobs) if spec.entropy else stats.new_empty(0)
    log_sum_sq_probs = stats.new_empty(0)
    if spec.squares:
        log_q_sq = torch.where(others > 0, stats[Stat.SQUARES].log() - 2 * others.log(), LOWEST)
        log_sum_sq_probs = torch.logaddexp(2 * logprobs, 2 * F.logsigmoid(-lead) + log_q_sq)
    mean_logits = restore_infinity(stats[Stat.TOTAL] / vocab_size) if spec.total else stats.new_empty(0)
    is_top1 = stats.new_empty(0, dtype=torch.bool)
    if spec.top1:  # the first of equals is the most likely one, as argmax has it
        is_top1 = (stats[Stat.TARGET] > stats[Stat.BEFORE]) & (stats[Stat.TARGET] >= stats[Stat.AFTER])
    # Where no other is possible, a finite stand-in keeps exp(z - lse_others) at zero.
    lse_others = torch.nan_to_num(lse_others, nan=math.nan, posinf=math.inf, neginf=0.0)
    return Rows(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1, lse_others)


def _entropy(stats: Tensor, lead: Tensor, logprobs: Tensor) -> Tensor:
    """-sum_v p_v log p_v = -p_t log p_t + (1 - p_t) (log(others) + softplus(lead) - E_q[z - r])."""
    others = stats[Stat.OTHERS]
    some = others > 0  # a vocabulary of one, or all the others forbidden: nothing is uncertain
    safe = torch.where(some, others, 1.0)
    rest = safe.log() - F.logsigmoid(-lead) - stats[Stat.WEIGHTED] / safe
    return torch.special.entr(logprobs.exp()) + torch.where(some, torch.sigmoid(-lead) * rest, 0.0)


def one_minus_p(logprobs: Tensor) -> Tensor:
    """1 - p_t from log p_t, exact for p_t near 1."""
    return -torch.expm1(logprobs)
