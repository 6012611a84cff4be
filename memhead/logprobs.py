"""Per-token log-probabilities straight from hidden states, without the logits.

The idea, for one token with hidden state h, target t and logits z_v = W_v . h:

1. Beside the target's own logit, its log-probability only needs the log-sum-exp of the V logits. So
   the logits are computed in tiles (some rows by some vocabulary columns), and each tile is folded
   into a few running sums per row and forgotten. Nothing of size N x V is ever held.

2. Its gradient is one vector of the size of h:

       d log p_t / d h = (1 - p_t) (W_t - sum_{v != t} q_v W_v),   q = softmax over the others

   The sum is a product of exponentials that the tile holds *right now* with weight rows that are
   in cache right now. So it is taken in the forward pass, unnormalised, and divided by the sum of
   the exponentials once the row is complete. The backward pass of a frozen head is then
   ``grad_hidden = grad[:, None] * (1 - p_t)[:, None] * direction``: two products in all, which is
   what full logits cost, and no recomputation.

3. The target is kept out of both sums and added in float32 at the end. ``1 - p_t`` and
   ``log p_t`` then never come from a cancellation, so a token that the model is sure of keeps its
   exact value and gradient (memhead.statistics has the algebra).

4. Only what cannot be known before the upstream gradient arrives is recomputed in the backward:
   the gradient of a trainable weight or bias, and that of the entropy, if one arrives.

The loop over tiles is :func:`memhead.sweep.forward_sweep`; the row-wise work on a tile is
:func:`memhead.backends.torch.fold_tile` (and its Triton twin).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memhead import checks
from memhead.arguments import compute_dtype, read_arguments
from memhead.ops import Head, logprobs_op
from memhead.statistics import FoldSpec


class LinearLogprobs(NamedTuple):
    """Per-token results, each of hidden's leading dimensions; ``None`` where not requested.

    float32 (float64 for float64 inputs); rows left out by ``mask`` are 0.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None  # log sum_v p_v^2, no gradient
    mean_logits: Tensor | None = None  # mean over the vocabulary of the logits after temperature, no gradient
    is_top1: Tensor | None = None  # bool: the target is the most likely token


class LowRankUpdate(NamedTuple):
    """LoRA on the head: logits of ``weight + scaling * B @ A``, without forming that sum."""

    a: Tensor  # (r, H)
    b: Tensor  # (V, r)
    scaling: float = 1.0
    dropout: float = 0.0  # of hidden, on its way into A; 0 when not training


def linear_logprobs(
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
    chunk: int | tuple[int, int] | None = None,
    backend: str | None = None,
) -> LinearLogprobs:
    """``log softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature)[targets]``.

    Args:
        hidden: (..., H), floating point.
        weight: (V, H), floating point. The products run in the promoted dtype of the two, or in
            autocast's where autocast is on, and give float32.
        targets: (...), integers in 0..V-1 wherever ``mask`` is true.
        bias: (V,); -inf forbids a token, except under a softcap c, which turns it into -c.
        mask: (...), bool; rows where it is false are not computed: 0, with zero gradient. With more
            than a few hundred rows a GPU is asked once how many are kept, while it works on the
            first ones (:mod:`memhead.masking`); inside a CUDA graph it cannot be asked.
        temperature: > 0, one number or one per row (...). Not differentiated.
        softcap: c > 0 of ``c * tanh(x / c)`` (Gemma 2), after the scale, before the temperature.
        logit_scale: factor on the logits (Cohere, Granite's 1 / logits_scaling).
        entropy: also return -sum_v p_v log p_v. It costs no product; if a gradient arrives at it,
            the backward pass recomputes the logits once.
        extra_outputs: any of "log_sum_sq_probs", "mean_logits", "is_top1".
        low_rank: a LoRA update of the weight.
        chunk: rows, or (rows, vocabulary columns), of a tile; ``None`` plans it
            (:mod:`memhead.planning`). It changes memory and speed, not results beyond rounding.
        backend: "torch" or "triton"; ``None`` takes the fastest that runs on hidden's device.

    Returns:
        :class:`LinearLogprobs`; logprobs and entropy are differentiable with respect to hidden,
        weight, bias and the low-rank update.

    Raises:
        ValueError: arguments that do not fit together; the message names argument, value and rule.
    """
    checks.check_head(hidden, weight, targets, bias)
    compute = compute_dtype(hidden, weight)
    labels, kept, row_temperature, settings = read_arguments(
        hidden,
        targets,
        compute,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        entropy=entropy,
        extra_outputs=extra_outputs,
        chunk=chunk,
        backend=backend,
    )

    update = None
    if low_rank is not None:
        hidden, update = _extend(hidden, weight, low_rank, compute)
    direction = torch.is_grad_enabled() and hidden.requires_grad
    flat = hidden.reshape(-1, hidden.shape[-1])
    head = Head.of(flat, weight, update, labels, bias, kept, row_temperature, settings)
    return as_results(logprobs_op(*head, direction), settings.spec, targets.shape)


def as_results(rows: Sequence[Tensor], spec: FoldSpec, shape: torch.Size) -> LinearLogprobs:
    """The first five of ``rows``, each (N,) and in the order of :class:`LinearLogprobs`, in ``shape``."""
    entropies, *metrics = (
        x.reshape(shape) if want else None for x, want in zip(rows[1:5], spec.wanted, strict=True)
    )
    detached = (None if x is None else x.detach() for x in metrics)
    return LinearLogprobs(rows[0].reshape(shape), entropies, *detached)


def _extend(
    hidden: Tensor, weight: Tensor, low_rank: LowRankUpdate, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``[h | s A h]`` (..., H + r), and B (V, r): the update as ``r`` more features of the head."""
    if not isinstance(low_rank, LowRankUpdate):
        raise ValueError(f"low_rank is a {type(low_rank).__name__}; pass a memhead.LowRankUpdate")
    a, b = low_rank.a, low_rank.b
    for name, value in (("low_rank.a", a), ("low_rank.b", b)):
        checks.check_whole_tensor(name, value)
    if a.shape != (b.shape[1], hidden.shape[-1]) or b.shape[0] != weight.shape[0]:
        raise ValueError(
            f"low_rank has a {tuple(a.shape)} and b {tuple(b.shape)}; with weight {tuple(weight.shape)} "
            f"they must be (r, {weight.shape[1]}) and ({weight.shape[0]}, r)"
        )
    dropped = torch.nn.functional.dropout(hidden, low_rank.dropout) if low_rank.dropout else hidden
    with torch.autocast(hidden.device.type, enabled=False):
        projected = (dropped.to(compute) @ a.to(compute).t()) * low_rank.scaling  # (..., r)
    return torch.cat((hidden.to(compute), projected), dim=-1), b
