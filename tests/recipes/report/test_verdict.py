"""The outcome of a run, and the step from which two runs differ."""

import math
import random

import pytest

from recipes.report.verdict import difference_of_shares, parting, student_quantile, verdict, welch_half_width
from recipes.training.evaluation import wilson


def evaluated(step, right, total=500):
    figures = {"accuracy": right / total, "accuracy_interval": list(wilson(right, total))}
    return {"step": step, **figures, "accuracy_problems": total}


def test_the_interval_is_newcombes():
    """Table II of his paper, method 10: 56 of 70 against 48 of 80, and none against none."""
    low, high = difference_of_shares(48 / 80, wilson(48, 80), 56 / 70, wilson(56, 70))
    assert (low, high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))
    low, high = difference_of_shares(0.0, wilson(0, 10), 0.0, wilson(0, 10))
    assert (low, high) == (pytest.approx(-0.2775, abs=5e-5), pytest.approx(0.2775, abs=5e-5))


@pytest.mark.parametrize(
    ("right", "kind", "words"),
    [
        (
            300,
            "better",
            "It learned: accuracy on 500 held-out problems rose from 40.0 % to 60.0 %, by 20.0 points",
        ),
        (
            210,
            "open",
            "Not shown to have learned: accuracy on 500 held-out problems went from 40.0 % to 42.0 %",
        ),
        (
            100,
            "worse",
            "It got worse: accuracy on 500 held-out problems fell from 40.0 % to 20.0 %, by 20.0 points",
        ),
    ],
)
def test_by_accuracy(right, kind, words):
    found = verdict([evaluated(0, 200), {"step": 1, "reward": 0.5}, evaluated(2, right)])
    assert found.kind == kind
    assert found.sentence.startswith(words)
    interval = difference_of_shares(0.4, wilson(200, 500), right / 500, wilson(right, 500))
    for end in interval:
        assert f"{100 * end:+.1f}".replace("-", "−") in found.sentence


def test_another_number_of_problems_is_said():
    """A resumed run may have another run.evaluation.size: then the problems are not the same."""
    found = verdict([evaluated(0, 200), {"step": 1, "reward": 0.5}, evaluated(2, 90, total=100)])
    assert found.sentence.startswith(
        "It learned: accuracy on 100 held-out problems (500 before) rose from 40.0 %"
    )
    assert "same problems" not in found.note
    first = evaluated(0, 200)
    del first["accuracy_problems"]  # as a run had it that began before it was recorded
    assert "on 100 held-out problems rose" in verdict([first, evaluated(2, 90, total=100)]).sentence
    assert "same problems" in verdict([evaluated(0, 200), {"step": 1, "reward": 0.5}, evaluated(2, 300)]).note


def rewarded(rewards):
    return [{"step": step, "reward": reward} for step, reward in enumerate(rewards, 1)]


def test_by_reward_where_accuracy_was_not_measured():
    found = verdict(rewarded([0.1, 0.2, 0.3, 0.2, 0.1] * 2 + [0.9, 0.8, 0.9, 0.8, 0.9] * 2))
    assert found.kind == "better"
    assert "from 0.180 to 0.860, by +0.680" in found.sentence
    first = sum((x - 0.18) ** 2 for x in [0.1, 0.2, 0.3, 0.2, 0.1] * 2) / 9
    last = sum((x - 0.86) ** 2 for x in [0.9, 0.8, 0.9, 0.8, 0.9] * 2) / 9
    degrees = (first + last) ** 2 / ((first**2 + last**2) / 9)  # 15.6, of which Student's t is 2.124
    assert 15.5 < degrees < 15.7
    assert f"{0.68 - 2.124 * math.sqrt((first + last) / 10):+.3f} to" in found.sentence
    assert verdict(rewarded([0.5, 0.6] * 10)).kind == "open"
    assert "from −0.500 to −0.400, by +0.100" in verdict(rewarded([-0.5] * 10 + [-0.4] * 10)).sentence


@pytest.mark.parametrize(
    ("degrees", "tabled"), [(4, 2.776), (8, 2.306), (18, 2.101), (60, 2.000), (1e6, 1.960)]
)
def test_the_quantile_is_students(degrees, tabled):
    assert student_quantile(degrees) == pytest.approx(tabled, rel=3e-3)


def student(limit, degrees, pieces=4000):
    """The probability below a limit, by Simpson's rule over Student's density."""
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    density = [(1 + (limit * i / pieces) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(pieces + 1)]
    weights = [1, *[4, 2] * (pieces // 2 - 1), 4, 1]
    return 0.5 + scale * limit / pieces / 3 * math.fsum(w * d for w, d in zip(weights, density, strict=True))


def test_every_term_of_the_quantile_is_right():
    """To what the next one, which is left out, would change: more than a wrong sign in the third does."""
    assert student(student_quantile(30), 30) == pytest.approx(0.975, abs=2e-7)
    assert student(student_quantile(100), 100) == pytest.approx(0.975, abs=2e-9)


@pytest.mark.parametrize(
    ("one", "two", "tabled", "error"),
    [
        ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10], 2.306, 1.0),  # equal scatter: 8 degrees
        ([1, 2, 3, 4, 5], [7, 7, 7, 7, 7], 2.776, 2**-0.5),  # one side alone: its 4 degrees
        ([7, 7, 7, 7, 7, 7, 7, 7, 7], [1, 2, 3, 4, 5], 2.776, 2**-0.5),
    ],
)
def test_the_half_width_has_welchs_degrees_of_freedom(one, two, tabled, error):
    assert welch_half_width(one, two) == pytest.approx(tabled * error, rel=3e-3)
    assert welch_half_width([7, 7], [8, 8]) == 0.0


def test_a_run_of_ten_steps_that_did_not_change_is_said_to_have_one_time_in_twenty():
    rng = random.Random(0)
    runs = [verdict(rewarded([rng.gauss(0.5, 0.1) for _ in range(10)])).kind for _ in range(1000)]
    assert 0.03 < 1 - runs.count("open") / 1000 < 0.065  # by a normal's quantile 0.09


def test_too_few_steps_are_not_judged():
    assert verdict(rewarded([0.1, 0.9])).sentence.startswith("Too few steps to judge: 2 with a reward.")
    assert verdict([evaluated(0, 200)]).sentence.startswith("Too few steps to judge: 0 with a reward.")


def steps(*figures):
    return [
        {"step": step, "reward": reward, "loss": loss, "rewards": {"a": reward}, "completion_length": 5.0}
        for step, (reward, loss) in enumerate(figures, 1)
    ]


def test_parting():
    run = steps((0.5, 0.1), (0.6, 0.2), (0.7, 0.3))
    assert parting("a", run, "b", run).endswith("equal to the last bit in all 3 logged steps that both have.")
    said = parting("a", run, "b", steps((0.5, 0.1), (0.6, 0.2), (0.8, 0.3)))
    assert said.startswith("a and b part at step 3,")
    assert said.endswith("every logged step before it is equal to the last bit.")
    said = parting("a", run, "b", steps((0.5, 0.1), (0.6, 0.2 + 1e-9), (0.8, 0.3)))
    assert said.startswith("a and b part at step 3,")
    assert said.endswith("differs from step 2 on.")
    said = parting("a", run, "b", steps((0.5, 0.1), (0.6, 0.2 + 1e-9)))
    assert "same rewards and lengths in all 2 logged steps" in said
    assert said.endswith("differs from step 2 on.")
    said = parting(
        "a", run, "b", steps((0.5, 0.1), (0.6, 0.2), (0.8, 0.4))
    )  # of the same step, by what was sampled
    assert said.endswith("every logged step before it is equal to the last bit.")
    said = parting("a", run, "b", steps((0.4, 0.1), (0.6, 0.2), (0.7, 0.3)))
    assert said == "a and b part at step 1, the first whose completions differ in reward or length."
    for key, other in (("completion_length", 6.0), ("clipped_share", 0.5), ("rewards", {"a": 0.65})):
        said = parting("a", run, "b", [run[0], {**run[1], "clipped_share": 0.1, key: other}, run[2]])
        assert ("part at step 2" in said) is (key != "clipped_share")  # what one of them lacks is ignored
    for key in ("loss", "grad_norm", "entropy", "kl"):
        ours, theirs = ([{**line, key: value} for line in run] for value in (0.25, 0.25 + 1e-12))
        assert parting("a", ours, "b", theirs).endswith("differs from step 1 on.")
    for key, part in (("loss", "differs from step 2 on."), ("reward", "equal to the last bit.")):
        gone = [run[0], {**run[1], key: None}, run[2]]  # NaN
        assert parting("a", run, "b", gone).endswith(part)
        assert parting("a", gone, "b", gone).endswith(
            "equal to the last bit in all 3 logged steps that both have."
        )
    assert "in the one logged step that both have" in parting("a", run, "b", run[:1])
    assert parting("a", run, "b", []) == "a and b have no logged step in common."


def test_lines_of_different_steps_are_not_compared():
    """tracking.logging_every: a line is a mean over the steps since the one before."""
    run = steps((0.5, 0.1), (0.6, 0.2), (0.7, 0.3), (0.8, 0.4))
    means = [{**line, "steps": 2} for line in steps((0.0, 0.0), (0.55, 0.15), (0.0, 0.0), (0.75, 0.35))[1::2]]
    said = parting("a", run, "b", means)
    assert said == "a and b were logged over different steps (tracking.logging_every): nothing to compare."
    first = parting("a", run, "b", [run[0], {**means[0], "steps": 1, "step": 3}, means[1]])
    assert first.startswith("a and b part at step 3,")
    assert "in the one logged step that both have" in parting("a", run, "b", [run[0], *means])
