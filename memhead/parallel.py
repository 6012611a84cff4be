"""The head with its vocabulary split over a process group (tensor parallelism).

Every process holds some rows of the weight and sees all hidden states. It folds its own part of the
vocabulary as if that were all of it; then, block of rows by block of rows, the processes agree on
a common reference and add up their statistics, a few numbers for each row. So each computes two
products of its own size, and only those statistics cross the network, and once, in the backward
pass, the gradient of hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memhead import checks
from memhead.arguments import compute_dtype, read_arguments
from memhead.core import Call, Problem, score_with_autograd
from memhead.logprobs import LinearLogprobs, as_results
from memhead.statistics import Stat
from memhead.weights import DenseWeight

MAXIMA = [Stat.REFERENCE, Stat.TARGET, Stat.BEFORE, Stat.AFTER]
SUMS = [Stat.OTHERS, Stat.WEIGHTED, Stat.SQUARES, Stat.TOTAL]


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    extra_outputs: Sequence[str] = (),
    chunk: int | tuple[int, int] | None = None,
    backend: str | None = None,
    sizes: Sequence[int] | None = None,
) -> LinearLogprobs:
    """:func:`memhead.linear_logprobs` where this process holds only some rows of the weight.

    Every process of the group makes the same call, with the same tensors except weight and bias,
    and continues with the same loss.

    Args:
        hidden: (..., H), the same on every process.
        weight: (V_rank, H): the processes' parts, in the order of their ranks, are the vocabulary.
            Their sizes may differ.
        targets: (...), numbers in the whole vocabulary, the same on every process.
        group: the process group; ``None`` is the default one.
        bias: (V_rank,), this process's part.
        mask: see :func:`memhead.linear_logprobs`.
        temperature: likewise.
        softcap: likewise.
        logit_scale: likewise.
        entropy: likewise.
        extra_outputs: likewise.
        chunk: likewise; the same on every process.
        backend: likewise.
        sizes: rows of each process's part, by rank. ``None``: the processes tell each other, at every call, and wait
            for the GPU to hear it.

    Returns:
        :class:`LinearLogprobs`, the same on every process; differentiable with respect to hidden (the
        whole gradient, on every process) and to this process's weight and bias.

    Raises:
        ValueError: arguments that do not fit together; the message names argument, value and rule.
    """
    checks.check_head(hidden, weight, targets, bias)
    arguments = read_arguments(
        hidden,
        targets,
        compute_dtype(hidden, weight),
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        entropy=entropy,
        extra_outputs=extra_outputs,
        chunk=chunk,
        backend=backend,
    )
    first, total = _place(weight, group, sizes)
    labels, kept, row_temperature, settings = arguments

    def problem(x: Tensor, w: Tensor | None, b: Tensor | None) -> Problem:
        assert w is not None
        rows = x, _PartialWeight(w), labels, b, kept, row_temperature
        return Problem(*rows, settings, first=first, total=total)

    def merge(stats: Tensor, acc: Tensor | None) -> None:
        _merge(stats, acc, group)

    call = Call(
        problem,
        direction=torch.is_grad_enabled() and hidden.requires_grad,
        merge=merge,
        add_up=lambda by_hidden: dist.all_reduce(by_hidden, group=group),
    )
    results = score_with_autograd(call, hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    return as_results(results, settings.spec, targets.shape)


def vocab_parallel_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk: int | tuple[int, int] | None = None,
    backend: str | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """The losses (...) of :func:`memhead.linear_cross_entropy`, row by row, where the vocabulary is split.

    Arguments are those of :func:`vocab_parallel_logprobs` and :func:`memhead.linear_cross_entropy`; there is no label
    smoothing. A row's logsumexp, of which ``z_loss`` takes the square, is its target's logit less its log-probability.

    Returns:
        float32 (float64 for float64 inputs), 0 where the target is ``ignore_index``; the same on every process.
    """
    if z_loss < 0:
        raise ValueError(f"z_loss={z_loss} must be at least 0")
    checks.check_head(hidden, weight, targets, bias)
    targets = targets.long()  # compared as uint8, a target of 156 would be -100
    counted = targets != ignore_index
    labels = torch.where(counted, targets, 0)
    sizes = _sizes(weight, group) if sizes is None else sizes
    logprobs = vocab_parallel_logprobs(
        hidden,
        weight,
        labels,
        group=group,
        bias=bias,
        mask=counted,
        softcap=softcap,
        logit_scale=logit_scale,
        chunk=chunk,
        backend=backend,
        sizes=sizes,
    ).logprobs
    if not z_loss:
        return -logprobs
    first, _ = _place(weight, group, sizes)
    local = labels - first
    inside = (local >= 0) & (local < len(weight))
    compute = compute_dtype(hidden, weight)
    read = torch.where(counted[..., None], hidden, 0.0)  # a row that does not count may hold NaN
    local = local.clamp(0, len(weight) - 1)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = weight[local].to(compute).to(logprobs.dtype)  # (..., H)
        part = (_CopyTo.apply(read.to(compute).to(logprobs.dtype), group) * rows).sum(-1)
        if bias is not None:
            part = part + bias[local]
        z = _SumOf.apply(torch.where(inside, part, 0.0), group) * logit_scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
    return torch.where(counted, z_loss * (z - logprobs).square() - logprobs, 0.0)


class _CopyTo(torch.autograd.Function):
    """What every process has alike, used by each in its own part: the gradients of the parts are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOf(torch.autograd.Function):
    """The sum of the processes' parts, with which all go on alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _place(weight: Tensor, group: dist.ProcessGroup | None, sizes: Sequence[int] | None) -> tuple[int, int]:
    """Where this process's rows begin, and how many rows all have together."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sizes = _sizes(weight, group) if sizes is None else sizes
    if len(sizes) != world or sizes[rank] != len(weight):
        raise ValueError(
            f"sizes={list(sizes)} must name the rows of each of {world} processes, {len(weight)} at place {rank}; "
            "leave it out to let the processes tell each other"
        )
    return sum(sizes[:rank]), sum(sizes)


def _sizes(weight: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """Rows of each process's part, from one small message."""
    sizes = weight.new_zeros(dist.get_world_size(group), dtype=torch.long)
    sizes[dist.get_rank(group)] = len(weight)
    dist.all_reduce(sizes, group=group)
    return sizes.tolist()  # type: ignore[no-any-return]


class _PartialWeight(DenseWeight):
    """Rows of a part of the vocabulary; those that another process holds are zero."""

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`memhead.weights.Weight`."""
        inside = (indices >= 0) & (indices < len(self.weight))
        found = super().rows(indices.clamp(0, len(self.weight) - 1), dtype)
        return torch.where(inside[:, None], found, 0.0)


def _merge(stats: Tensor, acc: Tensor | None, group: dist.ProcessGroup | None) -> None:
    """Make each process's statistics (len(Stat), R) those of the whole vocabulary.

    The accumulator (R, H) stays this process's part of a sum, taken against the common reference.
    """
    # Not stats[MAXIMA]: a list of numbers would first be copied to the GPU, and Python wait for the copy.
    maxima = torch.stack([stats[i] for i in MAXIMA])  # (4, R)
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
    below = stats[Stat.REFERENCE] - maxima[0]  # <= 0
    factor = below.exp()
    stats[Stat.WEIGHTED] = factor * (stats[Stat.WEIGHTED] + below * stats[Stat.OTHERS])
    stats[Stat.OTHERS] *= factor
    stats[Stat.SQUARES] *= factor.square()
    if acc is not None:
        acc.mul_(factor[:, None])
    sums = torch.stack([stats[i] for i in SUMS])  # (4, R)
    dist.all_reduce(sums, group=group)
    for i, row in zip((*MAXIMA, *SUMS), (*maxima, *sums), strict=True):
        stats[i] = row
