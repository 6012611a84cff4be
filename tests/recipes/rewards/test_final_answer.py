"""Numbers as people write them, each kind with a right and a wrong value, read in linear time."""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from recipes.rewards.final_answer import boxed, boxes, lenient_answer, numbers, strict_answer, text_of
from recipes.tasks.gsm8k import Gsm8k

DATA = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"
GSM8K = Gsm8k(Gsm8k.Options(), 0)
CASES = Path(__file__).parents[4] / "shared" / "cases" / "final_answers.jsonl"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"7\frac{1}{4}", "29/4"), (r"$-2\dfrac{2}{3}$", "-8/3"), (r"6\tfrac34", "27/4"), ("8¾", "35/4"),
        ("⅔", "2/3"),
        ("4 ⅛ miles", "33/8"), (r"\frac34", "3/4"), (r"\frac3{4}", "3/4"), (r"\frac{3}4", "3/4"),
        (r"\frac{-3}{4}", "-3/4"),
        (r"-\frac{3}{4}", "-3/4"), (r"\frac{2.5}{5}", "1/2"), ("3 / 8", "3/8"), ("2 125/200", "21/8"),
        ("1 500/3", "500"),
        ("2e4", "20000"), ("7.5E-2", "3/40"), (r"3\times10^4", "30000"), ("3 × 10⁴", "30000"),
        (r"2 \cdot 10^{-1}", "1/5"),
        ("10^3", "1000"), ("10²", "100"), ("2**5", "32"), ("3_000", "3000"), ("25_000_000", "25000000"),
        ("7k", "7000"),
        ("$2.5M", "2500000"), ("$3 M", "3000000"), ("4bn", "4000000000"), ("3.5 billion", "3500000000"),
        ("1/2 million", "500000"), (r"2\text{ thousand}", "2000"), ("90 ft^2", "90"), (r"90\text{ ft}^{2}", "90"),
        ("3.2 m/s^2", "3.2"), ("6 s^{-1}", "6"), ("6 m²", "6"), ("40 000", "40000"), ("1 234 567.5", "1234567.5"),
        (r"40\ 000", "40000"), (r"40\,000", "40000"), ("40\u202f000", "40000"), ("40'000", "40000"),
        ("40’000", "40000"),
        ("12,34,567", "1234567"), ("minus 8", "-8"), ("negative 8", "-8"), ("Minus $8", "-8"), ("\u20118", "-8"),
        ("- $8", "-8"), ("- 8", "-8"), ("60^{\\circ}", "60"), ("20 km/h", "20"), ("5 dozen", "5"), ("401 k", "401"),
        (r"\frac{\$10}{4}", "5/2"), ("__18__", "18"), ("_-3_", "-3"), ("4 and 1/3 cups", "13/3"),
        ("6 and a half", "13/2"),
        ("2 and a quarter hours", "9/4"), (r"5{\frac{1}{2}}", "11/2"), ("4¹⁄₃", "13/3"), (r"{3 \over 4}", "3/4"),
        (r"3\over 4", "3/4"), (r"\nicefrac{3}{4}", "3/4"), (r"7\sfrac14", "29/4"), ("-(3/4)", "-3/4"), ("- (6)", "-6"),
        ("2.5⋅10^3", "2500"), ("2.5 X 10^3", "2500"), (r"4\times{10}^{2}", "400"), ("{7}", "7"), ("0,25", "1/4"),
        ("—7", "-7"), ("3 lakh", "300000"), ("2 crores", "20000000"), ("3 hundred thousand", "300000"),
        ("10 bn", "10000000000"), ("4 and one half", "9/2"), ("6 and three-quarters", "27/4"),
        ("3 and two thirds cups", "11/3"), (r"x\approx3.5", "7/2"), (r"\approx 3.5", "7/2"), (r"\Rightarrow12", "12"),
        (r"x\le7", "7"), (r"\quad 8", "8"), (r"\quad8", "8"), (r"3\times10^{4}", "30000"),
        ("1.234,5", "2469/2"), ("2.345.678", "2345678"), ("-2.345.678,90 m", "-234567890/100"),
        ("1 234,50", "2469/2"),
        ("1'234,5", "2469/2"), ("€3,50", "7/2"), ("3,50 €", "7/2"), ("USD12", "12"), ("Rs500", "500"),
        ("2.5million", "2500000"), ("12 apples, not 13", "12"), (r"4, since x \neq 3", "4"), ("4 ≠ 5", "4"),
    ],
)  # fmt: skip
def test_one_number_however_it_is_written(text, value):
    assert numbers(text) == [Fraction(value)]
    assert strict_answer(f"<answer>\n{text}\n</answer>") == Fraction(value)
    assert lenient_answer(rf"I count 99. So \boxed{{{text}}}") == Fraction(value)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("(9 - 4)", [9, 4]), ("ages 10 - 15", [10, 15]), ("10 -15", [10, 15]), ("$10 - $15", [10, 15]),
        ("9 minus 4", [9, 4]), (r"2\times3", [2, 3]), (r"12\div4", [12, 4]), (r"5\pm1", [5, 1]),
        ("9 apples - 4 apples", [9, 4]), ("10 m^2 - 4 m^2", [10, 4]), ("from 10 to -5", [10, -5]),
        ("3 * -5", [3, -5]),
        ("---\n18", [18]), ("1,2", [1, 2]), ("1,234,5", [1, 234, 5]), ("100,23,456", [100, 23, 456]),
        ("2020 100", [2020, 100]), ("0 500", [0, 500]),
        ("3 200-gram bars", [3, 200]), ("5'11", [5, 11]), ("18, 20 and 22", [18, 20, 22]),
        ("20 hundred-dollar bills", [20]), ("9-(4)", [9, 4]), ("the total—5 apples", [5]), ("3 and 4", [3, 4]),
        ("3 apples and 1/2 of a pear", [3, Fraction(1, 2)]), ("1,0", [1, 0]),
        ("5kg and 3km", [5, 3]), ("4 x 10 = 40", [4, 10, 40]), ("**5** and **6**", [5, 6]),
        ("the total minus 5", [5]),
        ("0x1F", []), ("0b11", []), ("12/25/2020", []), ("1.2.3", []), ("1/0", []), ("0^{-1}", []),
        ("10^999999999", []),
        ("1e999", []), ("H2O", []), ("x_1", []), ("٣٤", []), ("３４", []), (r"\frac{x}{2}", []), ("9" * 41, []),
        ("1.234,567", [Fraction(617, 500), 567]), ("1.234", [Fraction(617, 500)]), ("1.23.456", []), ("3,50", [3, 50]),
        ("not 5", []), ("it isn't $5", []), ("knot 5", [5]), ("at 3:45", []), ("12:30:15", []), ("3:4", [3, 4]),
        ("10,000 123,4", [10000, 123, 4]), ("1 234,567", [1, 234567]),
        ("e^{5}", []), ("-10,20", [-10, 20]), ("-1,2,3", [-1, 2, 3]), ("-1,000", [-1000]), ("-1 20", [-1, 20]),
    ],
)  # fmt: skip
def test_several_numbers_or_none(text, values):
    assert numbers(text) == values


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} or \boxed{2}", "2"), (r"\boxed {7}", "7"), (r"so $\boxed 7$.", "7"), (r"\boxed7", "7"),
        (r"$\boxed\frac12$ is it", r"\frac12"), (r"\boxed{7}, not \boxed{}", "7"), (r"\boxed{\{1\}", None),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."), (r"\boxed{7} \boxed{8", None), (r"\fbox{7}", "7"),
        (r"\boxedness{7}", None), ("7", None), (r"\boxed 7.5. Done", "7.5"), (r"\boxed{\boxed{7}}", "7"),
    ],
)  # fmt: skip
def test_the_last_box_with_something_in_it(text, content):
    assert boxed(text) == content


def test_texts_of_chat():
    assert text_of([{"role": "assistant", "content": None, "tool_calls": []}, {"content": "4"}]) == "4"


UNITS = (
    "1", "1,", "1,1", "1,111,", "1 ", "1 111 ", "1 1/", "1/", "-", "-$", "minus ", "1^", "^{", "1^{", "1e",
    "1 x 10", "\\frac",
    "\\frac{", "\\frac{1", "\\frac{1}{", "\\text{", "\\boxed{", "\\boxed ", "\\boxed{}", "{", "}", "<answer>", "####",
    "<answer>1</answer>", "3½", "1.", "1'111", "1_111", " million", "1\\,", "1**", "a- 1", "10 × 10³", "1⁰",
    "٣", "0xf", "\n", "-(1", "{1", "1 and 1/2 ", "1 and a ", "1\\over ", "1 million ", "¹", "1⁄₂", "—",
    "1.111", "1.111,", "€1,11", "not ", "1:11", "1 111,1", "USD",
)  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_eight_times_the_text_takes_about_eight_times_as_long(unit):
    def took(length):
        text = unit * (length // len(unit)) + "x"
        started = time.process_time()
        lenient_answer(text), strict_answer(f"<answer>{text}</answer>"), boxes(text)
        return time.process_time() - started

    short = max(min(took(5_000) for _ in range(5)), 0.0025)
    # A step of quadratic time would make it sixty-four; on a busy machine linear ones have made it thirty.
    assert any(took(40_000) < 45 * short for _ in range(5))


def test_a_megabyte_is_read_at_once():
    started = time.process_time()
    assert strict_answer(f"<answer>{'1,111,' * 170_000}1</answer>") is None
    assert lenient_answer("1 apple, " * 110_000 + "18") == 18
    assert time.process_time() - started < 30


TEMPLATES = (
    "<reasoning>\nOne by one.\n</reasoning>\n<answer>\n{}\n</answer>\n", "<answer>{}</answer>",
    "<answer>${}</answer>",
    "<answer>{} dollars</answer>", "<answer>{}%</answer>", "<answer>**{}**</answer>", "<answer>x = {}</answer>",
    "<answer>\\boxed{{{}}}</answer>", "<answer>{}.00</answer>", "<answer>{} m^2</answer>", "<answer>({})</answer>",
)  # fmt: skip
PROSE = (
    "#### {}",
    "The answer is {}.",
    "\\boxed{{{}}}",
    "That makes 3 + 4 = {} apples.",
    "It costs ${}.00, not a cent more",
)


@pytest.mark.skipif(not DATA.is_dir(), reason="GSM8K is not beside this checkout (shared/data/gsm8k)")
def test_every_third_answer_of_the_real_data_in_every_form():
    lines = (DATA / "test.jsonl").read_text().splitlines()
    for row in map(json.loads, lines[::3]):
        reasoning, _, gold = row["answer"].rpartition("#### ")
        for template in (*TEMPLATES, *(reasoning + prose for prose in PROSE)):
            text = template.format(gold)
            tagged = template in TEMPLATES
            assert GSM8K.is_correct(text, {"answer": gold}) is tagged, text
            assert GSM8K.is_correct_lenient(text, {"answer": gold}), text
            other = {"answer": str(Fraction(gold.replace(",", "")) + 1)}
            assert not GSM8K.is_correct(text, other), text
            assert not GSM8K.is_correct_lenient(text, other), text


@pytest.mark.skipif(not CASES.is_file(), reason="the cases are not beside this checkout (shared/cases)")
def test_the_cases_beside_this_checkout():
    for case in map(json.loads, CASES.read_text().splitlines()):
        row = {"answer": case["gold"]}
        judges = {"strict": GSM8K.is_correct, "lenient": GSM8K.is_correct_lenient}
        for name, judge in judges.items():
            assert name not in case or judge(case["completion"], row) is case[name], case


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<answer>1</answer> #### 2 \\boxed{3} and 4", 3),
        ("<answer>1</answer> and 4\n#### 2", 2),
        ("<answer>1</answer> and 4", 1),
        ("1 and 4", 4),
    ],
)
def test_of_several_forms_the_plainest_is_the_answer(text, value):
    assert lenient_answer(text) == value
