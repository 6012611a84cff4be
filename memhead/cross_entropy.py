"""``torch.nn.functional.cross_entropy`` of the head's logits, from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memhead import checks
from memhead.chunked import REDUCTIONS, chunked_linear
from memhead.logprobs import linear_logprobs
from memhead.masking import kept_rows, put_back, select
from memhead.summed_op import block_rows, summed_logprobs


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk: int | tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """``cross_entropy(softcap(logit_scale * (hidden @ weight.T + bias)), targets)`` without the logits.

    Args:
        hidden: (..., H), floating point.
        weight: (V, H), floating point.
        targets: (...), integers in 0..V-1, or ``ignore_index``: such rows are not computed.
        bias: (V,); -inf forbids a token, except under a softcap c, which turns it into -c.
        ignore_index: target of the rows that do not count.
        reduction: "mean" over the rows that count (NaN if none does, as in torch), "sum", or
            "none" (0 for the rows that do not count).
        label_smoothing: share in 0..1 of the target's weight spread over the whole vocabulary.
        z_loss: factor of logsumexp(logits)^2, added to every row's loss (PaLM, arXiv 2204.02311, section 5).
        softcap: c > 0 of ``c * tanh(x / c)``, after the scale.
        logit_scale: factor on the logits.
        chunk: see :func:`memhead.linear_logprobs`; with label smoothing or z-loss only its rows count.
            The mean or sum of a trainable float32 head on a CPU holds its rows over the whole
            vocabulary (three products); given columns too, it keeps to that tile (four).
        backend: see :func:`memhead.linear_logprobs`; label smoothing and z-loss run in torch.

    Returns:
        A scalar, or (...) with "none"; float32 (float64 for float64 inputs). ``torch.compile`` takes it
        into its graph, except with label smoothing or z-loss (:func:`memhead.chunked_linear`).

    Raises:
        ValueError: arguments that do not fit together; the message names argument, value and rule.
    """
    checks.check_head(hidden, weight, targets, bias)
    checks.check_chunk(chunk)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must be between 0 and 1")
    if z_loss < 0:
        raise ValueError(f"z_loss={z_loss} must be at least 0")
    if softcap is not None:
        checks.check_positive("softcap", softcap)
    targets = targets.long()  # compared as uint8, a target of 156 would be -100
    counted = targets != ignore_index
    if label_smoothing or z_loss:
        rows = None if chunk is None else chunk if isinstance(chunk, int) else chunk[0]
        transform = _Regularised(softcap, logit_scale, label_smoothing, z_loss)
        loss = _of_counted_rows(hidden, weight, targets, counted, transform, bias, reduction, rows)
    elif reduction != "none" and (rows := block_rows(hidden, weight, chunk)) is not None:
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
        loss = loss if reduction == "none" else loss.sum()
    return loss / counted.sum() if reduction == "mean" else loss


@dataclass(frozen=True)
class _Regularised:
    """A transform: cross entropy with label smoothing and z-loss."""

    softcap: float | None
    logit_scale: float
    label_smoothing: float
    z_loss: float

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:  # (R, V), (R,) -> (R,)
        z = logits * self.logit_scale if self.logit_scale != 1.0 else logits
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        loss = torch.nn.functional.cross_entropy(
            z, targets, reduction="none", label_smoothing=self.label_smoothing
        )
        return loss + self.z_loss * z.logsumexp(-1).square() if self.z_loss else loss


@torch.compiler.disable(reason="label smoothing and z-loss run through memhead.chunked_linear")
def _of_counted_rows(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    counted: Tensor,
    transform: Callable[..., Tensor],
    bias: Tensor | None,
    reduction: str,
    chunk: int | None,
) -> Tensor:
    """The transform's sum over the rows that count, or each row's value, 0 where it does not count."""
    kept = kept_rows(counted.reshape(-1))
    rows, labels = select(kept, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long())
    checks.check_targets_in_vocabulary(labels, weight.shape[0])
    each = reduction == "none"
    loss = chunked_linear(
        rows, weight, transform, labels, bias=bias, reduction="none" if each else "sum", chunk=chunk
    )
    return put_back(kept, loss, targets.numel()).view(targets.shape) if each else loss
