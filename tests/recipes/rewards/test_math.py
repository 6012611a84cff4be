"""LaTeX answers: what is equal, what hangs, and data of several shapes."""

import json
import time

import pytest

from recipes.problems import ConfigError
from recipes.rewards.math_verifier import Verifier
from recipes.tasks.math import Math, boxed_once


def make(**options):
    return Math(Math.Options(**options), 0)


TASK = make(dataset="none")


@pytest.mark.parametrize(
    ("gold", "given", "same"),
    [
        (r"\frac{1}{2}", r"so \boxed{0.5}", True),
        (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", True),
        (r"\frac{1}{2}", r"\boxed{0.6}", False),
        (r"x^2+1", r"\boxed{1 + x^{2}}", True),
        (r"(1, 2)", r"\boxed{(1,2)}", True),
        (r"3\sqrt{2}", r"\boxed{\sqrt{18}}", True),
        ("7", "The answer is 7", False),
        ("7", r"\boxed{7", False),
        ("7", "", False),
    ],
)
def test_equal_answers(gold, given, same):
    assert TASK.is_correct(given, {"answer": gold}) is same


def test_lenient_takes_an_answer_without_its_box():
    assert TASK.is_correct_lenient("The answer is $7$", {"answer": "7"})


def test_what_hangs_is_killed_and_the_next_question_is_answered():
    verifier = Verifier(seconds=2.0)
    assert verifier.same("7", r"\boxed{7}") is True
    started = time.monotonic()
    assert verifier.same("7", r"\boxed{9^{9^{9^{9}}} - 9^{9^{9}} + (7^{7^{7^{7}}})!}") in (None, False)
    assert time.monotonic() - started < 20
    verifier._process.kill() if verifier._process else None
    assert verifier.same("7", r"\boxed{7}") in (True, None)
    assert verifier.same("7", r"\boxed{7}") is True
    verifier.close()


def test_rewards():
    texts = [r"\boxed{0.5}", "0.5", r"\boxed{1} \boxed{0.5}"]
    assert TASK.correctness(texts, answer=[r"\frac{1}{2}"] * 3) == [1.0, 0.0, 1.0]
    assert boxed_once(texts) == [1.0, 0.0, 0.0]


def test_columns_are_named_in_the_options(tmp_path):
    rows = [{"q": f"What is {i}?", "solution": rf"It is \boxed{{{i}}}."} for i in range(10)]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = make(dataset=str(file), problem_column="q", answer_column="solution", held_out=4)
    train, held_out = task.train, task.held_out
    assert (len(train), len(held_out)) == (6, 4)
    assert not set(train["answer"]) & set(held_out["answer"])
    assert {*train["answer"], *held_out["answer"]} == {str(i) for i in range(10)}
    with pytest.raises(
        ValueError, match=r"task\.problem_column: no column 'problem'; the data has q, solution"
    ):
        _ = make(dataset=str(file), held_out=4).train
    with pytest.raises(ConfigError, match=r"task\.dataset: holds no train\.jsonl"):
        _ = make(dataset=str(tmp_path)).train
