"""The vocabulary-parallel head where every process has rows of its own, as in data-parallel training.

Each process gathers the hidden states of all, computes its part of the vocabulary for them, and goes on with the
results of its own rows:

    rows = OwnRows(len(hidden), group)
    everything = vocab_parallel_logprobs(rows.gather(hidden), my_part_of_the_weight, rows.gather(targets), group=group)
    logprobs = rows.own(everything.logprobs)

Numbers of rows may differ, and be 0. The gradient of the weight's part is that of the losses of all processes
together, where a process that computes its own rows with the whole weight has that of its own loss. So what averages
the gradients of whole weights (DDP, FSDP) averages those of a slice of it to the same result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memhead.logprobs import LinearLogprobs
from memhead.parallel import vocab_parallel_cross_entropy, vocab_parallel_logprobs

_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13


class OwnRows:
    """How many rows each process of a group has: from one small message.

    Args:
        number: of this process.
        like: a tensor on the device that the group talks by.
        group: ``None`` is the default one.
    """

    def __init__(self, number: int, like: Tensor, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        sizes = torch.zeros(world, dtype=torch.long, device=like.device)
        sizes[rank] = number
        dist.all_reduce(sizes, group=group)
        self.sizes: list[int] = sizes.tolist()
        begin = sum(self.sizes[:rank])
        self.mine = slice(begin, begin + number)

    def gather(self, own: Tensor) -> Tensor:
        """The rows (n, *) of all processes, by rank. Its gradient, everywhere the same, is cut to the own rows."""
        return _Gather.apply(own, self) if own.requires_grad else self._gathered(own)  # type: ignore[no-any-return]

    def own(self, everything: Tensor) -> Tensor:
        """The own rows of (N, *). Its gradient is gathered."""
        if not everything.requires_grad:
            return everything[self.mine]
        return _Own.apply(everything, self)  # type: ignore[no-any-return]

    def _gathered(self, own: Tensor) -> Tensor:
        longest = max(self.sizes)
        if longest == min(self.sizes):
            found = own.new_empty(longest * len(self.sizes), *own.shape[1:])
            _gather(found, own.contiguous(), group=self.group)
            return found
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own
        found = own.new_empty(len(self.sizes) * longest, *own.shape[1:])
        _gather(found, padded, group=self.group)
        parts = found.view(len(self.sizes), longest, *own.shape[1:])
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: OwnRows) -> Tensor:
        ctx.rows = rows
        return rows._gathered(own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rows.mine], None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, everything: Tensor, rows: OwnRows) -> Tensor:
        ctx.rows = rows
        return everything[rows.mine].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rows._gathered(grad), None


def even_sizes(vocabulary: int, group: dist.ProcessGroup | None = None) -> list[int]:
    """Rows of each process's part of a weight with so many: as even as they can be, the first ones larger."""
    size, rest = divmod(vocabulary, world := dist.get_world_size(group))
    return [size + (rank < rest) for rank in range(world)]


def part_of(vocabulary: int, group: dist.ProcessGroup | None = None) -> slice:
    """This process's rows where the parts have :func:`even_sizes`."""
    sizes, rank = even_sizes(vocabulary, group), dist.get_rank(group)
    begin = sum(sizes[:rank])
    return slice(begin, begin + sizes[rank])


def own_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, group: dist.ProcessGroup | None = None, **options: Any
) -> LinearLogprobs:
    """:func:`memhead.parallel.vocab_parallel_logprobs` of this process's rows.

    Args:
        hidden: (n, H), of this process.
        weight: (V_rank, H): this process's part.
        targets: (n,), of this process, numbers in the whole vocabulary.
        group: the process group; ``None`` is the default one.
        options: those of :func:`~memhead.parallel.vocab_parallel_logprobs`, each the same on every process; without a
            ``mask``, and the temperature is one number.
    """
    rows = OwnRows(len(hidden), hidden, group)
    found = vocab_parallel_logprobs(rows.gather(hidden), weight, rows.gather(targets), group=group, **options)
    return LinearLogprobs(*(None if value is None else rows.own(value) for value in found))  # type: ignore[arg-type]


def own_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, group: dist.ProcessGroup | None = None, **options: Any
) -> Tensor:
    """:func:`memhead.parallel.vocab_parallel_cross_entropy` of this process's rows, (n,): arguments as above."""
    rows = OwnRows(len(hidden), hidden, group)
    losses = vocab_parallel_cross_entropy(
        rows.gather(hidden), weight, rows.gather(targets), group=group, **options
    )
    return rows.own(losses)
