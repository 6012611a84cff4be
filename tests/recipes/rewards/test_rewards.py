"""The contract of a reward function: before training every breach is named, during training it costs completions."""

import time

import pytest
from tiny import tiny_trainer

from recipes.problems import ConfigError
from recipes.rewards.contract import (
    FIRST_VERDICT,
    Guarded,
    RewardError,
    RewardOptions,
    check,
    choose,
    guard,
    problems,
)
from recipes.rewards.time_limit import TimeLimitReached, time_limit
from recipes.tasks.gsm8k import Gsm8k

ROWS = [{"prompt": f"p{i}", "answer": str(i)} for i in range(3)]
KNOWN = Gsm8k(Gsm8k.Options(), 0).rewards
TEXTS = ["zero", "one", "two"]


def one(completions, **_):
    return [1.0] * len(completions)


def test_the_weighed_functions_in_the_order_of_their_weights():
    known = {"one": one, "two": len, "three": max}
    assert list(choose({"three": 2.0, "one": 0.0}, known).items()) == [("three", max), ("one", one)]


@pytest.mark.parametrize(
    ("rewards", "line"),
    [
        (
            {"correct": 1.0},
            "task.rewards.correct: is no reward of this task (value 1); use tag_count, soft_format, strict_format",
        ),
        ({"correctness": 0.0}, "task.rewards: weighs nothing (value {'correctness': 0.0}); give one"),
        ({}, "task.rewards: weighs nothing (value {}); give one"),
    ],
)
def test_a_wrong_choice_is_one_problem(rewards, line):
    (problem,) = problems(rewards, KNOWN)
    assert problem.line("").startswith(line)


def test_a_function_that_is_not_there_is_a_config_error():
    with pytest.raises(
        ConfigError, match=r"task\.rewards: cannot be imported .*\(value 'nowhere.found'\); put a fun"
    ):
        choose({"nowhere.found": 1.0}, KNOWN)


def test_a_function_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text(
        "def brevity(completions, **columns):\n    return [-0.01 * len(text) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    functions = choose({"my_own_rewards.brevity": 0.1}, KNOWN)
    assert check(functions, ROWS, TEXTS, 5.0) == {"my_own_rewards.brevity": [-0.04, -0.03, -0.03]}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, **_: [1.0], r"reward it: returned 1 values for 3 .* 'zero'"),
        (lambda completions, **_: 1.0, r"reward it: returned 1\.0; return a list .* 'zero'"),
        (lambda completions, **_: ["a"] * len(completions), r"return a list"),
        (lambda completions, **_: [float("nan") if t == "one" else 0 for t in completions], r"nan; .* 'one'"),
        (
            lambda completions, **_: [1 / (t != "two") for t in completions],
            r"raised ZeroDivisionError.*'two'",
        ),
        (
            lambda completions, **_: [time.sleep(9 * (t == "one")) for t in completions],
            r"within 0\.2 s .*'one'",
        ),
    ],
)
def test_every_breach_names_function_and_completion(function, message):
    with pytest.raises(RewardError, match=message):
        check({"it": function}, ROWS, TEXTS, 0.2)


def test_columns_and_none_pass():
    def judge(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric):
        log_metric("x", 1.0)
        return [None if given == "0" else float(given) for given in answer]

    assert check({"judge": judge}, ROWS, TEXTS, 1.0) == {"judge": [None, 1.0, 2.0]}


def spin():
    while True:
        pass


def test_the_limit_ends_a_busy_loop_and_nothing_after_it():
    with pytest.raises(TimeLimitReached), time_limit(0.1):
        spin()
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_a_failure_costs_its_completion_and_is_counted():
    def fragile(completions, answer, **_):
        assert len(completions) == len(answer)
        return [1.0 / (len(text) - 3) for text in completions]

    logged = {}
    guarded = Guarded("fragile", fragile, 1.0, share=0.7)
    columns = {"answer": ["a", "b", "c"], "log_metric": logged.__setitem__}
    assert guarded(completions=["four", "one", "two"], **columns) == [1.0, None, None]
    assert (guarded.scored, guarded.failed, logged) == (3, 2, {"reward_failures/fragile": 2.0})
    with pytest.raises(RewardError, match=r"failed on 5 of 6 completions, .*reward_failures 0\.7.*'two'"):
        guarded(completions=["one", "one", "two"], **columns)


def test_one_failure_early_on_does_not_stop_the_run():
    def fragile(completions, **_):
        return [1.0 / (text != "bad") for text in completions]

    guarded = Guarded("fragile", fragile, 1.0, share=0.05)
    assert guarded(completions=["bad", *["good"] * 7])[0] is None
    for _ in range(FIRST_VERDICT):
        guarded(completions=["good"] * 8)
    assert guarded(completions=["bad", *["good"] * 7])[0] is None


def test_trl_trains_on_with_a_reward_that_fails_now_and_then(tmp_path, memhead_in_trl):
    calls = []

    def fragile(completions, **_):
        calls.append(len(completions))
        return [1.0 / (not text.startswith("0")) for text in completions]

    def length(completions, **_):
        return [float(len(text)) for text in completions]

    options = RewardOptions(reward_failures=1.0)
    trainer = tiny_trainer(tmp_path, steps=4)
    trainer.reward_funcs = guard({"fragile": fragile, "length": length}, options)
    trainer.reward_func_names = ["fragile", "length"]
    trainer.train()
    lines = [line for line in trainer.state.log_history if "rewards/fragile/mean" in line]
    assert len(lines) == 4
    failed = sum(line["reward_failures/fragile"] for line in lines)
    assert failed == trainer.reward_funcs[0].failed
    assert failed > 0
