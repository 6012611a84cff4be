"""Plain full logits, with autograd through every step: what memhead must equal, and what it is measured against.

    exact = full_logprobs(hidden, weight, targets, dtype=torch.float64)

Nothing here is chunked: (N, V) logits and what autograd keeps of them are held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from memhead.arguments import compute_dtype
from memhead.logprobs import LinearLogprobs, LowRankUpdate
from memhead.products import result_dtype


def full_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    low_rank: LowRankUpdate | None = None,
    dtype: torch.dtype | None = None,
    widen: bool = True,
) -> Tensor:
    """``softcap(logit_scale * (hidden @ weight.T + bias)) / temperature``, (..., V).

    Args:
        hidden: (..., H), floating point.
        weight: (V, H), floating point.
        bias: (V,).
        temperature: one number or one per row (...).
        softcap: c of ``c * tanh(x / c)``.
        logit_scale: factor on the logits, before the softcap.
        low_rank: a LoRA update of the weight.
        dtype: of the product and its operands; ``None`` is autocast's where autocast is on, else the
            wider of hidden's and weight's.
        widen: whether half-precision products are widened to float32 before anything else is done.
    """
    dtype = compute_dtype(hidden, weight) if dtype is None else dtype
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if low_rank is not None:
        a, b, scaling, dropout = low_rank
        dropped = F.dropout(hidden, dropout) if dropout else hidden
        logits = logits + (dropped.to(dtype) @ a.to(dtype).t()) @ b.to(dtype).t() * scaling
    if widen:
        logits = logits.to(result_dtype(dtype))
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        return logits / temperature[..., None]
    return logits / temperature if temperature != 1.0 else logits


def full_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    extra_outputs: Sequence[str] = (),
    low_rank: LowRankUpdate | None = None,
    dtype: torch.dtype | None = None,
    widen: bool = True,
) -> LinearLogprobs:
    """:func:`memhead.linear_logprobs` by full logits; ``dtype`` and ``widen`` as in :func:`full_logits`."""
    logits = full_logits(
        hidden,
        weight,
        bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        low_rank=low_rank,
        dtype=dtype,
        widen=widen,
    )
    if mask is not None:
        targets = torch.where(mask, targets, 0)
    logp = logits.log_softmax(-1)
    results = LinearLogprobs(
        logp.gather(-1, targets[..., None]).squeeze(-1),
        _entropy(logp, forbidding=bias is not None) if entropy or "entropy" in extra_outputs else None,
        (2 * logp.detach()).logsumexp(-1) if "log_sum_sq_probs" in extra_outputs else None,
        logits.detach().mean(-1) if "mean_logits" in extra_outputs else None,
        logits.argmax(-1) == targets if "is_top1" in extra_outputs else None,
    )
    if mask is None:
        return results
    return LinearLogprobs(*(None if x is None else torch.where(mask, x, x.new_zeros(())) for x in results))  # type: ignore[arg-type]


def _entropy(logp: Tensor, *, forbidding: bool) -> Tensor:
    """(...) of log-probabilities (..., V), among which a bias may have put -inf: 0 * -inf would be NaN."""
    finite = logp.clamp_min(-1e4) if forbidding else logp  # exp(-1e4) is 0 in every dtype
    return -(logp.exp() * finite).sum(-1)
