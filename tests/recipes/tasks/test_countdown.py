"""Countdown: what the splits share (nothing), which answers count, and the registry that finds it."""

import pytest
from pydantic import ValidationError

from recipes.tasks import countdown, get_task, task_names
from recipes.tasks.countdown import Options, solutions, split


def test_there_are_1345_problems_and_every_solution_solves():
    assert len(solutions()) == 1345
    for problem, texts in solutions().items():
        row = {"numbers": list(problem.numbers), "target": problem.target}
        assert texts
        assert all(countdown.is_correct(text, row) for text in texts)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_held_out_prompt_is_trained_on(seed):
    options = Options()
    held_out = set(countdown.eval_dataset(options, seed)["prompt"])
    train = set(countdown.train_dataset(options, seed)["prompt"])
    shown = {prompt for prompt, _ in countdown.warm_start_examples(options, seed, 20_000)}
    assert len(held_out) == 512
    assert not held_out & train
    assert shown <= train
    assert len(held_out | train) == 6396


def test_the_seed_decides_everything():
    options = Options()
    assert countdown.train_dataset(options, 3)["prompt"] == countdown.train_dataset(options, 3)["prompt"]
    assert countdown.eval_dataset(options, 3)["prompt"] != countdown.eval_dataset(options, 4)["prompt"]
    assert countdown.warm_start_examples(options, 3, 50) == countdown.warm_start_examples(options, 3, 50)
    assert split(options, 3) != split(options, 4)


def test_train_size_caps_the_prompts():
    assert len(countdown.train_dataset(Options(train_size=10), 0)) == 10


@pytest.mark.parametrize(
    ("completion", "correct", "well_formed"),
    [
        ("3*7+5", 1.0, 1.0),
        ("5+(7*3)", 1.0, 1.0),
        (" 3*7+5 ", 1.0, 1.0),
        ("3+7+5", 0.0, 1.0),  # the right numbers, the wrong value
        ("21+5", 0.0, 0.0),  # the right value, other numbers
        ("3*7+5+0", 0.0, 0.0),
        ("3*7+5=26", 0.0, 0.0),
        ("26", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("3*7+", 0.0, 0.0),
    ],
)
def test_rewards(completion, correct, well_formed):
    columns = {"numbers": [[3, 5, 7]], "target": [26], "trainer_state": None}
    assert countdown.correct([completion], **columns) == [correct]
    assert countdown.well_formed([completion], **columns) == [well_formed]
    assert countdown.is_correct(completion, {"numbers": [3, 5, 7], "target": 26}) is bool(correct)


def test_a_number_given_twice_must_be_used_twice():
    row = {"numbers": [2, 2, 3], "target": 7}
    assert countdown.is_correct("2*2+3", row)
    assert not countdown.is_correct("2*2+3", {"numbers": [2, 3, 3], "target": 7})


def test_warm_start_shows_several_solutions_of_a_problem():
    shown = {}
    for prompt, answer in countdown.warm_start_examples(Options(), 0, 20_000):
        shown.setdefault(prompt, set()).add(answer)
    assert sum(len(answers) > 1 for answers in shown.values()) > len(shown) / 2


def test_options_are_strict():
    with pytest.raises(ValidationError):
        Options(evalproblems=3)
    with pytest.raises(ValidationError):
        Options(eval_problems="3")


def test_registry():
    assert "countdown" in task_names()
    assert "arithmetic" not in task_names()
    assert get_task("countdown") is countdown
    with pytest.raises(ValueError, match="countdown"):
        get_task("countdwn")
