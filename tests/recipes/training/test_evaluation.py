"""Intervals and estimators, compared with values from elsewhere, and a checkpoint measured by itself."""

import itertools
from collections import Counter

import pytest
import torch

from recipes.config.load import load_config
from recipes.models.generation import Sampling
from recipes.rewards.contract import RewardError
from recipes.rewards.verdicts import judge_all
from recipes.tasks.countdown import Countdown
from recipes.tasks.gsm8k import Gsm8k
from recipes.tracking.summary import before_and_after, summarize
from recipes.training import evaluation
from recipes.training.evaluation import (
    complete,
    evaluator,
    greedy_figures,
    majority,
    pass_at_k,
    sampled_figures,
    wilson,
)
from recipes.training.finite import Diverged


def test_wilson_known_values():
    assert wilson(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(10, 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)
    assert wilson(0, 64)[0] == 0.0
    with pytest.raises(ValueError, match="right, total"):
        wilson(0, 0)


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, k):
    verdicts = [i < right for i in range(5)]
    subsets = list(itertools.combinations(verdicts, k))
    assert pass_at_k(right, 5, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority():
    assert majority([3, 4, 4, None]) == 1
    assert majority([4, 3, 3, 4]) == 0
    assert majority([None, None]) is None


class Counting(Gsm8k):
    """Counts how often each completion is judged and read."""

    def __init__(self):
        super().__init__(Gsm8k.Options(), 0)
        self.strict, self.lenient, self.read = Counter(), Counter(), Counter()

    def is_correct(self, completion, row):
        self.strict[completion] += 1
        return super().is_correct(completion, row)

    def is_correct_lenient(self, completion, row):
        self.lenient[completion] += 1
        return super().is_correct_lenient(completion, row)

    def answer_of(self, completion):
        self.read[completion] += 1
        return super().answer_of(completion)


def tag(value):
    return f"<answer>{value}</answer>"


def test_greedy_figures_judge_each_completion_once():
    task, texts = Counting(), [tag(4), "It is 5", tag(7)]
    found = greedy_figures(task, texts, [{"answer": "4"}, {"answer": "5"}, {"answer": "6"}])
    assert found == {
        "accuracy": pytest.approx(1 / 3),
        "accuracy_interval": list(wilson(1, 3)),
        "accuracy_lenient": pytest.approx(2 / 3),
        "accuracy_lenient_interval": list(wilson(2, 3)),
    }
    assert task.strict == task.lenient == Counter(texts)
    assert not task.read


def test_a_task_with_one_verdict_has_one_accuracy():
    row = {"numbers": [3, 5, 7], "target": 26}
    found = greedy_figures(Countdown(Countdown.Options(), 0), ["3*7+5", "3+7+5"], [row, row])
    assert found == {"accuracy": 0.5, "accuracy_interval": list(wilson(1, 2))}


def test_the_vote_is_for_the_completion_unless_the_task_knows_better():
    row = {"numbers": [3, 5, 7], "target": 26}
    samples = [["3*7+5", "3+7+5", " 3*7+5"], ["", "", "3*7+5"], ["1", "1", "3*7+5"]]
    found = sampled_figures(Countdown(Countdown.Options(), 0), samples, [row] * 3)
    assert found["maj@3"] == pytest.approx(2 / 3)  # no answer is no vote


def test_completions_keep_the_order_of_the_rows_in_any_batches():
    calls = []

    def echo(prompts, sampling):
        calls.append(len(prompts))
        return [[prompt.upper()] * sampling.samples for prompt in prompts]

    rows = [{"prompt": letter} for letter in "abcde"]
    assert complete(echo, rows, Sampling(1, samples=2), 2) == [[letter] * 2 for letter in "ABCDE"]
    assert calls == [2, 2, 1]


def test_sampled_figures():
    task = Counting()
    rows = [{"answer": "4"}, {"answer": "5"}]
    samples = [[tag(4), tag(4), tag(1), "no"], [tag(1), tag(5), tag(1), tag(2)]]
    found = sampled_figures(task, samples, rows)
    assert task.strict == task.read == Counter(itertools.chain(*samples))
    assert not task.lenient
    assert found == {"pass@1": pytest.approx((2 / 4 + 1 / 4) / 2), "pass@4": 1.0, "maj@4": 0.5}


def test_summary_keeps_every_figure_of_first_and_last_evaluation():
    figures = {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "pass@4": 0.7}
    lines = [
        {"step": 0, **figures},
        {"step": 5, "accuracy": 0.9, "reward": 1.0, "rewards": {"a": 1.0, "b": None}},
        {"step": 9, **figures, "accuracy": 0.6, "reward": 3.0, "rewards": {"a": 2.0, "b": None}},
    ]
    summary = summarize(lines)
    assert (summary["before"], summary["after"]) == (figures, {**figures, "accuracy": 0.6})
    assert before_and_after(summary).rows == [
        ("accuracy", "0.500 [0.400, 0.600]", "0.600 [0.400, 0.600]"),
        ("pass@4", "0.700", "0.700"),
        ("reward, first and last tenth of the steps", "1.000", "3.000"),
        ("  a", "1.000", "2.000"),
        ("  b", "–", "–"),
    ]


# Known answers, in literal numbers


@pytest.mark.parametrize(("right", "total"), [(1, 3), (43, 100), (3, 512), (511, 512)])
def test_an_interval_ends_where_its_share_is_1_96_deviations_away(right, total):
    """Wilson's own definition: of the shares at the two ends, what was seen lies at 95 per cent's border."""
    for end in wilson(right, total):
        deviation = (end * (1 - end) / total) ** 0.5
        assert abs(right / total - end) / deviation == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize(("right", "total"), [(-1, 3), (4, 3), (0, 0)])
def test_a_share_that_cannot_be_is_an_error(right, total):
    with pytest.raises(ValueError, match="right, total"):
        wilson(right, total)


@pytest.mark.parametrize(("right", "k"), [(2, 0), (2, 6)])
def test_more_than_was_sampled_is_an_error(right, k):
    with pytest.raises(ValueError, match="k: "):
        pass_at_k(right, 5, k)


def test_both_accuracies_have_their_own_interval_of_95_percent():
    task, texts = Counting(), [tag(4), "It is 5", tag(7)]
    found = greedy_figures(task, texts, [{"answer": "4"}, {"answer": "5"}, {"answer": "6"}])
    assert found["accuracy_interval"] == pytest.approx([0.061492, 0.792340], abs=1e-6)
    assert found["accuracy_lenient_interval"] == pytest.approx([0.207660, 0.938508], abs=1e-6)


class Recorded:
    """An engine that remembers what it was asked for, and answers the first `right` problems rightly."""

    def __init__(self, right):
        self.right, self.asked, self.draws = right, [], []

    def __call__(self, prompts, sampling):
        self.asked.append((len(prompts), sampling))
        self.draws.append(torch.rand(()).item())
        return [["0"] * sampling.samples for _ in prompts]


class Zero(Countdown):
    """Whose every answer is right where the target is even."""

    def is_correct(self, completion, row):
        return row["target"] % 2 == 0


def configured(tmp_path, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text("model: {loader: scratch}\ntask: {name: countdown}\n")
    return load_config(path, list(overrides))


def test_an_evaluation_asks_for_what_the_configuration_says(tmp_path, monkeypatch):
    settings = [
        "run.evaluation.size=10", "run.evaluation.batch_size=4", "run.evaluation.samples=2", "grpo.temperature=0.6",
        "grpo.max_completion_length=9", "run.seed=3",
    ]  # fmt: skip
    config, engine = configured(tmp_path, *settings), Recorded(3)
    task = Zero(Zero.Options(), 3)
    measure = evaluator(config, task, engine)
    found = measure()
    greedy, drawn = Sampling(9, 1, 0.0), Sampling(9, 2, 0.6)
    assert engine.asked == [(4, greedy), (4, greedy), (2, greedy), *[(2, drawn)] * 5]
    right = sum(target % 2 == 0 for target in task.held_out["target"][:10])
    assert found["accuracy"] == found["pass@1"] == found["pass@2"] == right / 10
    assert found["accuracy_problems"] == 10
    assert {"accuracy_interval", "maj@2", "evaluation_seconds"} < set(found)
    first = engine.draws[3:]
    engine.draws.clear()
    torch.manual_seed(99)
    measure()
    assert engine.draws[3:] == first  # the same draws at every call, whatever was drawn before
    engine.draws.clear()
    with monkeypatch.context() as patch:
        patch.setattr("recipes.processes.rank", lambda: 1)
        evaluator(config, task, engine)()
    assert engine.draws[3:] != first  # each process draws for itself
    engine.asked.clear()
    assert "pass@1" not in measure(sampled=False)
    assert engine.asked == [(4, greedy), (4, greedy), (2, greedy)]


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        (lambda: torch.multinomial(torch.tensor([torch.nan, 1.0]), 1), "evaluation: the model has diverged"),
        (lambda: torch.ones(2) + torch.ones(3), "size of tensor"),
    ],
    ids=["nothing to sample", "another error"],
)
def test_of_what_fails_while_it_samples_a_divergence_alone_is_called_so(tmp_path, drawn, said):
    def engine(prompts, sampling):
        if sampling.temperature:
            drawn()
        return [["0"] * sampling.samples for _ in prompts]

    config = configured(tmp_path, "run.evaluation.size=2", "run.evaluation.samples=2")
    with pytest.raises(RuntimeError, match=said) as error:
        evaluator(config, Zero(Zero.Options(), 0), engine)()
    assert isinstance(error.value, Diverged) == ("diverged" in said)


def test_sampling_leaves_the_random_state_as_it_was(tmp_path):
    config = configured(
        tmp_path, "run.evaluation.size=2", "run.evaluation.samples=2", "run.evaluation.batch_size=1"
    )

    def engine(prompts, sampling):
        if sampling.samples > 1:
            torch.rand(5)
        return [["0"] * sampling.samples for _ in prompts]

    torch.manual_seed(0)
    state = torch.get_rng_state()
    evaluator(config, Zero(Zero.Options(), 0), engine)()
    assert torch.equal(torch.get_rng_state(), state)


def test_an_evaluation_takes_its_own_time(tmp_path, monkeypatch):
    class Clock:
        now = 5.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(evaluation, "time", clock)

    def engine(prompts, sampling):
        clock.now += 2.0
        return [["0"] * sampling.samples for _ in prompts]

    config = configured(tmp_path, "run.evaluation.size=2", "run.evaluation.batch_size=1")
    assert evaluator(config, Zero(Zero.Options(), 0), engine)()["evaluation_seconds"] == 4.0


def test_a_judge_that_runs_out_of_time_counts_as_wrong():
    """An evaluation's share of them is limited like a reward's."""

    def slow(completion, row):
        if completion == "slow":
            while True:
                pass
        return True

    options = Countdown.Options(reward_seconds=0.05, reward_failures=0.05)
    completions = ["quick"] * 70 + ["slow"] + ["quick"] * 2
    found = judge_all(slow, completions, [{}] * 73, options)
    assert found == [True] * 70 + [False] + [True] * 2
    with pytest.raises(RewardError, match=r"slow: did not return within 0\.05 s .* on 4 of 64 completions"):
        judge_all(slow, ["quick"] * 60 + ["slow"] * 4, [{}] * 64, options)
