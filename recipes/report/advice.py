"""What held a run back, by its own figures, and what to change first; said where a run is not shown to have learned.

for sentence in advice(records, task.reward_weights): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from recipes.problems import see
from recipes.tracking.summary import logged_steps, mean

Records = list[dict[str, Any]]
_MANY = 0.5  # the mean share of a run's groups or completions above which it is the thing to change
_FEW_STEPS = 50


def advice(records: Records, weights: Mapping[str, float]) -> list[str]:
    """A sentence for each thing that a run's figures show, the likeliest cause first; one at least.

    weights: of the rewards; one of weight 0 is only logged, and holds nothing back.
    """
    logged = logged_steps(records)
    found = [*_cut_off(logged), *_constant(logged, weights), *_equal_groups(logged)]
    if not found:
        found = [*_undone(logged)]
    return found


def _cut_off(logged: Records) -> Iterator[str]:
    share = _mean(logged, "clipped_share")
    if share is None or share < _MANY:
        return
    if share == 1.0:
        yield (
            "No completion of the whole run ended by itself. Raise grpo.max_completion_length; if they ramble on all "
            f"the same, the model does not write its end token. {see('completions-are-cut-off')}"
        )
    else:
        yield (
            f"{100 * share:.3g} % of the completions were cut off before their end, and an answer there is never seen. "
            f"Raise grpo.max_completion_length. {see('completions-are-cut-off')}"
        )


def _constant(logged: Records, weights: Mapping[str, float]) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for record in logged for name in record.get("rewards") or {}):
        values = {(record.get("rewards") or {}).get(name) for record in logged}
        equal = all(record.get("zero_std_share") in (1.0, None) for record in logged)
        if weights.get(name) != 0 and len(values) == 1 and (equal or values <= {0.0, None}):
            (value,) = values
            found.setdefault("nothing" if value is None else f"{value:g}", []).append(name)
    for gave, names in found.items():
        which, them, look = (
            ("Reward", "it", "it looks") if len(names) == 1 else ("Rewards", "them", "they look")
        )
        yield (
            f"{which} {', '.join(names)} gave {gave} throughout, so nothing was learned from {them}. Read "
            f"completions.jsonl: is what {look} for ever written? A reward of smaller steps, or run.warm_start, "
            f"shows the way. {see('the-reward-stays-flat')}"
        )


def _equal_groups(logged: Records) -> Iterator[str]:
    share, reward = _mean(logged, "zero_std_share"), _mean(logged, "reward")
    if share is None or share < _MANY:
        return
    yield (
        f"In {100 * share:.3g} % of the groups all completions earned the same (mean reward {reward or 0.0:.3g}), and "
        "from those nothing is learned. Of a low reward: easier problems, a warm start, more grpo.num_generations. "
        f"Of the highest: harder problems. {see('the-reward-stays-flat')}"
    )


def _undone(logged: Records) -> Iterator[str]:
    steps = logged[-1]["step"] if logged else 0
    if steps < _FEW_STEPS:
        yield f"{steps} steps are few: {see('how-large-a-model-how-many-steps')}"
    else:
        yield (
            "Groups differed and completions ended, so there was something to learn from. Try a higher "
            "grpo.learning_rate first, then more completions a step (grpo.num_generations). "
            f"{see('the-reward-stays-flat')}"
        )


def _mean(logged: Records, key: str) -> float | None:
    return mean([record[key] for record in logged if record.get(key) is not None])
