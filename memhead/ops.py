"""The sweeps as torch operators, so that autograd and ``torch.compile`` see one opaque step each.

Only tensors and plain numbers cross an operator's border; inside, the loop over tiles is ordinary
Python, which a compiler neither unrolls nor specialises for a number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memhead.arguments import OUTPUTS
from memhead.backends import get_backend
from memhead.checks import check_differentiated_once, check_targets_in_vocabulary, check_temperatures
from memhead.masking import KeptRows, Part, known_part, select
from memhead.planning import resolve_chunk, unasked_rows
from memhead.products import operand_dtype, result_dtype
from memhead.statistics import UNSET, FoldSpec, Upstream, one_minus_p
from memhead.sweep import LEAST_ROWS, Problem, WeightPart, backward_sweep, forward_sweep
from memhead.weights import DenseWeight, LowRankWeight, Weight


def make_problem(
    hidden: Tensor,
    weight: Weight,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    spec: FoldSpec,
    chunk: list[int],
    backend: str | None,
    compute: torch.dtype,
) -> Problem:
    """Choose tile and backend for ``hidden`` (N, H); ``chunk`` is [], [rows] or [rows, columns]."""
    wanted = None if not chunk else chunk[0] if len(chunk) == 1 else (chunk[0], chunk[1])
    operand = operand_dtype(compute, hidden.device)
    module = get_backend(backend, hidden.device, result_dtype(operand))
    features = operand, hidden.shape[1], hidden.device
    itemsize = module.tile_dtype(*features).itemsize
    widen = module.fuses(*features)
    size = resolve_chunk(wanted, hidden.shape[0], weight.shape[0], hidden.device, itemsize, widen=widen)
    size = size._replace(columns=module.tile_columns(size.columns, weight.shape[0], *features))
    return Problem(hidden, weight, targets, bias, temperature, spec, size, module, compute)


def _problem(
    hidden: Tensor,
    weight: Tensor,
    update: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    row_temperature: Tensor | None,
    numbers: list[float],
    outputs: list[bool],
    chunk: list[int],
    backend: str | None,
    compute: torch.dtype,
) -> Problem:
    head: Weight = DenseWeight(weight) if update is None else LowRankWeight(DenseWeight(weight), update)
    spec = FoldSpec(*numbers, *outputs)  # type: ignore[arg-type]
    return make_problem(hidden, head, targets, bias, row_temperature, spec, chunk, backend, compute)


@torch.library.custom_op("memhead::logprobs", mutates_args=())
def logprobs_op(
    hidden: Tensor,  # (N, H), or (N, H + r) with an update
    weight: Tensor,  # (V, H)
    update: Tensor | None,  # (V, r)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    mask: Tensor | None,  # (N,) bool
    row_temperature: Tensor | None,  # (N,) float32
    numbers: list[float],  # logit_scale, softcap, temperature
    outputs: list[bool],  # which of OUTPUTS
    direction: bool,
    chunk: list[int],
    backend: str | None,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1, lse_others, direction), see statistics.Rows.

    And, beside a mask, how many rows it keeps as far as that is known, see masking.KeptRows: (1,), on the CPU.
    """
    kept = KeptRows(mask, unasked_rows(*weight.shape, device_type=hidden.device.type))
    wanted = (True, *outputs, True, direction)
    results: list[Tensor | None] = [None] * len(wanted)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in kept.parts():
            x, t = part.take(hidden), part.take(targets)
            temperature = part.take(row_temperature, blank=1)
            check_targets_in_vocabulary(t, weight.shape[0])
            check_temperatures(temperature)
            num_rows = len(x)
            if x.device.type == "cpu" and 0 < num_rows < LEAST_ROWS and not chunk:
                padding = torch.arange(LEAST_ROWS).clamp_max(num_rows - 1)
                x, t, temperature = select(padding, x, t, temperature)
            problem = _problem(
                x, weight, update, t, bias, temperature, numbers, outputs, chunk, backend, compute
            )
            place = part.place(results[-1]) if len(x) == num_rows else None
            rows, out = forward_sweep(problem, direction=direction, out=place)
            out = hidden.new_empty(0) if out is None else out
            results = [
                part.put(y[:num_rows], len(hidden), into) if want else y
                for y, want, into in zip((*rows, out), wanted, results, strict=True)
            ]
    count = hidden.new_empty(0) if mask is None else torch.tensor([kept.count])
    return (*results, count)  # type: ignore[return-value]


@logprobs_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    update: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    numbers: list[float],
    outputs: list[bool],
    direction: bool,
    chunk: list[int],
    backend: str | None,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows = hidden.shape[0]
    dtype = result_dtype(operand_dtype(compute, hidden.device))
    optional = [hidden.new_empty(num_rows if wanted else 0, dtype=dtype) for wanted in outputs]
    entropy, log_sum_sq_probs, mean_logits, is_top1 = optional
    return (
        hidden.new_empty(num_rows, dtype=dtype),
        entropy,
        log_sum_sq_probs,
        mean_logits,
        is_top1.new_empty(is_top1.shape, dtype=torch.bool),
        hidden.new_empty(num_rows, dtype=dtype),
        hidden.new_empty(hidden.shape if direction else (0,)),
        hidden.new_empty(0) if mask is None else torch.empty(1, dtype=torch.int64),
    )


@torch.library.custom_op("memhead::logprobs_backward", mutates_args=())
def logprobs_backward_op(
    hidden: Tensor,
    weight: Tensor,
    update: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    grad_logprobs: Tensor,  # (N,) times logit_scale / T
    grad_entropy: Tensor | None,  # likewise
    logprobs: Tensor,
    entropy: Tensor | None,
    lse_others: Tensor,
    count: Tensor,  # what logprobs_op gave
    numbers: list[float],
    wanted: list[bool],  # gradients by hidden, weight, update, bias
    chunk: list[int],
    backend: str | None,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by hidden, weight, update and bias, by recomputing the logits; unwanted ones are empty."""
    hidden_grad, weight_grad, update_grad, bias_grad = wanted
    features = weight.shape[1]
    parts = []
    if weight_grad:
        parts.append(WeightPart(slice(0, features), weight.dtype))
    if update_grad and update is not None:
        parts.append(WeightPart(slice(features, features + update.shape[1]), update.dtype))
    with torch.autocast(hidden.device.type, enabled=False):
        part = Part() if mask is None else known_part(mask, int(count))
        x, t, temperature = part.take(hidden), part.take(targets), part.take(row_temperature, blank=1)
        values = [part.take(y) for y in (grad_logprobs, grad_entropy, logprobs, entropy)]
        # A blank row's logits may be those of a bias: exp(z - lse_others) must not be infinite.
        values.append(part.take(lse_others, blank=-UNSET))
        nothing = [False] * len(OUTPUTS)
        problem = _problem(x, weight, update, t, bias, temperature, numbers, nothing, chunk, backend, compute)
        by_hidden, by_parts, by_bias = backward_sweep(
            problem,
            Upstream(*values),
            hidden_grad=hidden_grad,
            weight_parts=tuple(parts),
            bias_grad=bias_grad,
        )
    by_weight = by_parts.pop(0) if weight_grad else hidden.new_empty(0)
    by_update = by_parts.pop(0) if by_parts else hidden.new_empty(0)
    by_bias = hidden.new_empty(0) if by_bias is None or bias is None else by_bias.to(bias.dtype)
    by_hidden = hidden.new_empty(0) if by_hidden is None else part.put(by_hidden, len(hidden), None)
    return by_hidden, by_weight, by_update, by_bias


@logprobs_backward_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    update: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor | None,
    lse_others: Tensor,
    count: Tensor,
    numbers: list[float],
    wanted: list[bool],
    chunk: list[int],
    backend: str | None,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (hidden, weight, update, bias)
    return tuple(  # type: ignore[return-value]
        x.new_empty(x.shape) if want and x is not None else hidden.new_empty(0)
        for x, want in zip(tensors, wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, update, targets, bias, mask, row_temperature, numbers, _, _, chunk, backend, compute = (
        inputs
    )
    logprobs, entropy, _, _, _, lse_others, direction, count = output
    ctx.set_materialize_grads(False)
    ctx.settings = (numbers, chunk, backend, compute)
    ctx.save_for_backward(
        *(hidden, weight, update, targets, bias, mask, row_temperature),
        *(logprobs, entropy, lse_others, direction, count),
    )


def _backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    check_differentiated_once()
    hidden, weight, update, targets, bias, mask, row_temperature, *results = ctx.saved_tensors
    logprobs, entropy, lse_others, direction, count = results
    numbers, chunk, backend, compute = ctx.settings
    by_hidden, by_weight, by_update, by_bias = (ctx.needs_input_grad[i] for i in (0, 1, 2, 4))
    factor = FoldSpec(*numbers, *[False] * len(OUTPUTS)).slope(row_temperature)

    def upstream(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        # where, not a product: a masked row may have met NaN upstream
        grad = grad * factor
        return grad if mask is None else torch.where(mask, grad, 0.0)

    grad_logprobs, grad_entropy = upstream(grad_logprobs), upstream(grad_entropy)
    if entropy.numel() == 0:
        grad_entropy = None
    recompute = by_weight or by_update or by_bias or grad_entropy is not None or not direction.numel()
    grads: tuple[Tensor | None, ...] = (None, None, None, None)
    if recompute:
        zeros = torch.zeros_like(logprobs)
        computed = logprobs_backward_op(
            hidden,
            weight,
            update,
            targets,
            bias,
            mask,
            row_temperature,
            zeros if grad_logprobs is None else grad_logprobs,
            grad_entropy,
            logprobs,
            entropy if grad_entropy is not None else None,
            lse_others,
            count,
            numbers,
            [
                by_hidden and (grad_entropy is not None or not direction.numel()),
                by_weight,
                by_update,
                by_bias,
            ],
            chunk,
            backend,
            compute,
        )
        grads = tuple(grad if grad.numel() else None for grad in computed)
    hidden_grad, weight_grad, update_grad, bias_grad = grads
    if by_hidden and hidden_grad is None and grad_logprobs is not None:
        coefficient = grad_logprobs * one_minus_p(logprobs)  # (N,)
        # Written at once in hidden's dtype: no float32 copy of (N, H) where that is a half.
        hidden_grad = torch.mul(direction, coefficient[:, None], out=torch.empty_like(direction))
    return hidden_grad, weight_grad, update_grad, None, bias_grad, *[None] * 8


logprobs_op.register_autograd(_backward, setup_context=_setup_context)
