"""What a packed step reports: tokens, the share of rows left out, and the entropy of the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recipes.processes import gathered


@dataclass
class StepMeter:
    """Counts over one accumulation window of this process."""

    computed: int = 0  # tokens of packed forwards with a gradient
    real: int = 0  # prompt and completion tokens of all rows, a prompt counted for each of its completions
    rows: int = 0
    left_out: int = 0

    def begin(self) -> None:
        """A window begins."""
        self.computed = self.real = self.rows = self.left_out = 0

    def add(self, *, computed: int, real: int, rows: int, left_out: int) -> None:
        """The counts of one bin."""
        self.computed += computed
        self.real += real
        self.rows += rows
        self.left_out += left_out

    def metrics(self) -> dict[str, float]:
        """Of all processes together."""
        own = self.computed, self.real, self.rows, self.left_out
        computed, real, rows, left_out = map(sum, zip(*gathered(own), strict=True))
        return {
            "step/tokens_computed": float(computed),
            "step/tokens_real": float(real),
            "step/left_out": left_out / max(1, rows),
        }


@dataclass
class EntropyMeter:
    """The mean entropy over one accumulation window of all processes, where some of its rows are left out.

    TRL's own is a mean of means over whole micro-batches, of which here only some tokens are known: how many there are
    differs from one process, and one bin, to the next.
    """

    _micro_batches: int = 0
    _sums: list[Tensor] = field(default_factory=list)

    def add(
        self, entropies: Tensor, needed: Tensor, spare: Tensor, left_out: Tensor, micro_batches: int
    ) -> None:
        """Of a bin, (B, K): nats, and which tokens are computed for the loss, only for something to be, and not."""
        nats = entropies.detach().double()
        self._sums.append(
            torch.stack(
                [(nats * needed).sum(), needed.sum(), (nats * spare).sum(), spare.sum(), left_out.sum()]
            )
        )
        self._micro_batches += micro_batches

    def take(self, accelerator: Any, entries: list[float]) -> None:
        """Puts it in the place of TRL's last entries, one a micro-batch; every process has to call it."""
        needed, tokens, spare, spare_tokens, left_out = accelerator.reduce(
            torch.stack(self._sums).sum(0), "sum"
        ).tolist()
        count, self._micro_batches = self._micro_batches, 0
        self._sums.clear()
        if left_out:
            mean = needed / tokens if tokens else spare / max(1.0, spare_tokens)
            entries[-count:] = [mean] * count
