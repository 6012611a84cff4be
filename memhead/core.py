"""The contract that every head keeps: score rows, then compute their gradients from what scoring saved.

    rows, saved = score(problem, direction=True)
    by = gradients(problem, saved, grad_logprobs, grad_entropy, Needs(hidden=True))

:mod:`memhead.ops` (a weight that is a tensor, with or without LoRA), :mod:`memhead.parallel` (one that
is split over processes) and :mod:`memhead.integrations.bitsandbytes` (a quantised one) differ in their
:class:`Problem` and in how they register with autograd; what is computed, down to the bits, is defined here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memhead.arguments import Settings
from memhead.backends import get_backend
from memhead.checks import check_differentiated_once, check_targets_in_vocabulary, check_temperatures
from memhead.masking import KeptRows, Part, known_part, select
from memhead.planning import resolve_chunk, unasked_rows
from memhead.products import operand_dtype, result_dtype
from memhead.shortage import in_smaller_tiles
from memhead.statistics import UNSET, Rows, Upstream, one_minus_p
from memhead.sweep import LEAST_ROWS, Work, backward_sweep, forward_sweep
from memhead.weights import Weight

Merge = Callable[[Tensor, Tensor | None], None]


class Problem(NamedTuple):
    """A head and the rows to score, as the caller has them; nothing is planned or checked yet."""

    hidden: Tensor  # (N, H)
    weight: Weight  # (V, H)
    targets: Tensor  # (N,) int64, numbers in the whole vocabulary
    bias: Tensor | None  # (V,)
    mask: Tensor | None  # (N,) bool
    temperature: Tensor | None  # (N,) of the results' dtype; None: the same for all, in settings
    settings: Settings
    first: int = 0  # where the weight's rows begin in the whole vocabulary, other processes' included
    total: int | None = None  # how many rows the whole vocabulary has; None: V

    @property
    def vocab_size(self) -> int:
        """Size of the whole vocabulary, other processes' parts included."""
        return self.weight.shape[0] if self.total is None else self.total

    def work(self, hidden: Tensor, targets: Tensor, temperature: Tensor | None) -> Work:
        """The work for these rows of the problem, (R, H), (R,) and (R,): chooses tile and backend."""
        spec, chunk, backend, compute = self.settings
        operand = operand_dtype(compute, hidden.device)
        module = get_backend(backend, hidden.device, result_dtype(operand))
        features = operand, hidden.shape[1], hidden.device
        size = resolve_chunk(
            chunk,
            hidden.shape[0],
            self.weight.shape[0],
            hidden.device,
            module.tile_dtype(*features).itemsize,
            widen=module.fuses(*features),
        )
        size = size._replace(columns=module.tile_columns(size.columns, self.weight.shape[0], *features))
        if self.first:
            targets = targets - self.first
        return Work(
            hidden, self.weight, targets, self.bias, temperature, spec, size, module, compute, self.vocab_size
        )


class Saved(NamedTuple):
    """What the backward pass needs from the forward; shares no memory with the results, which a caller may change."""

    logprobs: Tensor  # (N,)
    entropy: Tensor  # (N,), empty if not wanted
    lse_others: Tensor  # (N,)
    direction: Tensor  # (N, H), empty if not wanted
    kept: Tensor  # (1,) on the CPU, if there is a mask: see masking.KeptRows.count


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    update: bool = False
    bias: bool = False


class Gradients(NamedTuple):
    """The gradients that are wanted; None, too, where one is zero throughout."""

    hidden: Tensor | None = None  # (N, H)
    weight: Tensor | None = None  # (V, H)
    update: Tensor | None = None  # (V, r)
    bias: Tensor | None = None  # (V,)


def score(problem: Problem, *, direction: bool, merge: Merge | None = None) -> tuple[Rows, Saved]:
    """Per-row results (N,), 0 where the mask leaves a row out, and what :func:`gradients` needs later.

    Args:
        direction: also compute the direction of hidden's gradient, at the price of one more product.
        merge: see :func:`memhead.sweep.forward_sweep`.

    Raises:
        ValueError: a target outside the vocabulary, or a temperature that is not positive.
    """
    hidden, mask, spec = problem.hidden, problem.mask, problem.settings.spec
    # Planned for the whole vocabulary, so that all processes that share it work on the same parts.
    unasked = unasked_rows(problem.vocab_size, hidden.shape[1], device_type=hidden.device.type)
    kept = KeptRows(mask, unasked)
    wanted = (True, *spec.wanted, True, direction)
    results: list[Any] = [None] * len(wanted)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in kept.parts():
            x, targets = part.take(hidden), part.take(problem.targets)
            temperature = part.take(problem.temperature, blank=1)
            check_targets_in_vocabulary(targets, problem.vocab_size)
            check_temperatures(temperature)
            num_rows = len(x)
            if x.device.type == "cpu" and 0 < num_rows < LEAST_ROWS and problem.settings.chunk is None:
                padding = torch.arange(LEAST_ROWS).clamp_max(num_rows - 1)
                x, targets, temperature = select(padding, x, targets, temperature)
            place = part.place(results[-1]) if len(x) == num_rows else None
            sweep = partial(forward_sweep, direction=direction, out=place, merge=merge)
            work = problem.work(x, targets, temperature)
            # What is merged by several processes cannot be repeated by one of them.
            rows, out = in_smaller_tiles(work, Work.halved, sweep) if merge is None else sweep(work)
            out = hidden.new_empty(0) if out is None else out
            results = [
                part.put(_first(y, num_rows), len(hidden), into) if want else y
                for y, want, into in zip((*rows, out), wanted, results, strict=True)
            ]
    *values, directions = results
    found = Rows(*values)
    num_kept = hidden.new_empty(0) if mask is None else torch.tensor([kept.count])
    return found, Saved(found.logprobs.clone(), found.entropy.clone(), found.lse_others, directions, num_kept)


def _first(results: Tensor, num_rows: int) -> Tensor:
    """The first rows of (R, *), in their own memory: autograd forbids changing a result that is a view."""
    return results if len(results) == num_rows else results[:num_rows].clone()


def recompute(
    problem: Problem,
    saved: Saved,
    grad_logprobs: Tensor,  # (N,) by the target's logit: times logit_scale / T, 0 where the mask is false
    grad_entropy: Tensor | None,  # likewise
    needs: Needs,
    hidden_dtype: torch.dtype,
) -> Gradients:
    """The part of :func:`gradients` that recomputes the logits."""
    hidden, mask = problem.hidden, problem.mask
    parts = tuple(p for p, need in zip(problem.weight.parts, (needs.weight, needs.update)) if need)
    with torch.autocast(hidden.device.type, enabled=False):
        part = Part() if mask is None else known_part(mask, int(saved.kept))
        entropy = None if grad_entropy is None else saved.entropy
        values = [part.take(y) for y in (grad_logprobs, grad_entropy, saved.logprobs, entropy)]
        # A blank row's logits may be those of a bias: exp(z - lse_others) must not be infinite.
        values.append(part.take(saved.lse_others, blank=-UNSET))
        rows = part.take(hidden), part.take(problem.targets), part.take(problem.temperature, blank=1)
        sweep = partial(
            backward_sweep,
            upstream=Upstream(*values),
            hidden_dtype=hidden_dtype if needs.hidden else None,
            weight_parts=parts,
            bias_grad=needs.bias,
        )
        by_hidden, by_parts, by_bias = in_smaller_tiles(problem.work(*rows), Work.halved, sweep)
    return Gradients(
        None if by_hidden is None else part.put(by_hidden, len(hidden), None),
        by_parts.pop(0) if needs.weight else None,
        by_parts.pop(0) if needs.update else None,
        None if by_bias is None or problem.bias is None else by_bias.to(problem.bias.dtype),
    )


def gradients(
    problem: Problem,
    saved: Saved,
    grad_logprobs: Tensor | None,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    needs: Needs,
    *,
    recompute: Callable[..., Gradients] = recompute,
    hidden_dtype: torch.dtype | None = None,
) -> Gradients:
    """Gradients from those of the rows that :func:`score` returned, each in its tensor's dtype.

    Hidden's is the saved direction, scaled, unless the entropy has a gradient too. For that, and for
    the gradients of all other tensors, the logits are recomputed once.

    Args:
        recompute: replaces :func:`recompute`, by an operator that is opaque to a compiler.
        hidden_dtype: of hidden's gradient; ``None`` is hidden's own.
    """
    check_differentiated_once()
    hidden, spec = problem.hidden, problem.settings.spec
    hidden_dtype = hidden.dtype if hidden_dtype is None else hidden_dtype
    by_logprobs = _by_logits(problem, grad_logprobs)
    by_entropy = _by_logits(problem, grad_entropy) if spec.entropy else None
    scaled = needs.hidden and by_entropy is None and saved.direction.numel() > 0
    found, swept = Gradients(), needs._replace(hidden=needs.hidden and not scaled)
    if any(swept):
        upstream = torch.zeros_like(saved.logprobs) if by_logprobs is None else by_logprobs
        found = recompute(problem, saved, upstream, by_entropy, swept, hidden_dtype)
    if scaled and by_logprobs is not None:
        coefficient = by_logprobs * one_minus_p(saved.logprobs)  # (N,)
        # Written at once in the gradient's dtype: no float32 copy of (N, H) where that is a half.
        by_hidden = torch.empty_like(saved.direction, dtype=hidden_dtype)
        torch.mul(saved.direction, coefficient[:, None], out=by_hidden)
        found = found._replace(hidden=by_hidden)
    return found


def _by_logits(problem: Problem, grad: Tensor | None) -> Tensor | None:
    """An upstream gradient (N,) times logit_scale / temperature; 0 where the mask is false."""
    if grad is None:
        return None
    grad = grad * problem.settings.spec.slope(problem.temperature)
    # where, not a product: a masked row may have met NaN upstream
    return grad if problem.mask is None else torch.where(problem.mask, grad, 0.0)


class Call(NamedTuple):
    """A head that is not a torch operator: how its problem is made, and what its processes do together."""

    problem: Callable[[Tensor, Tensor | None, Tensor | None], Problem]  # of hidden, weight and bias
    direction: bool
    merge: Merge | None = None
    # adds the other processes' gradients of hidden (N, H), in place
    add_up: Callable[[Tensor], Any] | None = None


def score_with_autograd(
    call: Call, hidden: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """The first five of :func:`score`'s Rows, with :func:`gradients` for a backward pass.

    A weight that is not a tensor is passed as ``None``.
    """
    return _Score.apply(call, hidden, weight, bias)  # type: ignore[no-any-return]


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, hidden: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        rows, saved = score(call.problem(hidden, weight, bias), direction=call.direction, merge=call.merge)
        logprobs, entropy, *metrics, _ = rows
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, *saved)
        ctx.mark_non_differentiable(*metrics)
        return logprobs, entropy, *metrics

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *others = ctx.saved_tensors
        call, saved = ctx.call, Saved(*others)
        _, by_hidden, by_weight, by_bias = ctx.needs_input_grad
        found = gradients(
            call.problem(hidden, weight, bias),
            saved,
            grad_logprobs,
            grad_entropy,
            Needs(hidden=by_hidden, weight=by_weight, bias=by_bias),
            # Summed wide, rounded once.
            hidden_dtype=None if call.add_up is None else saved.logprobs.dtype,
        )
        hidden_grad = found.hidden
        if hidden_grad is not None and call.add_up is not None:
            call.add_up(hidden_grad)
            hidden_grad = hidden_grad.to(hidden.dtype)
        return None, hidden_grad, found.weight, found.bias
