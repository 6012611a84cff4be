"""What a few prompts say before a run: which group size teaches, and which length holds the completions.

    python train_grpo.py --config configs/quickstart.yaml --pilot

64 prompts of the training set, 32 completions each, by the engine and the settings of the run and from the model that
GRPO would begin with. A group whose rewards are all equal has no gradient; how often that happens for another size is
counted on the same completions, over all ways to draw a group from them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from recipes.plan.rate import rate_here
from recipes.plan.time import plan_time
from recipes.table import Table
from recipes.tracking.phases import in_phase
from recipes.training.session import Session
from recipes.training.trainer import install_head, make_trainer

PROMPTS = 64
SAMPLES = 32  # of each; more where the run's groups do not divide it
SIZES = (4, 8, 16, 32)
_ENOUGH = 0.9  # of the share of groups with a gradient at the largest size
_CUT = 0.01  # share of completions that may be cut off
_UNIT = 16  # tokens, to which a length is rounded up
Earned = tuple[float, ...] | None  # of a completion, as `weighed` gives it


@dataclass(frozen=True)
class Pilot:
    """What was sampled. rewards: as `weighed` gives them; lengths: in tokens; ended: by the end token."""

    rewards: list[list[Earned]]
    lengths: list[int]
    ended: list[bool]
    prompt_tokens: float  # mean
    longest: int  # tokens that a completion may have
    max_seq_length: int | None = None  # those of a prompt and its completion together, where that is set

    def without_gradient(self, size: int) -> float:
        """The expected share of groups of that size whose rewards are all equal."""
        return sum(chance_of_equal(rewards, size) for rewards in self.rewards) / len(self.rewards)

    @property
    def group_size(self) -> int | None:
        """The smallest size with nine tenths of the largest one's gradient; None where no group has any."""
        useful = {size: 1.0 - self.without_gradient(size) for size in SIZES}
        if not useful[SIZES[-1]]:
            return None
        return next(size for size in SIZES if useful[size] >= _ENOUGH * useful[SIZES[-1]])

    @property
    def cut_off(self) -> float:
        """The share that reached the longest length without an end."""
        return 1.0 - sum(self.ended) / len(self.ended)

    @property
    def completion_length(self) -> int | None:
        """The shortest length, rounded up, that cuts off one in a hundred at most; None: longer than what was tried."""
        if self.cut_off > _CUT:
            return None
        needed = sorted(self.lengths)[math.ceil((1 - _CUT) * len(self.lengths)) - 1]
        return min(self.longest, -(-needed // _UNIT) * _UNIT)

    @property
    def mean_lengths(self) -> tuple[int, int]:
        """Tokens of a prompt and of a completion, for the plan of time."""
        return max(1, round(self.prompt_tokens)), max(1, round(sum(self.lengths) / len(self.lengths)))

    def table(self) -> Table:
        """Group sizes beside the share of groups without a gradient."""
        rows = [(str(size), f"{100 * self.without_gradient(size):.0f} %") for size in SIZES]
        return Table(
            ("completions a prompt", "groups without a gradient"), rows, f"pilot: {len(self.rewards)} prompts"
        )

    def lines(self) -> list[str]:
        """The conclusions in words."""
        return [
            f"completions: {100 * (1 - self.cut_off):.1f} % end, {100 * self.cut_off:.1f} % are cut off at "
            f"{self.longest} tokens; mean {self.mean_lengths[1]}, prompts {self.mean_lengths[0]}",
            self._of_size(),
            self._of_length(),
        ]

    def _of_size(self) -> str:
        if self.group_size is None:
            return (
                f"no group has a gradient: {self._earned()}. Of a low reward: easier problems, or a warm start; of the "
                "highest: harder problems; or weigh a reward that tells completions apart"
            )
        least = self.without_gradient(self.group_size)
        more = "; most groups still teach nothing: choose other problems" if least > 0.5 else ""
        return f"recommended: grpo.num_generations={self.group_size} ({100 * least:.0f} % without a gradient){more}"

    def _earned(self) -> str:
        totals = [math.fsum(reward) for group in self.rewards for reward in group if reward is not None]
        if not totals:
            return "no completion got a reward"
        return (
            f"all completions of a prompt earned the same, {math.fsum(totals) / len(totals):.3g} on average"
        )

    def _of_length(self) -> str:
        if self.completion_length is None:
            asked = f"grpo.max_completion_length={2 * self.longest}"
            if self.max_seq_length is not None:  # prompts keep the room that they have
                asked += f" model.max_seq_length={self.max_seq_length + self.longest}"
            return f"recommended: {asked}, and another pilot: too many are cut off"
        return f"recommended: grpo.max_completion_length={self.completion_length} (cuts off 1 % at most)"


def chance_of_equal(rewards: Sequence[Hashable], size: int) -> float:
    """Of all ways to draw `size` of the rewards, the share in which all are equal; None is no reward, and as any other.

    Raises ValueError for fewer rewards than that.
    """
    if not 1 <= size <= len(rewards):
        raise ValueError(f"size: {size} of {len(rewards)} rewards; give 1 <= size <= their number")
    counts = Counter(rewards)
    without = counts.pop(None, 0)
    of_none = math.comb(without, size)
    equal = of_none + sum(math.comb(count + without, size) - of_none for count in counts.values())
    return equal / math.comb(len(rewards), size)


def weighed(judged: Tensor, weights: Tensor, *, apart: bool) -> list[Earned]:
    """Of each completion what a group is compared by: the sum, or with `apart` (TRL normalises each function by itself)
    one value a function that counts. None where no function gave a reward: TRL leaves such a completion out.

    judged: (N, functions), NaN where one gave none. weights: (functions,).
    """
    scored = ~judged.isnan().all(1)
    counted = judged * weights.to(judged.device)
    values = counted[:, weights != 0].nan_to_num() if apart else counted.nansum(1, keepdim=True)
    rows = (tuple(round(value, 6) for value in row) for row in values.tolist())
    return [row if known else None for row, known in zip(rows, scored.tolist(), strict=True)]


def show(session: Session) -> int:
    """The command line's `--pilot`, by the session's own trainer, which trains nothing. Returns the exit status."""
    config = session.config
    with install_head(config, session.arguments):
        found = sample(session, make_trainer(session))
    Console().print(found.table().terminal())
    lines = found.lines()
    if session.planned is not None:
        rate = rate_here(torch.bfloat16 if session.arguments.bf16 else torch.float16)
        time = plan_time(config, session.planned.setting, rate, found.mean_lengths)
        lines += [] if time is None else time.lines()
    print(*lines, sep="\n", flush=True)
    return 0


@in_phase("pilot")
@torch.no_grad()
def sample(session: Session, trainer: Any) -> Pilot:
    """Samples and judges, in the one process that there is."""
    train, group = session.task.train, trainer.num_generations
    count = min(PROMPTS, len(train))
    chosen = [train[index * len(train) // count] for index in range(count)]
    each = -(-SAMPLES // group) * group
    rows = [row for row in chosen for _ in range(each)]
    # No more than a rollout has: for that many there is room.
    at_once = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation // group * group
    apart = session.config.grpo["multi_objective_aggregation"] == "normalize_then_sum"
    rewards: list[Earned] = []
    completions: list[list[int]] = []
    prompts: list[list[int]] = []
    trainer.model.train()  # TRL asks it which number of completions a prompt has
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        asked = [row["prompt"] for row in part]
        prompt_ids, ids, _, texts, *_ = trainer._generate(asked)
        judged = trainer._calculate_rewards(part, asked, texts, ids)
        rewards += weighed(judged, trainer.reward_weights, apart=apart)
        completions += [list(one) for one in ids]
        prompts += [list(one) for one in prompt_ids]
    ends = {*trainer.eos_token_ids, trainer.processing_class.pad_token_id}
    return Pilot(
        rewards=[rewards[start : start + each] for start in range(0, len(rewards), each)],
        lengths=[len(ids) for ids in completions],
        ended=[bool(ids) and ids[-1] in ends for ids in completions],
        prompt_tokens=sum(map(len, prompts)) / len(prompts),
        longest=session.config.completion_length,
        max_seq_length=session.config.model.max_seq_length,
    )
