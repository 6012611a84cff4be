"""Any row-wise loss of the head's logits, one chunk of rows at a time.

A loss that works row by row has, in one chunk of rows, everything its gradient needs. So while the
chunk's logits exist, autograd runs through the transform, and the gradient of the logits is turned
into those of hidden, weight and bias at once; the backward pass only multiplies by the upstream
gradient. Two products for a frozen head, three for a trainable one, and nothing is derived by hand.

With ``reduction="none"`` each row has an upstream gradient of its own. What belongs to a row is
scaled by it; what rows share (weight, bias, a module's parameters) is recomputed in the backward.

The caller's function cannot be an argument of a torch operator, and a compiler that traced it would
unroll the loop over chunks, again for every number of rows. So under ``torch.compile``
:func:`chunked_linear` breaks the graph once and runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memhead import checks
from memhead.arguments import compute_dtype
from memhead.planning import default_tile, plan_rows
from memhead.products import add_product, as_operand, operand_dtype, product, result_dtype
from memhead.shortage import in_smaller_tiles
from memhead.sweep import blocks

REDUCTIONS = ("mean", "sum", "none")


class Settings(NamedTuple):
    """Everything about a call that is not a tensor."""

    transform: Callable[..., Tensor]
    reduction: str
    rows: int  # of a chunk
    num_row_args: int
    compute: torch.dtype
    autocast: tuple[str, torch.dtype, bool]  # device type, dtype, enabled: as it was around the call
    refuse_captured: bool


@torch.compiler.disable(reason="memhead.chunked_linear runs a function of the caller's chunk by chunk")
def chunked_linear(
    hidden: Tensor,
    weight: Tensor,
    transform: Callable[..., Tensor],
    *row_args: Tensor,
    bias: Tensor | None = None,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """``transform(hidden @ weight.T + bias, *row_args)``, reduced, without ever holding all logits.

    Args:
        hidden: (..., H), floating point.
        weight: (V, H), floating point.
        transform: ``transform(logits (R, V), *rows of row_args) -> (R,)``, treating each row by
            itself; a function, or a module whose parameters get their gradients. The logits are
            float32 (float64 for float64 inputs) and must not be changed in place.
        row_args: tensors (..., *) with hidden's leading dimensions: targets, a teacher's hidden
            states, weights of the rows. Those that require a gradient get it.
        bias: (V,).
        reduction: "mean" (over all rows; NaN if there are none), "sum", or "none". With "none" and
            a trainable weight, bias or module the transform runs twice and must be deterministic.
        chunk: rows of a chunk; ``None`` plans it (:func:`memhead.planning.plan_rows`).

    Returns:
        A scalar, or the losses (...), in the logits' dtype. Differentiable once, with respect to
        hidden, weight, bias, row_args and the parameters of a module. Until the backward pass a
        trainable weight's gradient (V, H) is held in the logits' dtype. Under ``torch.compile`` the
        call breaks the graph; ``fullgraph=True`` refuses it.

    Raises:
        ValueError: arguments that do not fit together, a transform that does not return one value
            per row, or one that captures a tensor whose gradient would be lost.
    """
    checks.check_head(hidden, weight, None, bias)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}")
    checks.check_row_chunk(chunk)
    lead, num_rows = hidden.shape[:-1], hidden.shape[:-1].numel()
    for i, arg in enumerate(row_args):
        checks.check_row_arg(f"row_args[{i}]", arg, hidden)
    compute = compute_dtype(hidden, weight)
    logit_bytes = result_dtype(operand_dtype(compute, hidden.device)).itemsize
    planned = plan_rows(
        num_rows,
        weight.shape[0],
        device_type=hidden.device.type,
        itemsize=logit_bytes,
        trained=torch.is_grad_enabled() and weight.requires_grad,
    )
    device = hidden.device.type
    settings = Settings(
        transform,
        reduction,
        planned if chunk is None else max(1, min(chunk, num_rows)),
        len(row_args),
        compute,
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)),
        torch.is_grad_enabled(),
    )
    parameters = tuple(transform.parameters()) if isinstance(transform, nn.Module) else ()
    tensors = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        *(arg.reshape(num_rows, *arg.shape[len(lead) :]) for arg in row_args),
        *parameters,
    )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        losses = _ChunkedLinear.apply(settings, *tensors)
    else:
        losses = _reduce(_sweep(settings, tensors, (False,) * len(tensors), None)[0], reduction)
    return losses.reshape(lead) if reduction == "none" else losses


class _ChunkedLinear(torch.autograd.Function):
    """Tensors in order: hidden (N, H), weight (V, H), bias (V,) or None, row_args (N, *), parameters."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None) -> Tensor:
        needs = ctx.needs_input_grad[1:]
        shared = any(need for i, need in enumerate(needs) if not _is_per_row(i, settings))
        ctx.settings, ctx.recompute = settings, settings.reduction == "none" and shared
        wanted = (False,) * len(needs) if ctx.recompute else needs
        losses, grads = _sweep(settings, tensors, wanted, None)
        ctx.dtypes = [None if x is None else x.dtype for x in tensors]
        ctx.num_rows = len(losses)
        ctx.save_for_backward(*(tensors if ctx.recompute else grads))
        return _reduce(losses, settings.reduction)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        checks.check_differentiated_once()
        settings: Settings = ctx.settings
        factor: Tensor | None = upstream
        grads = ctx.saved_tensors  # read once: non-reentrant checkpointing allows no second read
        if settings.reduction == "mean":
            factor = upstream / max(1, ctx.num_rows)
        if not ctx.num_rows:  # upstream is infinite where the caller divides by the number of rows
            factor = torch.zeros_like(upstream)
        if ctx.recompute:
            grads = _sweep(settings, grads, ctx.needs_input_grad[1:], upstream)[1]
            factor = None
        scaled = [
            None if grad is None else _scale(grad, factor, dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return None, *scaled


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _is_per_row(index: int, settings: Settings) -> bool:
    """Whether a tensor of :class:`_ChunkedLinear` has an entry for each row."""
    return index == 0 or 3 <= index < 3 + settings.num_row_args


def _scale(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``grad * factor`` in ``dtype``; a factor (N,) holds one number for each row of grad.

    Block by block, because the wide product would be a second buffer of the weight's size.
    """
    if factor is None:
        return grad.to(dtype)
    # The product is taken in float32: float16 ends at 65504, where a gradient scaler starts.
    wide = torch.promote_types(grad.dtype, factor.dtype)
    if grad.dim() == 0:
        return (grad.to(wide) * factor).to(dtype)
    out = torch.empty_like(grad, dtype=dtype)
    for part in blocks(len(grad), 512):
        f = factor[part].reshape(-1, *[1] * (grad.dim() - 1)) if factor.dim() else factor
        out[part] = grad[part].to(wide) * f
    return out


def _sweep(
    settings: Settings, tensors: tuple[Tensor | None, ...], needs: tuple[bool, ...], upstream: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """:func:`_pass`, in chunks of as many rows as there is memory for."""
    return in_smaller_tiles(
        settings,
        lambda s: s._replace(rows=s.rows // 2) if s.rows > 1 else None,
        lambda s: _pass(s, tensors, needs, upstream),
    )


def _pass(
    settings: Settings, tensors: tuple[Tensor | None, ...], needs: tuple[bool, ...], upstream: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Losses (N,) and the gradients needed, of their sum weighted by ``upstream`` (N,) (None: ones).

    Gradients of hidden and row_args come in their dtypes, shared ones in float32 at least.
    """
    hidden, weight, bias, *others = tensors
    assert hidden is not None
    assert weight is not None
    operand = operand_dtype(settings.compute, hidden.device)
    result = result_dtype(operand)
    losses = hidden.new_empty(len(hidden), dtype=result)
    grads = [
        None if x is None or not need else torch.zeros_like(x, dtype=_grad_dtype(i, x, settings, result))
        for i, (x, need) in enumerate(zip(tensors, needs, strict=True))
    ]
    buffer = hidden.new_empty((settings.rows, weight.shape[0]), dtype=result)
    acc = hidden.new_empty((settings.rows, hidden.shape[1]), dtype=result) if needs[0] else None
    for rows in blocks(len(hidden), settings.rows):
        x = as_operand(hidden[rows], settings.compute)  # (R, H)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = fill_logits(x, weight, bias, settings.compute, buffer[: len(x)])  # (R, V)
        inside = _leaves(others, rows, settings.num_row_args)
        by_logits, *by_others = _through_transform(
            settings,
            [logits.detach(), *inside],
            (any(needs[:3]), *needs[3:]),
            losses[rows],
            None if upstream is None else upstream[rows],
            check=settings.refuse_captured and rows.start == 0,
        )
        for i, grad in enumerate(by_others, start=3):
            total = grads[i]
            if grad is not None and total is not None:
                (total[rows] if _is_per_row(i, settings) else total).add_(grad)
        if by_logits is None:
            continue
        with torch.autocast(hidden.device.type, enabled=False):
            by_hidden = _fold_gradient(by_logits, x, weight, settings.compute, grads[1], grads[2], acc)
        if grads[0] is not None and by_hidden is not None:
            grads[0][rows] = by_hidden
        del by_logits  # freed before the next chunk makes its own
    return losses, grads


def _grad_dtype(index: int, tensor: Tensor, settings: Settings, result: torch.dtype) -> torch.dtype:
    return tensor.dtype if _is_per_row(index, settings) else torch.promote_types(tensor.dtype, result)


def _leaves(others: list[Tensor | None], rows: slice, num_row_args: int) -> list[Tensor]:
    """This chunk's row_args, detached, and the module's parameters as they are."""
    return [x[rows].detach() if i < num_row_args else x for i, x in enumerate(others)]  # type: ignore[index, misc]


def fill_logits(x: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype, out: Tensor) -> Tensor:
    """``x @ weight.T + bias`` into ``out`` (R, V), for x (R, H) as :func:`memhead.products.as_operand` gives it."""
    for columns, w in _weight_tiles(weight, compute):
        if w is weight:
            product(x, w.t(), out)
        else:  # a product only writes to contiguous memory
            out[:, columns] = product(x, w.t(), out.new_empty(len(x), len(w)))
    return out if bias is None else out.add_(bias)


def _weight_tiles(weight: Tensor, compute: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight itself if it already is an operand, else piece by piece, so that no weight-sized copy exists."""
    if weight.dtype == compute == operand_dtype(compute, weight.device):
        yield slice(0, len(weight)), weight
        return
    for columns in blocks(len(weight), default_tile(weight.device.type, 4).columns):
        yield columns, as_operand(weight[columns], compute)


def _through_transform(
    settings: Settings,
    inputs: list[Tensor],  # logits (R, V), row_args (R, *), parameters
    needs: tuple[bool, ...],
    losses: Tensor,  # (R,), written
    upstream: Tensor | None,  # (R,)
    *,
    check: bool,
) -> list[Tensor | None]:
    """Run the transform on a chunk. Returns the gradients of its inputs, None where not needed or not used."""
    device, dtype, enabled = settings.autocast
    row_inputs = inputs[: 1 + settings.num_row_args]
    for x, need in zip(row_inputs, needs):
        x.requires_grad_(need)
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    with torch.set_grad_enabled(bool(wanted) or check), torch.autocast(device, dtype, enabled=enabled):
        values = settings.transform(*row_inputs)
    if not isinstance(values, Tensor) or values.shape != losses.shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"transform returned {got} for {len(losses)} rows of logits; it must return one value per row, "
            f"({len(losses)},): leave the mean or the sum to reduction="
        )
    losses.copy_(values.detach())
    if check:
        _refuse_captured(values, inputs)
    if not values.requires_grad or not wanted:
        return [None] * len(inputs)
    upstream = torch.ones_like(values) if upstream is None else upstream.to(values.dtype)
    found = iter(torch.autograd.grad(values, wanted, upstream, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _refuse_captured(values: Tensor, known: list[Tensor]) -> None:
    """Refuse a transform whose graph ends in a tensor that we do not know: its gradient would be lost."""
    known_ids = {id(x) for x in known}
    pending, seen = [values.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # the leaf, at an end of the graph
        if variable is not None and id(variable) not in known_ids:
            raise ValueError(
                f"transform captures a tensor of shape {tuple(variable.shape)} that requires a gradient, or "
                "one computed from it; its gradient would be lost: pass it in row_args, make it a "
                "parameter of a transform that is a torch.nn.Module, or detach it"
            )
        pending += [following for following, _ in node.next_functions]


def _fold_gradient(
    by_logits: Tensor,  # (R, V)
    x: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    compute: torch.dtype,
    weight_grad: Tensor | None,  # (V, H), added to
    bias_grad: Tensor | None,  # (V,), added to
    acc: Tensor | None,  # at least (R, H), overwritten
) -> Tensor | None:
    """Gradient of hidden (R, H) if ``acc`` is given; those of weight and bias are added to theirs."""
    if bias_grad is not None:
        bias_grad.add_(by_logits.sum(0))
    largest = None
    if x.dtype == torch.float16:
        # Each row is scaled to a maximum of 1, so that a row with a small gradient does not flush to zero.
        largest = by_logits.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # (R, 1)
        by_logits = by_logits / largest
    grad = by_logits.to(x.dtype)
    if weight_grad is not None:
        if largest is None:
            add_product(weight_grad, grad.t(), x, first=False)
        else:
            most = largest.amax()
            x = (x * (largest / most)).to(x.dtype)
            # Tile by tile: no weight-sized temporary.
            for columns in blocks(len(weight), default_tile(x.device.type, 4).columns):
                part = x.new_empty((columns.stop - columns.start, x.shape[1]), dtype=by_logits.dtype)
                weight_grad[columns].addcmul_(product(grad[:, columns].t(), x, part), most)
    if acc is None:
        return None
    acc = acc[: len(x)]
    for columns, w in _weight_tiles(weight, compute):
        add_product(acc, grad[:, columns], w, first=columns.start == 0)
    return acc if largest is None else acc.mul_(largest)
