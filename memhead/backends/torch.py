"""The row-wise work on a tile of logits, in plain torch: the reference for the Triton kernels.

Every function works in place on a tile that the product has just written, in as few passes as
torch allows: the tile is small enough to stay in cache, so a pass costs little.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memhead.products import brings_memory, result_dtype, tile_product
from memhead.statistics import LOWEST, FoldSpec, Stat, Tile, Upstream, headroom, one_minus_p
from memhead.weights import Weight


def fold_tile(
    logits: Tensor,  # (R, C) raw products, overwritten
    stats: Tensor,  # (len(Stat), R), updated
    tile: Tile,
    acc: Tensor | None,  # (R, H) sums so far, rescaled where the reference moves
    operand: torch.dtype,
    direction: bool,
) -> Tensor:
    """Fold a tile of the vocabulary into the statistics of its rows.

    Returns (R, C), if the ``direction`` is wanted, in the operand dtype: exp(z - reference) times
    the softcap's slope, zero in the target's column: the left factor of the direction's product.
    """
    spec = tile.spec
    z, slope = to_logits(logits, tile)
    hit, column = _target_column(tile, z.shape[1])
    at_target = z.gather(1, column)  # (R, 1)
    stats[Stat.TARGET] = torch.where(hit, at_target, stats[Stat.TARGET, :, None]).squeeze(1)
    if slope is not None:
        stats[Stat.SLOPE] = torch.where(hit, slope.gather(1, column), stats[Stat.SLOPE, :, None]).squeeze(1)
    if spec.total:
        stats[Stat.TOTAL] += z.sum(1)
    if spec.top1:
        _fold_maxima(z, stats, tile)
    z.scatter_(1, column, torch.where(hit, LOWEST, at_target))
    _move_reference(z.amax(1), stats, spec, acc, operand)

    z.sub_(stats[Stat.REFERENCE, :, None])
    exps = z.exp() if spec.entropy else z.exp_()
    stats[Stat.OTHERS] += exps.sum(1)
    if spec.entropy:
        stats[Stat.WEIGHTED] += torch.linalg.vecdot(exps, z)
    if spec.squares:
        stats[Stat.SQUARES] += torch.linalg.vecdot(exps, exps)
    if not direction:
        return exps
    return exps.to(operand) if slope is None else exps.mul_(slope).to(operand)


def start_rows(
    x: Tensor,  # (R, H)
    weight: Weight,  # (V, H)
    stats: Tensor,  # (len(Stat), R), TARGET and SLOPE updated where fold_product leaves them out
    tile: Tile,  # the whole vocabulary
    operand: torch.dtype,
) -> Tensor | None:
    """Prepare a block of rows before its first tile: memory for what :func:`end_rows` needs, here nothing."""
    return None


def fold_product(
    x: Tensor,  # (R, H)
    w: Tensor,  # (C, H)
    buffer: Tensor,  # (>= R * C,) of tile_dtype; empty where the product brings its memory
    partial: Tensor | None,  # what start_rows gave
    *fold: Any,
) -> Tensor:
    """:func:`fold_tile` of the raw products ``x @ w.T``; ``fold`` are its further arguments."""
    return fold_tile(raw_product(x, w, buffer), *fold)


def end_rows(partial: Tensor | None, stats: Tensor, spec: FoldSpec) -> None:
    """Complete the statistics (len(Stat), R) after the last tile, where :func:`fold_product` leaves that open."""


def gradient_product(x: Tensor, w: Tensor, buffer: Tensor, *rest: Any) -> Tensor:
    """:func:`logit_gradient` of the raw products ``x @ w.T``; ``rest`` are its further arguments."""
    return logit_gradient(raw_product(x, w, buffer), *rest)


def tile_dtype(operand: torch.dtype, hidden_size: int, device: torch.device) -> torch.dtype:
    """dtype of the buffer that holds a tile."""
    return result_dtype(operand)


def buffer_columns(
    rows: int, columns: int, operand: torch.dtype, hidden_size: int, device: torch.device
) -> int:
    """How many columns the buffer of a tile must have; 0 where the product brings its own memory."""
    return 0 if brings_memory(operand, device, rows * columns) else columns


def fuses(operand: torch.dtype, hidden_size: int, device: torch.device) -> bool:
    """Whether logits are never written, and a row's bits do not depend on how many columns a tile has."""
    return False


def tile_columns(
    wanted: int, vocab_size: int, operand: torch.dtype, hidden_size: int, device: torch.device
) -> int:
    """How many of the ``wanted`` columns a tile should have for the functions of this file: all of them."""
    return wanted


def raw_product(x: Tensor, w: Tensor, buffer: Tensor) -> Tensor:
    """``x @ w.T`` (R, C) in float32, in the buffer's memory if it has any."""
    return tile_product(x, w.t(), buffer)


def to_logits(raw: Tensor, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """Logits z and the softcap's slope (None without softcap), both (R, C), from raw products, which are overwritten.

    The slope is d softcap(x)/dx = 1 - tanh(x / cap)^2, as 4 u / (1 + u)^2 with u = exp(-2 |x / cap|),
    which does not cancel where the cap saturates. The scale and the temperature are constant along
    a row and multiplied in at the very end.
    """
    _, _, bias, temperature, spec = tile
    if bias is not None:
        raw.add_(bias.to(raw.dtype).clamp_min(LOWEST))
    slope = None
    if spec.softcap:
        x = raw.mul_(spec.logit_scale / spec.softcap)
        decay = x.abs().mul_(-2).exp_()
        slope = 4 * decay / (1 + decay).square_()
        x.tanh_().mul_(spec.softcap)
    elif spec.logit_scale != 1.0:
        raw.mul_(spec.logit_scale)
    if temperature is not None:
        raw.div_(temperature[:, None])
    elif spec.temperature != 1.0:
        raw.div_(spec.temperature)
    return raw, slope


def _target_column(tile: Tile, columns: int) -> tuple[Tensor, Tensor]:
    """Whether each row's target lies in this tile, and where (clamped into it), both (R, 1)."""
    column = (tile.targets - tile.start)[:, None]
    return (column >= 0) & (column < columns), column.clamp(0, columns - 1)


def _fold_maxima(z: Tensor, stats: Tensor, tile: Tile) -> None:
    vocab = torch.arange(tile.start, tile.start + z.shape[1], device=z.device)
    targets = tile.targets[:, None]
    before = torch.where(vocab < targets, z, LOWEST).amax(1)
    after = torch.where(vocab > targets, z, LOWEST).amax(1)
    stats[Stat.BEFORE] = torch.maximum(stats[Stat.BEFORE], before)
    stats[Stat.AFTER] = torch.maximum(stats[Stat.AFTER], after)


def _move_reference(
    maximum: Tensor, stats: Tensor, spec: FoldSpec, acc: Tensor | None, operand: torch.dtype
) -> None:
    """Move a row's reference where the tile's maximum (R,) exceeds it by more than the headroom.

    A row's reference depends on its own logits alone, so its bits do not depend on its neighbours.
    """
    shift, lazy, _ = headroom(operand)
    old = stats[Stat.REFERENCE].clone()
    moved = (maximum - shift > old + lazy) | maximum.isnan()
    # On a GPU the question would cost a synchronisation, more than the multiplications do.
    if maximum.device.type == "cpu" and not bool(moved.any()):
        return
    new = torch.where(moved, maximum - shift, old)
    factor = (old - new).exp()
    if spec.entropy:
        stats[Stat.WEIGHTED] = factor * (stats[Stat.WEIGHTED] + (old - new) * stats[Stat.OTHERS])
    stats[Stat.OTHERS] *= factor
    if spec.squares:
        stats[Stat.SQUARES] *= factor.square()
    stats[Stat.REFERENCE] = new
    if acc is not None:
        acc.mul_(factor[:, None])


def finish_direction(
    acc: Tensor,  # (R, H) sum_{v != t} exp(z_v - r) softcap'(z_v) W_v
    stats: Tensor,  # (len(Stat), R)
    target_rows: Tensor,  # (R, H) W_t
    out: Tensor,  # (R, H); may be acc itself
) -> None:
    """``out = softcap'(z_t) W_t - sum_{v != t} q_v softcap'(z_v) W_v``, see memhead.statistics.

    ``(1 - p_t) * logit_scale / T * out`` is the gradient of the log-probability with respect to the
    hidden state. It is kept without that factor so that it never underflows, not even in float16.
    """
    others = stats[Stat.OTHERS]
    acc.mul_(torch.where(others > 0, -1 / others, 0.0)[:, None])
    slope = stats[Stat.SLOPE, :, None]
    out.copy_(acc.addcmul_(target_rows.to(acc.dtype), slope))


def logit_gradient(
    logits: Tensor,  # (R, C) raw products, overwritten
    tile: Tile,
    upstream: Upstream,  # each (R,); the gradients times logit_scale / T
    operand: torch.dtype,
) -> Tensor:
    """Gradient of the raw products (R, C), in the operand dtype.

        d log p_t / d z_v = (1 - p_t) (1[v = t] - q_v),  q_t = 0
        d entropy / d z_v = -p_v (log p_v + entropy)

    times the softcap's slope.
    """
    z, slope = to_logits(logits, tile)
    hit, column = _target_column(tile, z.shape[1])
    grad_logprobs, grad_entropy, logprobs, entropy, lse_others = upstream
    uncertain = one_minus_p(logprobs)
    grad = None
    if grad_entropy is not None and entropy is not None:
        # logsumexp(all) = lse_others - log(1 - p_t); where 1 - p_t underflows, no other has any p.
        lse = torch.where(uncertain > 0, lse_others - uncertain.log(), -LOWEST)
        log_p = (z - lse[:, None]).clamp_min_(LOWEST)
        log_p.scatter_(
            1, column, torch.where(hit, logprobs[:, None], log_p.gather(1, column)).clamp_min(LOWEST)
        )
        grad = log_p.exp()
        grad.mul_(log_p.add_(entropy[:, None])).mul_(-grad_entropy[:, None])
    q = z.sub_(lse_others[:, None]).exp_()
    coefficient = (grad_logprobs * uncertain)[:, None]
    q.scatter_(1, column, torch.where(hit, -1.0, q.gather(1, column)))
    q.mul_(-coefficient)
    if grad is not None:
        q.add_(grad)
    if slope is not None:
        q.mul_(slope)
    return q.to(operand)
