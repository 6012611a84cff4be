"""Intervals and estimators against values worked out otherwise, and a checkpoint measured alone."""

import itertools

import pytest
from recipes.training.accuracy import majority, pass_at_k, sampled_figures, wilson

from recipes.tasks import gsm8k
from recipes.tracking.summary import figures_before_and_after, summarize


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


def test_sampled_figures():
    def tag(value):
        return f"<answer>{value}</answer>"

    rows = [{"answer": "4"}, {"answer": "5"}]
    samples = [[tag(4), tag(4), tag(1), "no"], [tag(1), tag(5), tag(1), tag(2)]]
    found = sampled_figures(gsm8k, samples, rows)
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
    assert figures_before_and_after(summary) == [
        ("accuracy", "0.500 [0.400, 0.600]", "0.600 [0.400, 0.600]"),
        ("pass@4", "0.700", "0.700"),
        ("reward (mean of 1 logged steps)", "1.000", "3.000"),
        ("  a", "1.000", "2.000"),
        ("  b", "–", "–"),
    ]
