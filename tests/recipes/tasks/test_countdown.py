"""Countdown: what the splits share (nothing), which answers count, and the registry that finds it."""

import pytest
from pydantic import ValidationError

from recipes.tasks import get_task, task_names
from recipes.tasks.countdown import Countdown, solutions, well_formed

Options = Countdown.Options


def make(seed=0, **options):
    return Countdown(Options(**options), seed)


def test_there_are_1345_problems_and_every_solution_solves():
    task = make()
    assert len(solutions()) == 1345
    for problem, texts in solutions().items():
        row = {"numbers": list(problem.numbers), "target": problem.target}
        assert texts
        assert all(task.is_correct(text, row) for text in texts)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_held_out_prompt_is_trained_on(seed):
    task = make(seed)
    held_out, train = set(task.held_out["prompt"]), set(task.train["prompt"])
    shown = {prompt for prompt, _ in task.warm_start_examples(20_000)}
    assert len(held_out) == 512
    assert not held_out & train
    assert shown <= train
    assert len(held_out | train) == 6396


def test_the_seed_decides_everything():
    assert make(3).train["prompt"][:] == make(3).train["prompt"][:]
    assert make(3).held_out["prompt"][:] != make(4).held_out["prompt"][:]
    assert make(3).train["prompt"][:] != make(4).train["prompt"][:]
    assert make(3).warm_start_examples(50) == make(3).warm_start_examples(50)


def test_train_size_is_of_grpo_warm_start_and_tokenizer_alike():
    task = make(train_size=10)
    prompts = task.train["prompt"][:]
    assert prompts == make().train["prompt"][:10]
    assert {prompt for prompt, _ in task.warm_start_examples(500)} == set(prompts)
    assert task.corpus() == prompts


@pytest.mark.parametrize(
    ("completion", "correct", "formed"),
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
def test_rewards(completion, correct, formed):
    columns = {"numbers": [[3, 5, 7]], "target": [26], "trainer_state": None}
    assert make().correct([completion], **columns) == [correct]
    assert well_formed([completion], **columns) == [formed]
    assert make().is_correct(completion, {"numbers": [3, 5, 7], "target": 26}) is bool(correct)


def test_a_number_given_twice_must_be_used_twice():
    row = {"numbers": [2, 2, 3], "target": 7}
    assert make().is_correct("2*2+3", row)
    assert not make().is_correct("2*2+3", {"numbers": [2, 3, 3], "target": 7})


def test_warm_start_shows_several_solutions_of_a_problem():
    shown = {}
    for prompt, answer in make().warm_start_examples(20_000):
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
    assert get_task("countdown") is Countdown
    with pytest.raises(ValueError, match="countdown"):
        get_task("countdwn")
