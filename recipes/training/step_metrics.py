"""What a packed step reports: tokens, and the share of rows left out."""

from __future__ import annotations

from dataclasses import dataclass

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
