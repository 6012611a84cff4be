"""The completions of one generation, as a packed step sees them: micro-batches, joined into bins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from memhead.ragged_support import Support
from recipes.training.packing import Lengths, PaddedBatch, even_bins, fill_bins, measure

MicroBatch = dict[str, Any]  # what TRL's loss takes
SUPPORT = "support"  # in it: of its B × K slots, where the sampler truncates


@dataclass
class Rollout:
    """Rows of TRL's output in the order of training, and which of them a step has to compute."""

    tensors: MicroBatch  # all rows
    parts: list[MicroBatch]  # the same, by micro-batch
    lengths: Lengths
    live: Tensor  # (B,) bool, on the host: rows to compute
    budget: int  # tokens of a bin
    agree: Callable[[int], int] = int  # see `fill_bins`
    even: bool = True  # else bins are as full as they may be
    spare: Tensor = field(init=False)  # (B,) bool: of those, computed for other processes' sake alone
    _cuts: dict[range, list[range]] = field(default_factory=dict)  # a run is cut once: the same bins, always
    _bins: dict[int, range] = field(default_factory=dict)  # by last micro-batch

    def __post_init__(self) -> None:
        self.spare = torch.zeros_like(self.live)

    @classmethod
    def whole(cls, tensors: MicroBatch) -> Rollout:
        """One micro-batch, every row of it computed."""
        lengths = measure(padded(tensors))
        return cls(tensors, [tensors], lengths, lengths.completion > 0, budget=0)

    @classmethod
    def shuffled(
        cls,
        tensors: MicroBatch,
        count: int,
        only_by_advantage: bool,
        budget: int | None,
        agree: Callable[[int], int] = int,
        *,
        even: bool = True,
    ) -> Rollout:
        """``count`` micro-batches of whole groups, in random order, as far as groups fit.

        Args:
            only_by_advantage: rows whose advantage is zero need not be computed.
            budget: tokens of a bin. None for as many as a micro-batch has slots when padded: what fits TRL's way.
            agree: see :func:`fill_bins`.
            even: else bins are as full as they may be.
        """
        from trl.trainer.utils import split_tensor_dict

        lengths = measure(padded(tensors))
        order = _shuffled(lengths.group)
        moved = {
            key: value[order.to(value.device)] if isinstance(value, Tensor) and value.ndim > 0 else value
            for key, value in tensors.items()
        }
        lengths = Lengths(*(x[order] for x in lengths))
        live = lengths.completion > 0
        if only_by_advantage:
            live &= (moved["advantages"].reshape(len(order), -1) != 0).any(1).cpu()
        if budget is None:
            budget = padded(moved).input_ids.numel() // count
        return cls(moved, split_tensor_dict(moved, count), lengths, live, budget, agree, even)

    @property
    def count(self) -> int:
        """The number of micro-batches."""
        return len(self.parts)

    @property
    def size(self) -> int:
        """The number of rows of a micro-batch."""
        return len(self.live) // self.count

    def cut(self, run: range) -> list[range]:
        """Bins of consecutive micro-batches without an update between them. At least one row of each is computed."""
        if run not in self._cuts:
            live, size = self.live.tolist(), self.size
            slots = [[r for r in range(i * size, (i + 1) * size) if live[r]] for i in run]
            bins = (even_bins if self.even else fill_bins)(self.lengths, slots, self.budget, self.agree)
            self._cuts[run] = [range(run.start + b.start, run.start + b.stop) for b in bins]
            for bin_ in self._cuts[run]:
                self._keep_one(torch.arange(bin_.start * size, bin_.stop * size))
        return self._cuts[run]

    def _keep_one(self, rows: Tensor) -> None:
        """Where nothing is to be computed: gradients of zero must exist, and other processes wait, so the least."""
        if self.live[rows].any():
            return
        length = self.lengths.completion[rows]
        shortest = rows[torch.where(length > 0, length, length.max() + 1).argmin()]
        self.live[shortest] = self.spare[shortest] = self.lengths.completion[shortest] > 0

    def plan(self, run: range) -> None:
        """Cut ``run`` and remember its bins."""
        self._bins = {bin_[-1]: bin_ for bin_ in self.cut(run)}

    def bin_ending_with(self, index: int) -> Bin:
        """The bin to compute at micro-batch ``index``; an empty one where it goes with a later micro-batch."""
        return Bin(self, self._bins.get(index, range(0)))


@dataclass(frozen=True)
class Bin:
    """Some consecutive micro-batches of a rollout, whose log-probabilities are computed together."""

    rollout: Rollout
    run: range

    @property
    def rows(self) -> slice:
        """Its rows within the rollout."""
        return slice(self.run.start * self.rollout.size, self.run.stop * self.rollout.size)

    @property
    def parts(self) -> Iterator[tuple[MicroBatch, slice]]:
        """The micro-batches, with their rows counted from the bin's first."""
        size = self.rollout.size
        for place, index in enumerate(self.run):
            yield self.rollout.parts[index], slice(place * size, (place + 1) * size)

    @property
    def unscored(self) -> Iterator[tuple[MicroBatch, slice]]:
        """Those whose log-probabilities by the policy that sampled are not known yet."""
        return ((part, rows) for part, rows in self.parts if "old_per_token_logps" not in part)

    @cached_property
    def batch(self) -> PaddedBatch:
        """Its rows, padded."""
        whole = padded(self.rollout.tensors)
        return PaddedBatch(
            whole.input_ids[self.rows], whole.attention_mask[self.rows], whole.completion_width
        )

    @property
    def support(self) -> Support | None:
        """Of its B × K slots, as found where they were first scored; None where none has been."""
        width = self.batch.completion_width
        kept = [part.get(SUPPORT) for part, _ in self.parts]
        if all(one is None for one in kept):
            return None
        some = next(one for one in kept if one is not None)
        nothing = some.size.new_zeros(self.rollout.size * width)
        return Support.joined([one or Support(some.tokens[:0], nothing, nothing) for one in kept])

    @cached_property
    def lengths(self) -> Lengths:
        """The lengths of its rows."""
        return Lengths(*(x[self.rows] for x in self.rollout.lengths))

    @cached_property
    def live(self) -> list[int]:
        """Rows to compute, counted from the bin's first."""
        return self.rollout.live[self.rows].nonzero()[:, 0].tolist()

    @cached_property
    def left_out(self) -> Tensor:
        """(rows,) bool, on the device: rows with tokens that are not computed."""
        left_out = ~self.rollout.live[self.rows] & (self.lengths.completion > 0)
        return left_out.to(self.rollout.tensors["completion_mask"].device)

    @cached_property
    def spare(self) -> Tensor:
        """(rows,) bool, on the device: rows that are computed though the loss does not need them."""
        return self.rollout.spare[self.rows].to(self.left_out.device)

    def counts(self) -> dict[str, int]:
        """For the log: real tokens, rows, rows left out."""
        lengths = self.lengths
        left_out = (~self.rollout.live[self.rows] & (lengths.completion > 0)).sum()
        real = int((lengths.prompt + lengths.completion).sum())
        return {"real": real, "rows": len(lengths.group), "left_out": int(left_out)}


def padded(tensors: MicroBatch) -> PaddedBatch:
    """Prompts and completions side by side."""
    return PaddedBatch(
        torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], dim=1),
        torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], dim=1),
        tensors["completion_ids"].shape[1],
    )


def _shuffled(group: Tensor) -> Tensor:
    """An order of rows with groups together, by the same draw from torch's generator as TRL's shuffle."""
    draw = torch.randperm(len(group))
    first = torch.full((int(group.max()) + 1,), len(group)).scatter_reduce_(0, group, draw, reduce="amin")
    return first[group].argsort(stable=True)
