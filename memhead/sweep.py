"""The two passes over the vocabulary: one for values, and one, where needed, for gradients.

``forward_sweep`` is all that a frozen head needs. ``backward_sweep`` recomputes the logits once for
what cannot be known before the upstream gradient arrives: the gradients of the weight and the bias,
and that of the entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from memhead.planning import Chunk
from memhead.products import add_product, as_operand, operand_dtype, result_dtype
from memhead.statistics import FoldSpec, Rows, Stat, Tile, Upstream, finish, new_statistics, one_minus_p
from memhead.weights import Weight, WeightPart


class Work(NamedTuple):
    """Rows that are computed together, and how: what :mod:`memhead.core` makes of a problem."""

    hidden: Tensor  # (N, H)
    weight: Weight  # (V, H)
    targets: Tensor  # (N,) int64; outside 0..V-1 only where another process holds the target
    bias: Tensor | None  # (V,)
    temperature: Tensor | None  # (N,)
    spec: FoldSpec
    chunk: Chunk
    backend: ModuleType
    compute: torch.dtype
    vocab_size: int  # of the whole vocabulary, other processes' parts included

    def halved(self) -> Work | None:
        """The same in tiles of half the size; None where there are no smaller ones."""
        chunk = self.chunk.halved()
        return None if chunk is None else self._replace(chunk=chunk)

    def tile(self, rows: slice, columns: slice) -> Tile:
        """What belongs to the raw products of these rows and columns."""
        return Tile(
            self.targets[rows],
            columns.start,
            _slice(self.bias, columns),
            _slice(self.temperature, rows),
            self.spec,
        )

    @property
    def operand(self) -> torch.dtype:
        """dtype in which hidden and weight enter the products."""
        return operand_dtype(self.compute, self.hidden.device)

    @property
    def result(self) -> torch.dtype:
        """dtype of logits, statistics and accumulators."""
        return result_dtype(self.operand)

    def new_buffer(self, tile: Chunk, columns: int | None = None) -> Tensor:
        """Memory for a tile, or for ``columns`` of such tiles in a row, flat; none where a product brings its own."""
        features = self.operand, self.hidden.shape[1], self.hidden.device
        width = self.backend.buffer_columns(*tile, *features)
        if width and columns is not None:
            width = self.backend.buffer_columns(tile.rows, columns, *features)
        return self.hidden.new_empty(tile.rows * width, dtype=self.backend.tile_dtype(*features))

    @property
    def whole_at_once(self) -> bool:
        """Whether a tile without kept exponentials costs no memory, even if it is as wide as the vocabulary."""
        features = self.operand, self.hidden.shape[1], self.hidden.device
        return self.backend.fuses(*features) and self.weight.views(self.operand)

    def coefficient(self, logprobs: Tensor, rows: slice = slice(None)) -> Tensor:
        """(R,): the factor that turns the directions (R, H) of these rows into the gradients of their logprobs."""
        return one_minus_p(logprobs) * self.spec.slope(_slice(self.temperature, rows))


def blocks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``range(total)``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


# A CPU's matrix product runs another kernel for very few rows, one that adds up in another order
# (MKL: fewer than 4 rows a thread). From here on a row's bits do not depend on how many there are.
LEAST_ROWS = 32


def row_blocks(total: int, size: int) -> Iterator[slice]:
    """Like :func:`blocks`, but a last block of very few rows takes some of the one before it."""
    last = total % size
    if total < size or not 0 < last < LEAST_ROWS or size < 2 * LEAST_ROWS:
        yield from blocks(total, size)
        return
    yield from blocks(total - last - LEAST_ROWS, size)
    yield slice(total - last - LEAST_ROWS, total)


class HeadGradients:
    """Gradients of weight and bias for the sum of all log-probabilities, collected in a forward sweep.

    Where every row's upstream gradient is the same number, nothing has to be recomputed for them:
    the exponentials of one block of rows are kept over the whole vocabulary, until its rows are
    complete, and multiplied a second time, with the hidden states. Three products in all.
    """

    def __init__(self, work: Work, *, by_bias: bool) -> None:
        self.work = work
        hidden, vocab_size = work.hidden, work.weight.shape[0]
        # The first block of rows writes it, which saves clearing it.
        self.by_weight = hidden.new_empty(work.weight.shape, dtype=work.result)
        if not len(hidden):
            self.by_weight.zero_()
        self.by_bias = hidden.new_zeros(vocab_size, dtype=work.result) if by_bias else None
        self._buffer = work.new_buffer(work.chunk, vocab_size)
        self._kept: list[tuple[slice, Tensor, Tensor]] = []

    def buffer(self, columns: slice, num_rows: int) -> Tensor:
        """Memory for the tile of these columns, which the tiles after it leave alone; or none, see ``new_buffer``."""
        return self._buffer[columns.start * num_rows :]

    def keep(self, columns: slice, exps: Tensor, stats: Tensor) -> None:
        """A tile (R, C), and the reference that its exponentials were taken against."""
        self._kept.append((columns, exps, stats[Stat.REFERENCE].clone()))

    def fold(self, x: Tensor, stats: Tensor, rows: slice) -> None:
        """Add the contribution of a complete block of rows x (R, H), and forget its tiles."""
        work = self.work
        targets, others = work.targets[rows], stats[Stat.OTHERS]
        logprobs = finish(stats, work.weight.shape[0], work.spec).logprobs
        coefficient = work.coefficient(logprobs, rows)
        of_others = torch.where(others > 0, -coefficient / others, 0.0)  # (R,)
        of_target = coefficient * stats[Stat.SLOPE]
        wide = x.to(work.result)
        scaled = (wide * of_others[:, None]).to(x.dtype)  # (R, H)
        for columns, exps, reference in self._kept:
            factor, left = of_others, scaled
            # On a GPU the question would cost a synchronisation, more than the multiplication does.
            if x.device.type != "cpu" or bool((reference != stats[Stat.REFERENCE]).any()):
                factor = of_others * (reference - stats[Stat.REFERENCE]).exp()
                left = (wide * factor[:, None]).to(x.dtype)
            add_product(self.by_weight[columns], exps.t(), left, first=rows.start == 0)
            if self.by_bias is not None:
                self.by_bias[columns] += torch.mv(exps.t(), factor.to(exps.dtype))
        self.by_weight.index_add_(0, targets, wide * of_target[:, None])
        if self.by_bias is not None:
            self.by_bias.index_add_(0, targets, of_target)
        self._kept.clear()


def forward_sweep(
    work: Work,
    *,
    direction: bool,
    out: Tensor | None = None,
    merge: Callable[[Tensor, Tensor | None], None] | None = None,
    gradients: HeadGradients | None = None,
) -> tuple[Rows, Tensor | None]:
    """Per-row results (N,) and, if wanted, the direction (N, H) of the hidden gradient.

    One product for the values; with ``direction`` a second one, of exponentials that exist anyway.
    Working memory: one tile of logits and one block of float32 accumulators.

    ``merge(statistics, accumulator)`` is called on a block of rows that has seen this process's
    part of the vocabulary (:mod:`memhead.parallel`). ``out`` (N, H) is memory for the direction.
    ``gradients`` are collected along the way, at the price of one more product and of a block of
    rows of the whole vocabulary.
    """
    hidden, weight, chunk = work.hidden, work.weight, work.chunk
    (num_rows, hidden_size), vocab_size = hidden.shape, weight.shape[0]
    stats = new_statistics(num_rows, hidden, work.result)
    kept = direction or gradients is not None  # the exponentials
    width = chunk.columns if kept or not work.whole_at_once else vocab_size
    buffer = hidden.new_empty(0)
    if gradients is None and width == chunk.columns:
        buffer = work.new_buffer(chunk)
    if not direction:
        out = None
    elif out is None:
        out = _rows_like(hidden)
    # Where the output has the accumulator's dtype it is its own accumulator.
    own = out is not None and out.dtype == stats.dtype
    shared_acc = stats.new_empty(chunk.rows, hidden_size) if direction and not own else None
    for rows in row_blocks(num_rows, chunk.rows):
        x = as_operand(hidden[rows], work.compute)  # (R, H)
        acc = out[rows] if own and out is not None else shared_acc
        acc = None if acc is None else acc[: len(x)]  # (R, H)
        whole = work.tile(rows, slice(0, vocab_size))
        partial = work.backend.start_rows(x, weight, stats[:, rows], whole, work.operand)
        for columns in blocks(vocab_size, width):
            w = as_operand(weight.tile(columns.start, columns.stop, work.compute), work.compute)  # (C, H)
            first = columns.start == 0
            exps = work.backend.fold_product(  # (R, C)
                x,
                w,
                buffer if gradients is None else gradients.buffer(columns, len(x)),
                partial,
                stats[:, rows],
                work.tile(rows, columns),
                None if first else acc,
                work.operand,
                kept,
            )
            if gradients is not None:
                gradients.keep(columns, exps, stats[:, rows])
            if acc is not None:
                add_product(acc, exps, w, first=first)
        work.backend.end_rows(partial, stats[:, rows], work.spec)
        if merge is not None:
            merge(stats[:, rows], acc)
        if gradients is not None:
            gradients.fold(x, stats[:, rows], rows)
        if acc is not None and out is not None:
            target_rows = as_operand(weight.rows(work.targets[rows], work.compute), work.compute)
            work.backend.finish_direction(acc, stats[:, rows], target_rows, out[rows])
    return finish(stats, work.vocab_size, work.spec), out


def backward_sweep(
    work: Work,
    upstream: Upstream,
    *,
    hidden_dtype: torch.dtype | None,
    weight_parts: tuple[WeightPart, ...],
    bias_grad: bool,
) -> tuple[Tensor | None, list[Tensor], Tensor | None]:
    """Gradients of hidden (N, H), of the weight's parts (each (V, width)) and of the bias (V,).

    The vocabulary is the outer loop, so that a tile of the weight's gradient is summed over all
    rows in float32 and rounded once, without a second buffer of the weight's size; the price is a
    float32 accumulator (N, H) where the hidden gradient is wanted too, in ``hidden_dtype``; ``None``: it is not.
    """
    hidden, weight = work.hidden, work.weight
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    chunk = work.chunk.taller(num_rows)
    scale, upstream = _scaled(work, upstream)
    hidden_acc = hidden.new_zeros(hidden.shape, dtype=work.result) if hidden_dtype else None
    # Every tile of it is written below, so it need not be cleared.
    weight_grads = [hidden.new_empty((vocab_size, part.width), dtype=part.dtype) for part in weight_parts]
    if not num_rows:
        weight_grads = [grad.zero_() for grad in weight_grads]
    # A sum over one block of rows is a single product, which rounds once by itself.
    single = num_rows <= chunk.rows and work.operand != torch.float16
    accs = [
        None
        if part.dtype == work.result or (single and part.dtype == work.operand)
        else hidden.new_empty((chunk.columns, part.width), dtype=work.result)
        for part in weight_parts
    ]
    bias_out = hidden.new_zeros(vocab_size, dtype=work.result) if bias_grad else None
    buffer = work.new_buffer(chunk)
    for columns in blocks(vocab_size, chunk.columns):
        w = as_operand(weight.tile(columns.start, columns.stop, work.compute), work.compute)  # (C, H)
        for rows in blocks(num_rows, chunk.rows):
            x = as_operand(hidden[rows], work.compute)  # (R, H)
            grad = work.backend.gradient_product(  # (R, C)
                x,
                w,
                buffer,
                work.tile(rows, columns),
                Upstream(*(_slice(value, rows) for value in upstream)),  # type: ignore[arg-type]
                work.operand,
            )
            if hidden_acc is not None:
                add_product(hidden_acc[rows], grad, w, first=False)
            for part, acc, weight_grad in zip(weight_parts, accs, weight_grads, strict=True):
                total = weight_grad[columns] if acc is None else acc[: len(w)]
                add_product(total, grad.t(), x[:, part.features], first=rows.start == 0)
            if bias_out is not None:
                bias_out[columns] += grad.sum(0, dtype=work.result)
        for weight_grad, acc in zip(weight_grads, accs, strict=True):
            if acc is not None and num_rows:
                torch.mul(acc[: len(w)], scale, out=weight_grad[columns])
            elif isinstance(scale, Tensor):
                weight_grad[columns].mul_(scale)
    hidden_out = hidden_acc
    if hidden_acc is not None:
        same = hidden_acc.dtype == hidden_dtype
        hidden_out = torch.mul(
            hidden_acc, scale, out=hidden_acc if same else _rows_like(hidden, hidden_dtype)
        )
    return hidden_out, weight_grads, None if bias_out is None else bias_out.mul_(scale)


def _rows_like(hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory (N, H), as the operators promise a compiler, whatever hidden's layout."""
    return torch.empty_like(hidden, dtype=dtype, memory_format=torch.contiguous_format)


def _scaled(work: Work, upstream: Upstream) -> tuple[Tensor | float, Upstream]:
    """Bring the largest upstream gradient to 1, so that float16 products do not flush to zero."""
    if work.operand != torch.float16:
        return 1.0, upstream
    grads = [upstream.grad_logprobs, upstream.grad_entropy]
    largest = torch.stack([g.abs().amax() for g in grads if g is not None and g.numel()] or [torch.ones(())])
    scale = largest.amax().clamp_min(torch.finfo(torch.float32).tiny).to(work.hidden.device)
    return scale, upstream._replace(
        grad_logprobs=upstream.grad_logprobs / scale,
        grad_entropy=None if upstream.grad_entropy is None else upstream.grad_entropy / scale,
    )


def _slice(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]
