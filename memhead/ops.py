""":mod:`memhead.core` as torch operators, so that autograd and ``torch.compile`` see one opaque step each.

Only tensors and plain numbers cross an operator's border. Inside, the loop over tiles is ordinary
Python, which a compiler neither unrolls nor specialises for a number of rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memhead import core
from memhead.arguments import Settings
from memhead.core import Gradients, Needs, Problem, Saved
from memhead.products import operand_dtype, result_dtype
from memhead.statistics import FoldSpec
from memhead.weights import DenseWeight, LowRankWeight, Weight

HEAD = (
    "Tensor hidden, Tensor weight, Tensor? update, Tensor targets, Tensor? bias, Tensor? mask, "
    "Tensor? temperature, float[] numbers, bool[] outputs, SymInt[] chunk, str? backend, ScalarType compute"
)
TENSORS = 7  # the first arguments


class Head(NamedTuple):
    """A problem as an operator takes it: tensors and plain numbers, in the order of :data:`HEAD`."""

    hidden: Tensor  # (N, H), or (N, H + r) with an update
    weight: Tensor  # (V, H)
    update: Tensor | None  # (V, r)
    targets: Tensor  # (N,)
    bias: Tensor | None  # (V,)
    mask: Tensor | None  # (N,) bool
    temperature: Tensor | None  # (N,) of the results' dtype
    numbers: list[float]  # logit_scale, softcap, temperature
    outputs: list[bool]  # which of memhead.arguments.OUTPUTS
    chunk: list[int]  # [], [rows] or [rows, columns]
    backend: str | None
    compute: torch.dtype

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        update: Tensor | None,
        targets: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        temperature: Tensor | None,
        settings: Settings,
    ) -> Head:
        """From tensors and the settings that :func:`memhead.arguments.read_arguments` returned."""
        spec, chunk, backend, compute = settings
        tile = [] if chunk is None else [chunk] if isinstance(chunk, int) else list(chunk)
        tensors = hidden, weight, update, targets, bias, mask, temperature
        return Head(*tensors, spec.numbers, spec.wanted, tile, backend, compute)

    @property
    def problem(self) -> Problem:
        """What :mod:`memhead.core` takes."""
        weight: Weight = DenseWeight(self.weight)
        if self.update is not None:
            weight = LowRankWeight(weight, self.update)
        spec = FoldSpec(*self.numbers, *self.outputs)  # type: ignore[arg-type]
        chunk = None if not self.chunk else self.chunk[0] if len(self.chunk) == 1 else tuple(self.chunk)
        settings = Settings(spec, chunk, self.backend, self.compute)  # type: ignore[arg-type]
        rows = self.hidden, weight, self.targets, self.bias, self.mask, self.temperature
        return Problem(*rows, settings)


@torch.library.custom_op(
    "memhead::logprobs",
    mutates_args=(),
    schema=f"({HEAD}, bool direction) -> ({', '.join(['Tensor'] * (5 + len(Saved._fields)))})",
)
def logprobs_op(*arguments: Any) -> tuple[Tensor, ...]:
    """:func:`memhead.core.score`: the first five of its Rows, followed by what it saves."""
    *head, direction = arguments
    rows, saved = core.score(Head(*head).problem, direction=direction)
    return *rows[:5], *saved


@logprobs_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *head, direction = arguments
    hidden, *_, mask, _, _, outputs, _, _, compute = head
    dtype = result_dtype(operand_dtype(compute, hidden.device))

    def rows(wanted: bool, dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(hidden.shape[0] if wanted else 0, dtype=dtype)

    entropy, squares, total, top1 = outputs
    saved = Saved(
        rows(True),
        rows(entropy),
        rows(True),
        hidden.new_empty(hidden.shape if direction else (0,)),
        hidden.new_empty(0) if mask is None else torch.empty(1, dtype=torch.int64),
    )
    return rows(True), rows(entropy), rows(squares), rows(total), rows(top1, torch.bool), *saved


@torch.library.custom_op(
    "memhead::logprobs_backward",
    mutates_args=(),
    schema=f"({HEAD}, Tensor grad_logprobs, Tensor? grad_entropy, Tensor logprobs, Tensor entropy, "
    "Tensor lse_others, Tensor kept, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
)
def logprobs_backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    """:func:`memhead.core.recompute`; gradients that are not needed are empty."""
    head = Head(*arguments[: len(Head._fields)])
    grad_logprobs, grad_entropy, logprobs, entropy, lse_others, kept, needs = arguments[len(head) :]
    saved = Saved(logprobs, entropy, lse_others, head.hidden.new_empty(0), kept)
    found = core.recompute(head.problem, saved, grad_logprobs, grad_entropy, Needs(*needs), head.hidden.dtype)
    return tuple(head.hidden.new_empty(0) if grad is None else grad for grad in found)


@logprobs_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, update, _, bias, *_, needs = arguments
    return tuple(
        x.new_empty(x.shape) if need else hidden.new_empty(0)
        for x, need in zip((hidden, weight, update, bias), needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.plain = inputs[TENSORS : len(Head._fields)]
    ctx.save_for_backward(*inputs[:TENSORS], *output[5:])


def _backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors  # read once: non-reentrant checkpointing allows no second read
    head, saved = Head(*tensors[:TENSORS], *ctx.plain), Saved(*tensors[TENSORS:])
    wanted = dict(zip(Head._fields, ctx.needs_input_grad))
    needs = Needs(*(wanted[name] for name in Needs._fields))

    def recompute(
        problem: Problem, saved: Saved, by_logprobs: Tensor, by_entropy: Tensor | None, needs: Needs, _: Any
    ) -> Gradients:
        logprobs, entropy, lse_others, _, kept = saved
        found = logprobs_backward_op(
            *head, by_logprobs, by_entropy, logprobs, entropy, lse_others, kept, list(needs)
        )
        return Gradients(*(grad if need else None for grad, need in zip(found, needs, strict=True)))

    found = core.gradients(head.problem, saved, grad_logprobs, grad_entropy, needs, recompute=recompute)
    by_argument = dict.fromkeys(Head._fields) | found._asdict()
    return *by_argument.values(), None


logprobs_op.register_autograd(_backward, setup_context=_setup_context)
