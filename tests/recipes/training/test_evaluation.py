"""Intervals and estimators, compared with values from elsewhere, and a checkpoint measured by itself."""

import itertools
from collections import Counter

import pytest

from recipes.models.generation import Sampling
from recipes.tasks.countdown import Countdown
from recipes.tasks.gsm8k import Gsm8k
from recipes.tracking.summary import before_and_after, summarize
from recipes.training.evaluation import (
    complete,
    greedy_figures,
    majority,
    pass_at_k,
    sampled_figures,
    wilson,
)


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
