"""LaTeX answers: what is equal, what hangs, and data of several shapes."""

import json
import os
import time
from pathlib import Path

import pytest

from recipes.problems import ConfigError
from recipes.rewards.final_answer import boxed
from recipes.rewards.latex import gold_text
from recipes.rewards.math_verifier import Verifier
from recipes.rewards.time_limit import TimeLimitReached, time_limit
from recipes.tasks.math import Math, boxed_once


def make(**options):
    return Math(Math.Options(**options), 0)


TASK = make(dataset="none")

CASES = Path(__file__).parents[4] / "shared" / "cases" / "math_answers.jsonl"


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
    task = make(dataset=str(file), columns={"problem": "q", "answer": "solution"}, held_out=4)
    train, held_out = task.train, task.held_out
    assert (len(train), len(held_out)) == (6, 4)
    assert not set(train["answer"]) & set(held_out["answer"])
    assert {*train["answer"], *held_out["answer"]} == {str(i) for i in range(10)}
    with pytest.raises(
        ConfigError, match=r"task\.columns\.problem: .*all\.jsonl, row 1: lacks 'problem', has q, solution"
    ):
        _ = make(dataset=str(file), held_out=4).train
    with pytest.raises(ConfigError, match=r"task\.dataset: holds no train\.jsonl"):
        _ = make(dataset=str(tmp_path)).train


@pytest.fixture(scope="module")
def verifier():
    verifier = Verifier(seconds=20.0)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("gold", "given", "same"),
    [
        ("$3$;$4$", "4", False), ("$3$;$4$", "3;4", True), ("$3$;$4$", "3, 4", True), ("$3$;$4$", "3 and 4", True),
        ("$3$; $4$", "3;5", False), ("(1) $3$ (2) $4$", "4", False), ("(1) $3$; (2) $4$", "3;4", True),
        ("3; 4", "4", False),
        ("(a) $3$ (b) $4$", "3,4", True), ("$a=3$; $b=4$", "b=4", False), ("$a=3$; $b=4$", "b=4, a=3", True),
        ("$3$, $4$", "4,3", True), ("3", "3;4", False), ("3", "3 or 4", False),
        ("The mean is $3/8$.", "3/8", True), ("The mean is $3/8$.", "8", False), ("36 $km^{2}$", "36", True),
        ("36 $km^{2}$", "36 km^2", True), ("36 $km^{2}$", "2", False), ("The roots are $2$ and $3$.", "3,2", True),
        ("The value of $x$ is $7$.", "7", True), (r"We find $\boxed {7}$.", "7", True),
        (r"We find $\boxed 7$.", "8", False),
        ("7", "7 apples", True), ("7", r"\text{7 apples}", True), ("75", "75°", True), ("75", "75 degrees", True),
        ("7", "7 m^2", True), ("7", r"7\text{ m}^2", True), ("7", "7.", True), ("7", r"\text{I found }7", True),
        ("7", "7x", False), ("7", "7 x", False), ("7xy", "7", False),
        ("7", r"7\text{ apples and }8\text{ pears}", False),
        ("-7", "–7", True), ("7", "–7", False), ("-7", "−7", True), ("7", r"\mathbf{7}", True), ("7", "**7**", True),
        ("2000", r"2\,000", True), ("2000", r"2\ 000", True), ("2 000", "2000", True), ("2000", "2{,}000", True),
        (r"\frac{7}{3}", "2 1/3", True), (r"\frac{7}{3}", "2⅓", True), (r"\frac{\pi}{3}", "pi/3", True),
        ("3\\pi", "3*pi", True),
        (r"2\sqrt{3}", "2*sqrt(3)", True), (r"\frac{1}{60!}", r"\frac{1}{61!}", False), ("3^{-70}", "3^{-71}", False),
        (r"\frac{1}{3^{70}}", "3^{-70}", True), ("0.00001", "0.000011", False), ("0", "10^{-9}", False),
        ("2^{1000}", "2^{1000}+1", False), ("2^{1000}", "4^{500}", True), ("50!", r"50 \cdot 49!", True),
        ("7", "8=7", False),
        ("7", "3+4=7", True), ("7", "x=7", True), ("7", "x=3+4=7", True), ("7", "f(2)=7", True),
        ("1,2,3", "3,2,1", True),
        ("C", r"\text{(C)}", True), ("50", r"50\%", True), ("[0,2)", "[0,2]", False), (r"\{1,2\}", r"\{2,1\}", True),
        ("(3,-1)", "(-1,3)", False), (r"\text{Tuesday}", "Tuesday", True),
        (r"\text{Tuesday}", "Monday", False), ("7", "", False),
        ("(2^{-81}, 1)", "(2^{-80}, 1)", False), ("(2^{-81}, 1)", r"(\frac{1}{2^{81}}, 1)", True),
        (r"\{1, \frac{1}{30!}\}", r"\{\frac{1}{31!}, 1\}", False), ("2^{-81}, 1", "1, 2^{-81}", True),
        ("[0,1]", "[10^{-9},1]", False), ("x=0", "x=10^{-9}", False), ("x=0, y=2", "x=10^{-9}, y=2", False),
        (r"\begin{pmatrix}0\\1\end{pmatrix}", r"\begin{pmatrix}10^{-9}\\1\end{pmatrix}", False),
        ("The sum is $3+5=8$.", "8", True), ("The sum is $3+5=8$.", "3", False),
        ("① $5$ ② $10$", "10", False), ("① $5$ ② $10$", "5; 10", True),
        ("Part (a): $5$, part (b): $10$", "10", False), (r"$\text{(1) }5\quad\text{(2) }10$", "5, 10", True),
        ("The answer is (C).", "C", True), ("The answer is (C).", "D", False), ("The answer is -5.", "-5", True),
        ("The interval is [0,1).", "[0,1)", True), ("24 cm2", "24", True), ("f (x)", "x", False),
        ("0.00001", "1e-5", True), ("1500", "1.5e3", True), ("1000", "1_000", True), ("5", "101_2", False),
        (r"\frac{1}{11}", r"0.\overline{09}", True), (r"0.1\overline{6}", "1/6", True),
        ("1) $5$ 2) $6$", "6", False), ("1) $5$ 2) $6$", "5;6", True), ("7", "€7", True), ("7", "__7__", True),
        ("7", "`7`", True),
        ("7", "≈7", True), (r"\frac{2}{7}", r"\nicefrac{2}{7}", True), (r"\frac27", "²⁄₇", True),
        (r"\frac27", r"\frac{\text{2}}{\text{7}}", True), ("-7", r"\text{negative }7", True), ("7", "minus 7", False),
        ("100000", "1,00,000", True), ("1,20,300", "300,20,1", True), ("2000000", "2 million", True),
        ("3+2i", r"3+2\mathrm{i}", True), ("i", r"\sqrt{-1}", True), ("e^{i\\pi}", "-1", True), ("i", "-i", False),
        ("110_2", "110_3", False), ("110_2", "110_{2}", True), ("110_2", "6_{10}", True),
        (r"\emptyset", r"\varnothing", True), ("[2,5)", r"2\le x<5", True), (r"(2,\infty)", "x>2", True),
        ("2<x<5", "5>x>2", True),
        ("[2,5)", r"2\le x\le5", False), (r"\{x|x>2\}", r"\{x \mid x>2\}", True), ("10:45", r"10{:}45", True),
        (r"\frac{-1\pm\sqrt{5}}{2}", r"\frac{-1-\sqrt5}{2},\frac{-1+\sqrt5}{2}", True),
        (r"x=\frac{1\pm\sqrt{5}}{2}", r"\frac{1+\sqrt5}{2}", False), (r"\text{June 6}", "July 6", False),
        (r"\text{June 6}", "June 6", True), ("6", "June 6", False), (r"5\text{ hours }30\text{ minutes}", "5", False),
        (r"(I) $\frac14$ (II) $5$", "5", False), (r"(A) $\frac14$ (B) $5$", r"\frac14; 5", True),
        ("1. $4$ 2. $5$", "5", False),
        ("Part 1: $4$; Part 2: $5$", "4, 5", True), ("$4$；$5$", "5", False), ("(1) $4$，(2) $5$", "4;5", True),
        (r"2.5\times10^6", "2.5 x 10^6", True), ("x^2+y^2=4", "x^2+y^2-4=0", True), ("x^2+y^2=4", "x^2+y^2=2", False),
        (r"x<1\text{ or }x>2", r"(-\infty,1)\cup(2,\infty)", True), (r"x\in[1,2]", r"1\le x\le2", True),
        ("(2,5)", r"\{2,5\}", False), ("5:3", r"5\colon 3", True), (r"\text{infinitely many}", "infinitely many", True),
        ("1 hour 30 minutes", r"1\text{ hour }30\text{ minutes}", True),
        ("1 hour 30 minutes", "1 hour 20 minutes", False),
        ("7", r"\color{red}{7}", True), ("7", r"\textcolor{blue}{7}", True), ("7", r"\large{7}", True),
        ("7", r"\Large 7", True),
        (r"\log 2", "log(2)", True), (r"\frac12", "sin(pi/6)", True), ("e^2", "exp(2)", True), ("5", r"\[5\]", True),
        ("5", r"\ge 5", False), ("5", "<5", False), ("5", "≠5", False), ("5", r"x\neq5", False),
        ("5", r"\text{not }5", False),
        (">5", "x>5", True), (r"\ge5", r"\geq 5", True), (r"\ge5", "5", False), (r"\approx12", "12", True),
        ("5", "~5", True),
        ("2500000", r"\frac{5 million}{2}", True), ("2000", r"\sqrt{4 million}", True),
        ("1:2", "0.5", True), ("1:2", r"\frac12", True), ("2:4:2", "1:2:3:1", False),
        ("3:4:5", "6:4:5", False), ("AB", "BA", True), (r"x \equiv 3", "3", True),
        ("3:4:5", "3:5:4", False), ("3:4:5", "3 : 4 : 5", True), ("3:4:5", "6:8:10", True), ("1:2:3", "1:2", False),
        (r"5\text{ million}", "5000000", True), (r"\$5\text{ million dollars}", "5,000,000", True),
        ("700", "7 hundred", True), ("12000000", r"12\mathrm{~million}", True), ("5", r"5\text{ million}", False),
        ("15 units$^2$", "15", True), ("15", "15 meters^2", True), ("15", r"15\text{ inches}^{3}", True),
        (r"x \equiv 3 \pmod{7}", r"x\equiv 3\pmod{8}", False), (r"x\equiv3\pmod7", r"x \equiv 3\ (\mod 7)", True),
        ("BAD", "ABD", False), ("BAD", r"\text{BAD}", True), ("2AB", "2BA", True),
        ("12.5", r"12.5\%", True), (r"12.5\%", "12.5", True), (r"33\frac13\%", r"33\frac13", True),
        ("12.5", "12.6%", False),
    ],
)  # fmt: skip
def test_answers_as_people_write_them(verifier, gold, given, same):
    assert verifier.same_answer(gold, given) is same


@pytest.mark.parametrize(
    ("gold", "text", "same"),
    [
        ("4", "The answer is 4 4/5.", False), ("24/5", "The answer is 4 4/5.", True),
        ("-5", "The answer is –5.", True),
        ("$5$;$10$", "The answers are $5$ and $10$.", True), ("$5$;$10$", "The answer is $10$.", False),
        ("5", r"Thus $\boxed{5}$." + " I look at it once more." * 400, True),
        ("5", "The sum of 3 and 4 comes first." + " I look at it once more." * 400 + " The answer is 5.", True),
        ("7", "The answer is 7." + " I look at it once more." * 400 + " The answer is 5.", False),
    ],
)  # fmt: skip
def test_answers_without_the_form(verifier, gold, text, same):
    assert verifier.same(gold, text) is same


def test_what_is_too_long_is_no_answer(verifier):
    assert verifier.same_answer("5", "I do not know " * 200 + "$5$") is False
    assert verifier.same_answer(r"\frac12", r"\frac{" * 500 + "1" + "}{2}" * 500) is False


def test_lenient_is_never_stricter_than_strict():
    for text in (r"\boxed{5}", r"\boxed{5} and then \boxed{}", r"\boxed{5}, for 6 and $7$", r"$\boxed 5$"):
        assert TASK.is_correct(text, {"answer": "5"})
        assert TASK.is_correct_lenient(text, {"answer": "5"})


HANGS = r"9^{9^{9^{9}}} - 9^{9^{9}} + (7^{7^{7^{7}}})!"


def test_a_limit_around_a_comparison_shifts_no_other_answer():
    verifier = Verifier(seconds=30.0)
    assert verifier.same_answer("8", "7.0") is False
    for _ in range(2):
        with pytest.raises(TimeLimitReached), time_limit(0.3):
            verifier.same_answer("7", HANGS)
        # The late verdict of that one must not be read as the next one's.
        answers = [verifier.same_answer("7", given) for given in ("7.0", "8.0", "7.00", "9")]
        assert answers == [True, False, True, False]
    verifier.close()


def test_a_batch_with_one_that_hangs_keeps_the_others_verdicts():
    task = make(dataset="none")
    task.__dict__["_verifier"] = verifier = Verifier(seconds=1.0)  # a cached_property
    texts = [rf"\boxed{{{answer}}}" for answer in ("7.0", HANGS, "8.0", "7.00")]
    values = task.correctness(texts, answer=["7"] * 4)
    assert (values[0], values[2], values[3]) == (1.0, 0.0, 1.0)
    assert values[1] in (None, 0.0)
    assert not task.is_correct(texts[1], {"answer": "7"})  # no verdict is not right
    verifier.close()


class Silent:
    """Never has a verdict in time."""

    def same(self, gold, completion):
        return None

    same_answer = same


def test_no_verdict_in_time_is_neither_right_nor_a_reward():
    task = make(dataset="none")
    task.__dict__["_verifier"] = Silent()
    assert task.is_correct(r"\boxed{7}", {"answer": "7"}) is False
    assert task.is_correct_lenient(r"\boxed{7}", {"answer": "7"}) is False
    assert task.correctness([r"\boxed{7}", "7"], answer=["7", "7"]) == [None, 0.0]


def test_ctrl_c_for_the_whole_group_does_not_reach_the_process(verifier):
    assert verifier.same_answer("7", "7.0") is True
    process = verifier._process
    assert os.getsid(process.pid) != os.getsid(0)
    process.kill()
    process.wait()
    assert verifier.same_answer("7", "7.0") is True


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x", "x"),
        (2, "2"),
        (27.0, "27"),
        (1e-05, "0.00001"),
        (12345678901234567890123, "12345678901234567890123"),
    ],
)
def test_numbers_of_the_data_as_text(value, text):
    assert gold_text(value) == text


def both_splits(task):
    return task.train, task.held_out


@pytest.mark.parametrize("value", [None, ["2", "3"], {"a": 1}, True, float("nan"), "", "  "])
def test_an_answer_that_is_no_text_is_refused_by_its_row(value, tmp_path):
    file = tmp_path / "all.jsonl"
    rows = [{"problem": str(i), "answer": "1"} for i in range(6)]
    rows[2]["answer"] = value
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"task\.dataset: .*row 3: column 'answer' is .*; (fill|write)"):
        both_splits(make(dataset=str(file), held_out=2))


@pytest.mark.skipif(not CASES.is_file(), reason="the cases are not beside this checkout (shared/cases)")
def test_the_cases_beside_this_checkout():
    for case in map(json.loads, CASES.read_text().splitlines()):
        if case.get("error") is True:
            with pytest.raises(ValueError, match="is "):
                gold_text(case["gold"])
            continue
        gold = gold_text(case["gold"])
        row = {"answer": boxed(gold) or gold}
        judges = {"strict": TASK.is_correct, "lenient": TASK.is_correct_lenient}
        for name, judge in judges.items():
            assert name not in case or judge(case["completion"], row) is case[name], case
