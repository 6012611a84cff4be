"""A run's rewards: tried out before anything is loaded, and their failures counted over all processes.

prepare(task) -> Rewards(functions, weights)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes.processes import by_main, count, gathered
from recipes.rewards.contract import Failures, Guarded, check, choose, guard
from recipes.tasks import Task

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Trainer
else:
    _Trainer = object

PROBES = (
    "",
    "I do not know.",
    "12",
    "<reasoning>\n1 + 1\n</reasoning>\n<answer>\n2\n</answer>\n",
    "\\boxed{3}",
    "(" * 50,
)


@dataclass(frozen=True)
class Rewards:
    """The reward functions as the trainer gets them, and the weight of each in the same order."""

    functions: list[Any]
    weights: list[float]


def prepare(task: Task) -> Rewards:
    """The task's rewards as the YAML weighs them, guarded; their contract is checked on a few problems.

    Raises ConfigError if a function or data is missing, RewardError for a function that breaks the contract.
    """
    functions = choose(task.reward_weights, task.rewards)
    data, _ = task.train, task.held_out  # missing data is reported before a folder is made
    rows = [data[index % len(data)] for index in range(len(PROBES))]
    chat = not isinstance(rows[0]["prompt"], str)
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in PROBES]
    by_main(lambda: check(functions, rows, completions, task.options.reward_seconds))
    return Rewards(guard(functions, task.options), list(task.reward_weights.values()))


class FailuresOfAll(_Trainer):
    """To be put before the trainer's class: `task.reward_failures` is a share of the completions of all processes.

    TRL's method ends by gathering the rewards. So whoever comes to its end has all the others there, with every reward
    called, and one more message waits for nobody new; all of them find the same, and end together.
    """

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._calculate_rewards(*args, **kwargs)
        if count() > 1:
            functions = [one for one in self.reward_funcs if isinstance(one, Guarded)]
            counted = gathered([function.failures for function in functions])
            for function, processes in zip(functions, zip(*counted, strict=True), strict=True):
                function.judge(Failures.of_all(processes), self._log_metric)
        return found
