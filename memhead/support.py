"""Log-probabilities under truncated sampling: top-k, top-p, min-p.

A sampler that truncates draws from the policy renormalised over a support S of a few tokens. The
ratio of new to old probability is unbiased only if both are renormalised over that same S:

    E_old[new_S / old_S] = sum_{v in S} new_S(v) = 1,  but  E_old[new / old] = new(S) / old(S)

So the support is computed once, from the policy that sampled, and both are evaluated on it. It is
small: its weight rows are gathered for a few rows at a time, and no logit outside it is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memhead import checks
from memhead.arguments import compute_dtype, flat_mask, split_temperature
from memhead.chunked import fill_logits
from memhead.logprobs import LinearLogprobs
from memhead.masking import kept_rows, put_back, select
from memhead.planning import plan_rows
from memhead.products import as_operand, result_dtype
from memhead.statistics import LOWEST
from memhead.sweep import blocks


class SupportTooLarge(ValueError):
    """A row keeps more tokens than there is room for."""


@torch.no_grad()
def truncation_support(
    hidden: Tensor,
    weight: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    include: Tensor | None = None,
    max_size: int = 1024,
    chunk: int | None = None,
) -> Tensor:
    """Tokens that the sampler could have drawn, (..., K) int64, the most likely first, padded with -1.

    The filters work in the order of transformers' ``generate``: temperature, top-k, top-p of what
    top-k left, min-p. (vLLM applies min-p first: the same tokens unless top-p is set as well.) As in
    ``generate``, tokens as likely as the k-th are kept. K is what the widest row needs; finding it
    synchronises a GPU once.

    Args:
        hidden: (..., H) of the policy that sampled.
        weight: (V, H).
        top_k: >= 1, the k most likely tokens.
        top_p: in 0..1, the fewest most likely tokens that hold this much probability.
        min_p: in 0..1, the tokens at least this share as likely as the most likely one.
        bias: see :func:`memhead.linear_logprobs`.
        temperature: likewise.
        softcap: likewise.
        logit_scale: likewise.
        include: (...) the tokens drawn: a sampler that rounds its logits may have drawn one that
            exact logits put just outside.
        max_size: the largest support a row may have.
        chunk: rows of a chunk of logits; ``None`` plans it.

    Raises:
        ValueError: arguments that do not fit together.
        SupportTooLarge: a ValueError too, for a row whose support exceeds ``max_size``.
    """
    checks.check_head(hidden, weight, include, bias)
    checks.check_row_chunk(chunk)
    _check_filters(top_k, top_p, min_p)
    checks.check_at_least_one("max_size", max_size)
    num_rows, vocab_size = hidden.shape[:-1].numel(), weight.shape[0]
    compute = compute_dtype(hidden, weight)
    result = result_dtype(compute)
    planned = plan_rows(num_rows, vocab_size, device_type=hidden.device.type, itemsize=result.itemsize)
    size = planned if chunk is None else max(1, min(chunk, num_rows))
    flat = hidden.reshape(-1, hidden.shape[-1])
    per_row, number = split_temperature(temperature, hidden, result)
    checks.check_temperatures(per_row)
    found = flat.new_full((num_rows, min(max_size, vocab_size)), -1, dtype=torch.long)
    overflow = flat.new_zeros((), dtype=torch.bool)
    buffer = flat.new_empty((size, vocab_size), dtype=result)
    for rows in blocks(num_rows, size):
        x = as_operand(flat[rows], compute)
        with torch.autocast(hidden.device.type, enabled=False):
            z = fill_logits(x, weight, bias, compute, buffer[: len(x)])  # (R, V)
        z = _to_logits(z, number if per_row is None else per_row[rows], softcap, logit_scale)
        best, ids = z.topk(min(max_size + 1, vocab_size))  # one more than there is room for
        keep = _keep(best, z.logsumexp(1), top_k, top_p, min_p)
        overflow |= keep[:, max_size:].any()
        found[rows] = torch.where(keep, ids, -1)[:, :max_size]
    if bool(overflow):
        raise SupportTooLarge(
            f"max_size={max_size} is too small: with top_k={top_k}, top_p={top_p} and min_p={min_p} "
            "a row keeps more tokens"
        )
    widest = int((found >= 0).sum(1).max()) if num_rows else 0
    found = found[:, :widest]
    if include is not None:
        drawn = include.reshape(-1, 1).long()
        missing = ~(found == drawn).any(1, keepdim=True)
        if bool(missing.any()):
            found = torch.cat((found, torch.where(missing, drawn, -1)), 1)
    return found.reshape(*hidden.shape[:-1], -1) if num_rows else found.reshape(*hidden.shape[:-1], 0)


def supported_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    support: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> LinearLogprobs:
    """:func:`memhead.linear_logprobs` renormalised over a support of each row.

    Args:
        hidden: (..., H), floating point.
        weight: (V, H), floating point.
        targets: (...), integers; one outside its row's support has log-probability -inf, with zero
            gradient.
        support: (..., K) integers, distinct tokens padded with -1, from :func:`truncation_support`.
        bias: see :func:`memhead.linear_logprobs`.
        mask: likewise.
        temperature: likewise.
        softcap: likewise.
        logit_scale: likewise.
        entropy: also return the entropy of the renormalised distribution.
        chunk: rows of which the support's weight rows are held at a time; ``None`` plans it.

    Returns:
        :class:`LinearLogprobs`; logprobs and entropy are differentiable with respect to hidden, weight
        and bias. Beside the chunk, a few (N, K) tensors are held.

    Raises:
        ValueError: arguments that do not fit together; the message names argument, value and rule.
    """
    checks.check_head(hidden, weight, targets, bias)
    checks.check_integers("support", support)
    checks.check_row_arg("support", support, hidden)
    if support.dim() != hidden.dim():
        raise ValueError(
            f"support has shape {tuple(support.shape)}; it must be (..., K), a list for each row"
        )
    checks.check_row_chunk(chunk)
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    ids = support.reshape(len(labels), support.shape[-1])
    compute = compute_dtype(hidden, weight)
    per_row, number = split_temperature(temperature, hidden, result_dtype(compute))
    kept = kept_rows(None if mask is None else flat_mask(mask, hidden))
    flat, ids, labels, per_row = select(kept, flat, ids, labels, per_row)
    checks.check_targets_in_vocabulary(ids.clamp_min(0), weight.shape[0])
    checks.check_temperatures(per_row)
    planned = plan_rows(
        len(flat), max(1, ids.shape[1] * weight.shape[1]), device_type=hidden.device.type, itemsize=4
    )
    raw = _SupportLogits.apply(flat, weight, bias, ids, compute, chunk or planned)
    z = _to_logits(raw, number if per_row is None else per_row, softcap, logit_scale).clamp_min(LOWEST)
    results = [_renormalised(z.masked_fill(ids < 0, LOWEST), ids == labels[:, None])]
    if entropy:
        results.append(_entropy(z.masked_fill(ids < 0, LOWEST)))
    return LinearLogprobs(*(put_back(kept, x, targets.numel()).view(targets.shape) for x in results))


class _SupportLogits(torch.autograd.Function):
    """Raw logits (N, K) of each row's own tokens; arbitrary numbers at the padding."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        support: Tensor,  # (N, K)
        compute: torch.dtype,
        chunk: int,
    ) -> Tensor:
        ids = support.clamp_min(0)
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.compute, ctx.chunk = compute, chunk
        result = result_dtype(compute)
        out = hidden.new_empty(ids.shape, dtype=result)
        for rows in blocks(len(hidden), chunk):
            x = _widen(hidden[rows], compute, result)  # (R, H)
            w = _widen(weight[ids[rows]], compute, result)  # (R, K, H)
            with torch.autocast(hidden.device.type, enabled=False):
                out[rows] = torch.bmm(w, x[:, :, None]).squeeze(2)
        return out if bias is None else out.add_(bias[ids].to(result))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # (N, K)
        checks.check_differentiated_once()
        hidden, weight, bias, ids = ctx.saved_tensors
        by_hidden, by_weight, by_bias = ctx.needs_input_grad[:3]
        hidden_grad = torch.empty_like(hidden) if by_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=grad.dtype) if by_weight else None
        for rows in blocks(len(hidden), ctx.chunk):
            if hidden_grad is not None:
                w = _widen(weight[ids[rows]], ctx.compute, grad.dtype)  # (R, K, H)
                hidden_grad[rows] = torch.bmm(grad[rows, None], w).squeeze(1)
            if weight_grad is not None:
                x = _widen(hidden[rows], ctx.compute, grad.dtype)
                outer = grad[rows, :, None] * x[:, None]  # (R, K, H)
                weight_grad.index_add_(0, ids[rows].flatten(), outer.flatten(0, 1))
        bias_grad = None
        if by_bias:
            bias_grad = grad.new_zeros(len(bias)).index_add_(0, ids.flatten(), grad.flatten()).to(bias.dtype)
        weight_grad = None if weight_grad is None else weight_grad.to(weight.dtype)
        return hidden_grad, weight_grad, bias_grad, None, None, None


def _widen(x: Tensor, compute: torch.dtype, result: torch.dtype) -> Tensor:
    """``x`` as the products of :mod:`memhead.sweep` round it, in a dtype wide enough to lose nothing more."""
    return x.to(compute).to(result)


def _renormalised(z: Tensor, hit: Tensor) -> Tensor:
    """log softmax at the target from logits (N, K), the target kept apart (see memhead.statistics)."""
    target = torch.where(hit, z, 0.0).sum(1)
    gap = z.masked_fill(hit, LOWEST).logsumexp(1) - target
    logprobs = -torch.logaddexp(gap, torch.zeros_like(gap))  # softplus would be infinite from 88 on
    possible = hit.any(1) & ~(target <= LOWEST / 2)  # NaN is no impossible target
    return torch.where(possible, logprobs, float("-inf"))


def _entropy(z: Tensor) -> Tensor:
    logp = z.log_softmax(1)
    return -(logp.exp() * logp.clamp_min(-1e4)).sum(1)  # exp(-1e4) is 0, and 0 * -inf would be NaN


def _to_logits(raw: Tensor, divisor: float | Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    z = raw * logit_scale
    if softcap is not None:
        checks.check_positive("softcap", softcap)
        z = softcap * torch.tanh(z / softcap)
    return z / (divisor[:, None] if isinstance(divisor, Tensor) else divisor)


def _check_filters(top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    if top_k is None and top_p is None and min_p is None:
        raise ValueError("none of top_k, top_p and min_p is given; without truncation use linear_logprobs")
    if top_k is not None:
        checks.check_at_least_one("top_k", top_k)
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0.0 < value <= 1.0:
            raise ValueError(f"{name}={value} must be greater than 0 and at most 1")


def _keep(
    best: Tensor,  # (R, K) logits, descending
    lse: Tensor,  # (R,) of all logits
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> Tensor:
    """Which of the most likely tokens the sampler keeps, (R, K) bool."""
    keep = best > float("-inf")
    if top_k is not None:
        keep &= best >= best[:, min(top_k, best.shape[1]) - 1, None]
        lse = best.masked_fill(~keep, float("-inf")).logsumexp(1)
    if top_p is not None and top_p < 1.0:
        p = torch.where(keep, (best - lse[:, None]).exp(), 0.0)
        keep &= p.cumsum(1) - p < top_p  # what is more likely does not yet hold top_p
    if min_p is not None:
        keep &= best >= best[:, :1] + torch.tensor(min_p).log().item()
    return keep
