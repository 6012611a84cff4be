"""The head with its vocabulary split over a process group (tensor parallelism).

Every process holds some rows of the weight and sees all hidden states. It folds its own part of the
vocabulary as if it were all there is; then, block of rows by block of rows, the processes agree on
a common reference and add up their statistics, a few numbers for each row. So each does two
products of its own size, and what crosses the network is those statistics, and in the backward
pass the hidden gradient, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from memhead import checks
from memhead.arguments import compute_dtype, read_arguments
from memhead.logprobs import LinearLogprobs
from memhead.masking import kept_rows, put_back, select
from memhead.ops import make_problem
from memhead.statistics import FoldSpec, Stat, Upstream, one_minus_p
from memhead.sweep import Problem, WeightPart, backward_sweep, forward_sweep
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
) -> LinearLogprobs:
    """:func:`memhead.linear_logprobs` of a weight of which this process holds some rows.

    Every process of the group makes the same call, with the same tensors but for weight and bias,
    and goes on with the same loss.

    Args:
        hidden: (..., H), the same on every process.
        weight: (V_rank, H): the processes' parts, in the order of their ranks, are the vocabulary.
            They need not be of one size.
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

    Returns:
        :class:`LinearLogprobs`, the same on every process; differentiable by hidden (the whole
        gradient, on every process) and by this process's weight and bias.

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
    )
    start, total = _place(weight, group)
    kept = kept_rows(arguments.mask)
    x, labels, row_temperature = select(
        kept, hidden.reshape(-1, hidden.shape[-1]), arguments.targets, arguments.temperature
    )
    checks.check_targets_in_vocabulary(labels, total)
    checks.check_temperatures(row_temperature)
    direction = torch.is_grad_enabled() and hidden.requires_grad
    settings = _Settings(group, total, arguments.spec, arguments.tile, backend, arguments.compute, direction)

    def shaped(y: Tensor) -> Tensor:
        """One value per row of hidden, 0 where the mask leaves it out."""
        return put_back(kept, y, targets.numel()).view(targets.shape)

    logprobs, *others = _VocabParallel.apply(settings, x, weight, bias, labels - start, row_temperature)
    return LinearLogprobs(shaped(logprobs), *(None if y is None else shaped(y) for y in others))


class _Settings(NamedTuple):
    group: dist.ProcessGroup | None
    vocab_size: int
    spec: FoldSpec
    chunk: list[int]
    backend: str | None
    compute: torch.dtype
    direction: bool


def _place(weight: Tensor, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Where this process's rows begin, and how many rows all have together."""
    sizes = weight.new_zeros(dist.get_world_size(group), dtype=torch.long)
    sizes[dist.get_rank(group)] = len(weight)
    dist.all_reduce(sizes, group=group)
    rows = sizes.tolist()
    return sum(rows[: dist.get_rank(group)]), sum(rows)


class _PartialWeight(DenseWeight):
    """Rows of a part of the vocabulary; those that another process holds are zero."""

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`memhead.weights.Weight`."""
        inside = (indices >= 0) & (indices < len(self.weight))
        found = super().rows(indices.clamp(0, len(self.weight) - 1), dtype)
        return torch.where(inside[:, None], found, 0.0)


class _VocabParallel(torch.autograd.Function):
    """Inputs without masked rows; targets counted from this process's first row."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V_rank, H)
        bias: Tensor | None,
        targets: Tensor,  # (N,), outside 0..V_rank-1 where another process holds the target
        temperature: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        problem = _problem(settings, hidden, weight, bias, targets, temperature)

        def merge(stats: Tensor, acc: Tensor | None) -> None:
            _merge(stats, acc, settings.group)

        with torch.autocast(hidden.device.type, enabled=False):
            rows, direction = forward_sweep(problem, direction=settings.direction, merge=merge)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        entropy = rows.entropy if settings.spec.entropy else None
        ctx.save_for_backward(
            hidden, weight, bias, targets, temperature, rows.logprobs, entropy, rows.lse_others, direction
        )
        # Our process divided the sum over the whole vocabulary by its own share.
        mean_logits = rows.mean_logits * (len(weight) / settings.vocab_size)
        spec = settings.spec
        metrics = [
            rows.log_sum_sq_probs if spec.squares else None,
            mean_logits if spec.total else None,
            rows.is_top1 if spec.top1 else None,
        ]
        ctx.mark_non_differentiable(*(y for y in metrics if y is not None))
        return rows.logprobs, entropy, *metrics

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        checks.check_differentiated_once()
        hidden, weight, bias, targets, temperature, logprobs, entropy, lse_others, direction = (
            ctx.saved_tensors
        )
        settings: _Settings = ctx.settings
        _, by_hidden, by_weight, by_bias, _, _ = ctx.needs_input_grad
        factor = settings.spec.slope(temperature)
        grad_logprobs = torch.zeros_like(logprobs) if grad_logprobs is None else grad_logprobs * factor
        grad_entropy = None if grad_entropy is None else grad_entropy * factor
        hidden_grad = weight_grad = bias_grad = None
        recompute_hidden = by_hidden and (grad_entropy is not None or direction is None)
        if recompute_hidden or by_weight or by_bias:
            with torch.autocast(hidden.device.type, enabled=False):
                hidden_grad, parts, bias_grad = backward_sweep(
                    _problem(settings, hidden, weight, bias, targets, temperature),
                    Upstream(grad_logprobs, grad_entropy, logprobs, entropy, lse_others),
                    hidden_grad=recompute_hidden,
                    weight_parts=(WeightPart(slice(0, weight.shape[1]), weight.dtype),) if by_weight else (),
                    bias_grad=by_bias,
                )
            weight_grad = parts[0] if by_weight else None
            bias_grad = None if bias_grad is None else bias_grad.to(bias.dtype)
        if by_hidden:
            if hidden_grad is None:
                hidden_grad = (grad_logprobs * one_minus_p(logprobs))[:, None] * direction
            wide = hidden_grad.to(logprobs.dtype)  # (N, H); summed wide, rounded once
            dist.all_reduce(wide, group=settings.group)
            hidden_grad = wide.to(hidden.dtype)
        return None, hidden_grad, weight_grad, bias_grad, None, None


def _problem(
    settings: _Settings,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
) -> Problem:
    return make_problem(
        hidden,
        _PartialWeight(weight),
        targets,
        bias,
        temperature,
        settings.spec,
        settings.chunk,
        settings.backend,
        settings.compute,
    )


def _merge(stats: Tensor, acc: Tensor | None, group: dist.ProcessGroup | None) -> None:
    """Make each process's statistics (len(Stat), R) those of the whole vocabulary.

    The accumulator (R, H) stays this process's part of a sum, taken against the common reference.
    """
    maxima = stats[MAXIMA]  # (4, R)
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
    below = stats[Stat.REFERENCE] - maxima[0]  # <= 0
    factor = below.exp()
    stats[Stat.WEIGHTED] = factor * (stats[Stat.WEIGHTED] + below * stats[Stat.OTHERS])
    stats[Stat.OTHERS] *= factor
    stats[Stat.SQUARES] *= factor.square()
    if acc is not None:
        acc.mul_(factor[:, None])
    sums = stats[SUMS]  # (4, R)
    dist.all_reduce(sums, group=group)
    stats[MAXIMA], stats[SUMS] = maxima, sums
