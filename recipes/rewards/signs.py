"""What a training step's figures mean where they are, or look, wrong: one sentence each, said once.

signs = Signs()
for sentence in signs.read(step, logs): ...     logs: the trainer's own, by TRL's names
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from recipes.problems import see

PATIENCE = 5  # logged steps with the same reward, or without an end, before they are called constant
_NO_LOSS = 1e-7


class Signs:
    """Reads one log after another."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._first: dict[str, float] = {}  # each reward's first mean
        self._seen: dict[str, int] = {}  # logs of each
        self._varied: set[str] = set()
        self._unended = 0  # logged steps in a row in which no completion ended by itself

    def read(self, step: int, logs: Mapping[str, Any]) -> list[str]:
        """The sentences that apply for the first time with this step's log."""
        if "loss" not in logs:  # an evaluation's
            return []
        # transformers logs a NaN, as the mean of nothing but None is, as None.
        logs = {key: math.nan if value is None else value for key, value in logs.items()}
        found = [*self._constant(step, logs), *self._never_ended(step, logs), *_signs(step, logs)]
        new = [sentence for sign, sentence in found if sign not in self._said]
        self._said |= {sign for sign, _ in found}
        return new

    def _constant(self, step: int, logs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for key, mean in logs.items():
            if not key.startswith("rewards/") or not key.endswith("/mean"):
                continue
            name = key.removeprefix("rewards/").removesuffix("/mean")
            if (
                not _equal(self._first.setdefault(name, mean), mean)
                or logs.get(f"rewards/{name}/std", 0.0) > 0
            ):
                self._varied.add(name)
            self._seen[name] = self._seen.get(name, 0) + 1
            if self._seen[name] != PATIENCE or name in self._varied:
                continue
            gave = "None" if math.isnan(mean) else f"{mean:g}"
            yield (
                f"constant {name}",
                f"Reward {name} gave every completion {gave} up to step {step}: it tells none from another, so "
                "nothing is learned from it yet. Look at completions.jsonl: is the format it looks for ever written? "
                f"{see('the-reward-stays-flat')}",
            )

    def _never_ended(self, step: int, logs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        self._unended = self._unended + 1 if logs.get("completions/clipped_ratio") == 1.0 else 0
        if self._unended == PATIENCE:
            yield (
                "never ended",
                f"In {PATIENCE} logged steps up to step {step} no completion ended by itself. Either the limit is far "
                "too short, or the model never writes the tokenizer's end token (a base model without a chat "
                f"template, or one whose end token is another). {see('completions-are-cut-off')}",
            )


def _equal(first: float, mean: float) -> bool:
    return first == mean or (math.isnan(first) and math.isnan(mean))


def _signs(step: int, logs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    equal = logs.get("frac_reward_zero_std") == 1.0
    if equal:
        yield (
            "equal",
            f"Step {step}: within each group all completions earned the same, so every advantage is 0 and the step "
            "learned nothing. Rare is harmless; often means that the problems are too hard or too easy, or that "
            "grpo.num_generations or grpo.temperature is too low. "
            f"{see('the-reward-stays-flat')}",
        )
    if logs.get("completions/clipped_ratio") == 1.0:
        yield (
            "clipped",
            f"Step {step}: every completion was cut off at grpo.max_completion_length, before the model ended it. "
            "An answer at the end is never seen; raise it, or check that the model knows its end token. "
            f"{see('completions-are-cut-off')}",
        )
    if step == 1 and abs(logs["loss"]) < _NO_LOSS:
        yield (
            "loss",
            "Step 1: a loss of 0 because every advantage is 0."
            if equal
            else "Step 1: a loss of 0 is no fault. While the policy is the one that sampled, a group's advantages "
            "cancel out in GRPO's loss, but not in its gradient: see grad_norm, and the rewards. "
            f"{see('a-loss-near-0-or-below-it')}",
        )
