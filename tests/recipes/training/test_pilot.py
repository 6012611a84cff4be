"""The pilot: its counting against brute force, its advice, and itself on the quickstart's model."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl.trainer.utils import nanstd

import train_grpo
from recipes.config.load import load_config
from recipes.training.pilot import Pilot, chance_of_equal, sample, weighed

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def pilot(rewards, lengths=(10,), ended=(True,), longest=64):
    return Pilot(rewards, list(lengths), list(ended), prompt_tokens=7.0, longest=longest)


@pytest.mark.parametrize("size", [1, 2, 4, 7])
@pytest.mark.parametrize(
    "rewards", [[0.0] * 7, [0.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]
)
def test_chance_of_equal_rewards_against_every_group(rewards, size):
    groups = list(itertools.combinations(rewards, size))
    assert chance_of_equal(rewards, size) == pytest.approx(
        sum(len(set(g)) == 1 for g in groups) / len(groups)
    )


def teaches_nothing(group, weights, apart):
    """Whether TRL's advantages of a group are all 0. group: (G, functions), NaN where a function gave none."""
    none = group.isnan().all(1)
    if apart:
        normal = (group - group.nanmean(0)) / (nanstd(group, dim=0) + 1e-4)
        advantages = (normal * weights).nansum(1)
    else:
        rewards = (group * weights).nansum(1)
        rewards[none] = torch.nan
        advantages = rewards - rewards.nanmean()
    return bool((advantages.nan_to_num()[~none].abs() < 1e-6).all())


@pytest.mark.parametrize("apart", [False, True])
def test_a_group_teaches_nothing_where_trl_gives_no_advantage(apart):
    """A completion without any reward is as any other; two functions that make up for each other teach if apart."""
    none = [float("nan")] * 2
    judged = torch.tensor([[1.0, 0.0], [0.0, 2.0], none, none, [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    weights = torch.tensor([1.0, 0.5])
    rewards = weighed(judged, weights, apart=apart)
    for size in (2, 3, 4):
        groups = list(itertools.combinations(judged, size))
        nothing = [teaches_nothing(torch.stack(group), weights, apart) for group in groups]
        assert chance_of_equal(rewards, size) == pytest.approx(sum(nothing) / len(groups))
    of_one = torch.tensor([1.0, 0.0])  # a function that is only logged makes no difference
    assert len(set(weighed(judged, of_one, apart=apart)) - {None}) == 2


def test_more_than_there_are():
    with pytest.raises(ValueError, match="size: 4 of 3 rewards"):
        chance_of_equal([0.0, 1.0, 1.0], 4)


def test_the_smallest_group_that_teaches_nearly_as_much():
    even = pilot([[0.0, 1.0] * 16] * 4)
    assert even.group_size == 8  # of 4, one in nine has no gradient
    rare = pilot([[1.0] + [0.0] * 31] * 4)
    assert rare.group_size == 32
    assert "most groups" not in rare.lines()[1]
    some = pilot([[1.0] + [0.0] * 31] + [[0.0] * 32] * 3)
    assert "75 % without a gradient); most groups still teach nothing" in some.lines()[1]
    none = pilot([[(1.0,)] * 32, [(0.0,)] * 32])
    assert none.group_size is None
    assert none.lines()[1].startswith(
        "no group has a gradient: all completions of a prompt earned the same, 0.5 on average. Of a low reward: easier"
    )
    best = pilot([[(1.0, 0.5)] * 32] * 2).lines()[1]
    assert "1.5 on average" in best
    assert "of the highest: harder problems" in best
    assert "no completion got a reward" in pilot([[None] * 32]).lines()[1]


def test_the_length_that_holds_nearly_all():
    for lengths, most in (([20] * 98 + [32, 60], 32), ([20] * 98 + [33, 60], 48), ([20] * 98 + [60] * 2, 64)):
        assert pilot([[0.0, 1.0] * 16], lengths, [True] * 100).completion_length == most  # rounded up
    assert pilot([[0.0, 1.0] * 16], [20] * 100, [True] * 100, longest=30).completion_length == 30
    lengths = [20] * 99 + [60]
    cut = pilot([[0.0, 1.0] * 16], lengths, [True] * 98 + [False] * 2)
    assert cut.completion_length is None
    assert "grpo.max_completion_length=128, and another pilot" in cut.lines()[2]
    assert "98.0 % end, 2.0 % are cut off at 64 tokens" in cut.lines()[0]


def test_a_longer_completion_that_is_recommended_is_taken():
    """With room for the prompts that there are: 768 tokens, 512 of them the completion's."""
    place = QUICKSTART.with_name("llama3.2_1b_gsm8k.yaml")
    room = load_config(place).model.max_seq_length
    cut = Pilot([[(0.0,), (1.0,)] * 16], [512] * 32, [False] * 32, 90.0, longest=512, max_seq_length=room)
    asked = re.findall(r"\S+=\d+", cut.lines()[2])
    assert asked == ["grpo.max_completion_length=1024", f"model.max_seq_length={room + 512}"]
    assert load_config(place, asked).completion_length == 1024


@pytest.mark.parametrize(
    ("problems", "group", "each", "of_rollout"), [(640, 8, 32, 10), (10, 12, 36, 10), (10, 8, 32, 1)]
)
def test_what_is_sampled_and_counted_by_hand(problems, group, each, of_rollout):
    """Prompts spread over the data; whole groups; each completion as long as its place, every third without an end."""
    asked, made = [], itertools.count()

    def generate(prompts):
        asked.append(prompts)
        ids = [[5] * (n % 4 + 1) + [9 if n % 3 else 5] for n in itertools.islice(made, len(prompts))]
        return [[1] * (2 + int(prompt) % 2) for prompt in prompts], ids, None, prompts

    def rewards(rows, prompts, texts, ids):
        right = torch.tensor([float(row["prompt"]) for row in rows])
        return torch.stack([right, torch.full_like(right, float("nan")), torch.ones_like(right)], 1)

    trainer = SimpleNamespace(
        num_generations=group, model=torch.nn.Linear(1, 1).eval(), _generate=generate, _calculate_rewards=rewards,
        args=SimpleNamespace(per_device_train_batch_size=group, steps_per_generation=of_rollout),
        reward_weights=torch.tensor([2.0, 5.0, 0.5]), eos_token_ids=[9],
        processing_class=SimpleNamespace(pad_token_id=0),
    )  # fmt: skip
    task = SimpleNamespace(train=Dataset.from_dict({"prompt": [str(n) for n in range(problems)]}))
    grpo = {"multi_objective_aggregation": "sum_then_normalize"}
    model = SimpleNamespace(max_seq_length=70)
    session = SimpleNamespace(task=task, config=SimpleNamespace(completion_length=6, grpo=grpo, model=model))
    found = sample(session, trainer)
    chosen = list(range(0, problems, 10 if problems > 64 else 1))
    assert [prompt for part in asked for prompt in part] == [str(n) for n in chosen for _ in range(each)]
    assert {len(part) for part in asked[:-1]} == {of_rollout * group}  # for more there may be no room
    assert found.rewards == [[(2.0 * n + 0.5,)] * each for n in chosen]
    count = len(chosen) * each
    assert found.lengths == [n % 4 + 2 for n in range(count)]
    assert found.ended == [n % 3 != 0 for n in range(count)]
    assert found.prompt_tokens == pytest.approx(sum(2 + n % 2 for n in chosen) / len(chosen))
    assert found.longest == 6
    assert found.max_seq_length == 70


def test_on_the_quickstarts_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = [
        "run.warm_start.steps=40",
        "run.warm_start.check_every=40",
        "run.checks=false",
        "run.evaluation.size=64",
        "run.output_root=elsewhere",
    ]
    assert train_grpo.main(["--config", str(QUICKSTART), "--pilot", *few]) == 0
    shown = capsys.readouterr().out
    shares = [int(share) for share in re.findall(r"│ (?:4|8|16|32) +│ +(\d+) % │", shown)]
    assert len(shares) == 4
    assert shares == sorted(shares, reverse=True)  # a larger group has more of a chance
    assert shares[0] > shares[-1]
    assert re.search(r"recommended: grpo\.num_generations=(8|16|32) ", shown)
    assert re.search(
        r"completions: \d+\.\d % end, \d+\.\d % are cut off at 6 tokens; mean \d, prompts \d", shown
    )
    assert "TFLOP/s (measured here)" in shown
    assert "is kept" not in shown
    assert not list(tmp_path.iterdir())  # no run folder is left
