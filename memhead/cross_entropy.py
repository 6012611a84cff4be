"""``torch.nn.functional.cross_entropy`` of the head's logits, from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memhead import checks
from memhead.arguments import compute_dtype
from memhead.chunked import REDUCTIONS, chunked_linear
from memhead.logprobs import linear_logprobs
from memhead.masking import kept_rows, put_back, select
from memhead.products import operand_dtype, result_dtype
from memhead.summed_op import block_rows, summed_logprobs

OUTPUTS = ("lse", "z_loss", "predicted")


class LinearCrossEntropy(NamedTuple):
    """The loss, and beside it what was asked for by ``extra_outputs``, without a gradient; else ``None``."""

    loss: Tensor
    lse: Tensor | None = None  # (...): logsumexp of each row's logits
    z_loss: Tensor | None = None  # the part of ``loss`` that is the z-loss, reduced as it is
    predicted: Tensor | None = None  # (...), int64: the most likely token of each row


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    extra_outputs: Sequence[str] = (),
    chunk: int | tuple[int, int] | None = None,
    backend: str | None = None,
) -> Any:
    """``cross_entropy(softcap(logit_scale * (hidden @ weight.T + bias)), targets)`` without the logits.

    Args:
        hidden: (..., H), floating point.
        weight: (V, H), floating point.
        targets: (...), integers in 0..V-1, or ``ignore_index``: such rows are not computed. Or (..., V), floating
            point: each row's probabilities of the tokens, from a teacher say; then every row counts.
        bias: (V,); -inf forbids a token, except under a softcap c, which turns it into -c.
        ignore_index: target of the rows that do not count.
        reduction: "mean" over the rows that count (NaN if none does, as in torch), "sum", or
            "none" (0 for the rows that do not count).
        class_weights: (V,): factor of each token's loss, torch's ``weight``; "mean" divides by the sum of the targets'
            factors (of probabilities: by the number of rows), as torch does. Not differentiated.
        label_smoothing: share in 0..1 of the target's weight spread over the whole vocabulary.
        z_loss: factor of logsumexp(logits)^2, added to every row's loss (PaLM, arXiv 2204.02311, section 5). Class
            weights leave it alone: its mean is that over the rows that count.
        softcap: c > 0 of ``c * tanh(x / c)``, after the scale.
        logit_scale: factor on the logits.
        extra_outputs: any of "lse", "z_loss", "predicted", for what is logged beside a loss.
        chunk: see :func:`memhead.linear_logprobs`; with what runs in torch (below) only its rows count.
            The mean or sum of a trainable float32 head on a CPU holds its rows over the whole
            vocabulary (three products); given columns too, it keeps to that tile (four).
        backend: see :func:`memhead.linear_logprobs`; probabilities, label smoothing, z-loss and extra outputs run in
            torch, over whole rows.

    Returns:
        A scalar, or (...) with "none"; float32 (float64 for float64 inputs). With ``extra_outputs`` a
        :class:`LinearCrossEntropy`. ``torch.compile`` takes the call into its graph, except where it runs in torch
        (:func:`memhead.chunked_linear`).

    Raises:
        ValueError: arguments that do not fit together; the message names argument, value and rule.
    """
    soft = isinstance(targets, Tensor) and targets.is_floating_point()
    checks.check_head(hidden, weight, None if soft else targets, bias)
    checks.check_chunk(chunk)
    if soft:
        _check_probabilities(targets, hidden, weight)
    if class_weights is not None:
        checks.check_tokens("class_weights", class_weights, weight)
        checks.check_device("class_weights", class_weights, hidden)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must be between 0 and 1")
    if z_loss < 0:
        raise ValueError(f"z_loss={z_loss} must be at least 0")
    checks.check_logit_options(softcap, logit_scale)
    checks.check_names("extra_outputs", extra_outputs, OUTPUTS)
    if not soft:
        targets = targets.long()  # compared as uint8, a target of 156 would be -100
    counted = (
        torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        if soft
        else targets != ignore_index
    )
    # Of the results' dtype: a sum in bfloat16 would be rounded to three digits, and one in float64 widen the loss.
    dtype = result_dtype(operand_dtype(compute_dtype(hidden, weight), hidden.device))
    factors = None if class_weights is None else class_weights.detach().to(dtype)
    divisor = None
    if reduction == "mean":
        divisor = counted.sum() if soft or factors is None else _of_targets(factors, targets, counted).sum()
    found = None
    if soft or label_smoothing or z_loss or extra_outputs:
        # What divides a mean is, with class weights, their sum; a z-loss is a mean over rows.
        of_z = z_loss if divisor is None or factors is None or soft else z_loss * divisor / counted.sum()
        found = _of_counted_rows(
            _CountedRows(
                hidden.reshape(-1, hidden.shape[-1]),
                targets.reshape(counted.numel(), *weight.shape[:1] * soft),
                counted,
            ),
            weight,
            _Regularised(softcap, logit_scale, label_smoothing, of_z, factors),
            bias=bias,
            each=reduction == "none",
            noting=bool(extra_outputs),
            chunk=None if chunk is None else chunk if isinstance(chunk, int) else chunk[0],
        )
        loss = found.loss
    elif factors is None and reduction != "none" and (rows := block_rows(hidden, weight, chunk)) is not None:
        loss = -summed_logprobs(
            hidden,
            weight,
            targets,
            bias,
            counted,
            softcap=softcap,
            logit_scale=logit_scale,
            rows=rows,
            backend=backend,
        )
    else:
        loss = -linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            mask=counted,
            softcap=softcap,
            logit_scale=logit_scale,
            chunk=chunk,
            backend=backend,
        ).logprobs
        loss = loss if factors is None else loss * _of_targets(factors, targets, counted)
        loss = loss if reduction == "none" else loss.sum()
    loss = loss if divisor is None else loss / divisor
    if found is None or not extra_outputs:
        return loss
    of_z_loss = found.z_loss if divisor is None or found.z_loss is None else found.z_loss / divisor
    beside = found._replace(loss=loss, z_loss=of_z_loss)
    return LinearCrossEntropy(
        loss, *(getattr(beside, name) if name in extra_outputs else None for name in OUTPUTS)
    )


def _check_probabilities(probabilities: Tensor, hidden: Tensor, weight: Tensor) -> None:
    wanted = (*hidden.shape[:-1], weight.shape[0])
    if probabilities.shape != wanted:
        raise ValueError(
            f"targets has shape {tuple(probabilities.shape)} and dtype {probabilities.dtype}; they must be "
            f"integers {tuple(hidden.shape[:-1])} or probabilities {wanted}"
        )
    checks.check_device("targets", probabilities, hidden)


def _of_targets(factors: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Each row's factor (...), 0 where the row does not count."""
    inside = torch.where(counted, targets, 0).clamp(
        0, len(factors) - 1
    )  # a target outside is refused by the head
    return torch.where(counted, factors[inside], 0.0)


class _CountedRows(NamedTuple):
    """The rows of a loss, and which of them count."""

    hidden: Tensor  # (N, H)
    targets: Tensor  # (N,), or probabilities (N, V)
    counted: Tensor  # (...) bool


@dataclass(frozen=True)
class _Regularised:
    """A transform: cross entropy with label smoothing, z-loss and class weights; it notes what is logged."""

    softcap: float | None
    logit_scale: float
    label_smoothing: float
    z_loss: float | Tensor
    class_weights: Tensor | None

    def __call__(self, logits: Tensor, targets: Tensor, *noted: Tensor) -> Tensor:
        """(R, V), (R,) or (R, V) -> (R,). noted: logsumexp and most likely token (R,), written where they are given."""
        z = logits * self.logit_scale if self.logit_scale != 1.0 else logits
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        loss = torch.nn.functional.cross_entropy(
            z,
            targets if targets.dim() == 1 else targets.to(z.dtype),
            weight=None if self.class_weights is None else self.class_weights.to(z.dtype),
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        if noted:
            lse, best = noted
            # Through .data, which autograd does not watch: what is noted is no part of its graph.
            lse.data.copy_(z.detach().logsumexp(-1))
            best.data.copy_(z.detach().argmax(-1))
        plain = isinstance(self.z_loss, float | int) and not self.z_loss
        return loss if plain else loss + self.z_loss * z.logsumexp(-1).square()


@torch.compiler.disable(reason="what runs in torch does so through memhead.chunked_linear")
def _of_counted_rows(
    rows: _CountedRows,
    weight: Tensor,
    transform: _Regularised,
    *,
    bias: Tensor | None,
    each: bool,
    noting: bool,
    chunk: int | None,
) -> LinearCrossEntropy:
    """The transform's sum over the rows that count, or each row's value, 0 where it does not count; what it noted."""
    kept = kept_rows(rows.counted.reshape(-1))
    hidden, labels = select(kept, rows.hidden, rows.targets)
    if not labels.is_floating_point():
        checks.check_targets_in_vocabulary(labels, weight.shape[0])
    noted = []
    if noting:
        dtype = result_dtype(operand_dtype(compute_dtype(hidden, weight), hidden.device))
        noted = [hidden.new_zeros(len(hidden), dtype=kind) for kind in (dtype, torch.int64)]
    reduction = "none" if each else "sum"
    loss = chunked_linear(
        hidden, weight, transform, labels, *noted, bias=bias, reduction=reduction, chunk=chunk
    )

    def whole(x: Tensor) -> Tensor:
        return put_back(kept, x, rows.counted.numel()).view(rows.counted.shape)

    loss = whole(loss) if each else loss
    if not noting:
        return LinearCrossEntropy(loss)
    lse, best = noted
    of_z = transform.z_loss * lse.square()
    return LinearCrossEntropy(loss, whole(lse), whole(of_z) if each else of_z.sum(), whole(best))
