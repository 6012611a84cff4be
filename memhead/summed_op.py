"""Cross entropy of a trainable head as one operator: its sum and every gradient, in three products.

A sum (or a mean) has one upstream gradient for all its rows, which only scales what the forward
pass can compute by itself (:class:`memhead.sweep.HeadGradients`). The price is memory: a block of
rows of the whole vocabulary, and the weight's gradient from the forward pass on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memhead.arguments import Settings, compute_dtype
from memhead.checks import check_differentiated_once, check_targets_in_vocabulary
from memhead.core import Problem
from memhead.masking import kept_rows, put_back, select
from memhead.planning import plan_kept_rows
from memhead.products import operand_dtype, result_dtype
from memhead.shortage import in_smaller_tiles
from memhead.statistics import FoldSpec, Rows
from memhead.sweep import HeadGradients, Work, forward_sweep
from memhead.weights import DenseWeight

# The operator's arguments; the first TENSORS of them are tensors.
ARGUMENTS = (
    *("hidden", "weight", "targets", "bias", "mask"),
    *("numbers", "wanted", "rows", "backend", "compute"),
)
TENSORS = 5


def block_rows(hidden: Tensor, weight: Tensor, chunk: int | tuple[int, int] | None) -> int | None:
    """Rows of a block, or None where there is no gradient to collect, or four products are the better choice.

    A gradient in half precision would need a float32 accumulator of twice its size beside it, from
    the forward pass on. And a caller who gives a tile's columns has set a limit to the memory.
    """
    operand = operand_dtype(compute_dtype(hidden, weight), hidden.device)
    trainable = torch.is_grad_enabled() and weight.requires_grad
    if not trainable or weight.dtype != result_dtype(operand) or isinstance(chunk, tuple):
        return None
    planned = plan_kept_rows(weight.shape[0], device_type=hidden.device.type, itemsize=operand.itemsize)
    return planned if planned is None or chunk is None else chunk


def summed_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (...)
    bias: Tensor | None,
    mask: Tensor,  # (...)
    *,
    softcap: float | None,
    logit_scale: float,
    rows: int,  # of a block
    backend: str | None,
) -> Tensor:
    """Sum of the log-probabilities of the rows that the mask keeps, where :func:`block_rows` gives ``rows``."""
    flat = hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1).long(), bias, mask.reshape(-1)
    numbers = [float(logit_scale), float(softcap or 0.0)]
    wanted = [hidden.requires_grad, bias is not None and bias.requires_grad]
    arguments = (*flat, numbers, wanted, rows, backend, compute_dtype(hidden, weight))
    if torch.compiler.is_compiling():
        return summed_logprobs_op(*arguments)[0]
    return _InPlace.apply(*arguments)


@torch.library.custom_op("memhead::summed_logprobs", mutates_args=())
def summed_logprobs_op(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    mask: Tensor,  # (N,) bool
    numbers: list[float],  # logit_scale, softcap
    wanted: list[bool],  # the gradients of hidden and of bias
    rows: int,  # of a block
    backend: str | None,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of the rows' log-probabilities, and its gradients of weight (V, H) and bias (V,).

    That of hidden comes as the direction (N, H) and its coefficient (N,), see
    :func:`memhead.backends.torch.finish_direction`. What is not wanted is empty.
    """
    hidden_grad, bias_grad = wanted
    logit_scale, softcap = numbers
    spec = FoldSpec(logit_scale, softcap, temperature=1.0)
    with torch.autocast(hidden.device.type, enabled=False):
        kept = kept_rows(mask)
        x, t = select(kept, hidden, targets)
        check_targets_in_vocabulary(t, weight.shape[0])
        settings = Settings(spec, rows, backend, compute)
        work = Problem(hidden, DenseWeight(weight), targets, bias, mask, None, settings).work(x, t, None)

        def sweep(work: Work) -> tuple[HeadGradients, Rows, Tensor | None]:
            gradients = HeadGradients(work, by_bias=bias_grad)
            return gradients, *forward_sweep(work, direction=hidden_grad, gradients=gradients)

        gradients, results, direction = in_smaller_tiles(work, Work.halved, sweep)
        nothing = hidden.new_empty(0)
        by_bias = gradients.by_bias
        return (
            results.logprobs.sum(),
            put_back(kept, work.coefficient(results.logprobs), len(hidden)),
            nothing if direction is None else put_back(kept, direction, len(hidden)),
            gradients.by_weight,
            nothing.clone() if by_bias is None or bias is None else by_bias.to(bias.dtype),
        )


@summed_logprobs_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, mask: Tensor, *plain: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, (hidden_grad, bias_grad), _, _, compute = plain
    dtype = result_dtype(operand_dtype(compute, hidden.device))
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(hidden.shape[0], dtype=dtype),
        hidden.new_empty(hidden.shape if hidden_grad else (0,)),
        weight.new_empty(weight.shape, dtype=dtype),
        hidden.new_empty(0) if not bias_grad or bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[ARGUMENTS.index("mask")], *output[1:])


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return _by_argument(ctx)
    mask, coefficient, direction, by_weight, by_bias = ctx.saved_tensors
    upstream = _upstream(upstream, mask)
    return _by_argument(
        ctx,
        hidden=_by_hidden(ctx, direction, coefficient, upstream),
        weight=by_weight * upstream,
        bias=(by_bias * upstream).to(by_bias.dtype),
    )


summed_logprobs_op.register_autograd(_backward, setup_context=_setup_context)


class _InPlace(torch.autograd.Function):
    """The operator without a compiler: its backward pass scales the weight's gradient in place.

    So there is never a second tensor of that size. The first backward pass hands the gradient out;
    another one, through a retained graph, computes it again.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        total, *collected = summed_logprobs_op(*arguments)
        ctx.plain, ctx.handed_out = arguments[TENSORS:], False
        ctx.save_for_backward(*arguments[:TENSORS], *collected)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, coefficient, direction, by_weight, by_bias = ctx.saved_tensors
        if ctx.handed_out:
            *_, by_weight, by_bias = summed_logprobs_op(*tensors, *ctx.plain)
        ctx.handed_out = True
        upstream = _upstream(upstream, tensors[ARGUMENTS.index("mask")])
        return _by_argument(
            ctx,
            hidden=_by_hidden(ctx, direction, coefficient, upstream),
            # A saved tensor must not be seen to change; .data is the same memory with its own version counter.
            weight=by_weight.data.mul_(upstream),
            bias=by_bias.data.mul_(upstream),
        )


def _upstream(upstream: Tensor, mask: Tensor) -> Tensor:
    """The scalar upstream gradient; that of a mean over no rows is NaN, and reaches no row."""
    check_differentiated_once()
    return torch.where(mask.any(), upstream, 0.0)


def _by_hidden(ctx: Any, direction: Tensor, coefficient: Tensor, upstream: Tensor) -> Tensor | None:
    """(N, H), written at once in hidden's dtype; None if not needed."""
    if not ctx.needs_input_grad[ARGUMENTS.index("hidden")]:
        return None
    return torch.mul(direction, (coefficient * upstream)[:, None], out=torch.empty_like(direction))


def _by_argument(ctx: Any, **gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """A gradient for each of the operator's arguments, None if not needed."""
    needed = zip(ARGUMENTS, ctx.needs_input_grad, strict=True)
    return tuple(gradients.get(name) if need else None for name, need in needed)
