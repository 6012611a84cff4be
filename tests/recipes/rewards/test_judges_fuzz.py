"""Every judge against arbitrary text: no exception, no hang, and no verdict that contradicts another."""

import re
import time
from fractions import Fraction

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from recipes.rewards.arithmetic import ExpressionError, parse
from recipes.rewards.call import MAX_REWARD, Fault, call, one_line, show
from recipes.rewards.final_answer import boxed, boxes, lenient_answer, numbers, strict_answer
from recipes.rewards.latex import MAX_ANSWER, gold_text, parts, plain
from recipes.tasks.char_count import CharCount
from recipes.tasks.countdown import Countdown
from recipes.tasks.countdown_tinyzero import TinyZero
from recipes.tasks.gsm8k import Gsm8k
from recipes.tasks.math import Math

GSM8K, MATH = Gsm8k(Gsm8k.Options(), 0), Math(Math.Options(dataset="none"), 0)
CHARACTERS = CharCount(CharCount.Options(), 0)
COUNTDOWN, TINYZERO = Countdown(Countdown.Options(), 0), TinyZero(TinyZero.Options(), 0)

# A seed that stands still and few examples: the same test every time, and seconds in all.
bounded = settings(
    max_examples=150, deadline=2000, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
PIECES = (
    r"\frac", r"\boxed", r"\text", r"\left", r"\times", r"\,", r"\ ", r"\$", r"\%", "{", "}", "(", ")", "[",
    "]", "$", "€", "#",
    "####", "<answer>", "</answer>", "<think>", "</think>", "0", "1", "12", "000", "999", ",", ".", "/", "-",
    "−", "–", "+", "*",
    "**", "^", "_", "=", "%", "e", "E", "k", "M", " ", "  ", "\n", "\u00a0", "½", "²", "٣", "x", "m", "cm",
    "minus", "negative",
    "million", "and", "or", "is", "The answer is", "0x", "√", "π", "°", "|", "&", ";", ":", "'", "\\", "\x00",
    "\x1b[31m",
)  # fmt: skip
texts = st.one_of(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.text(max_size=60))
# What a model writes when it repeats itself: up to some 20,000 characters.
pieces = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join)
loops = st.lists(st.tuples(pieces, st.integers(1, 4000)), min_size=1, max_size=3).map(
    lambda parts: "".join(piece * times for piece, times in parts)[:20_000]
)
ROWS = {
    GSM8K: {"answer": "18"},
    MATH: {"answer": r"\frac{1}{2}"},
    CHARACTERS: {"count": 3},
    COUNTDOWN: {"numbers": [3, 5, 7], "target": 26},
    TINYZERO: {"nums": [3, 5, 7], "target": 26},
}
SECONDS = 2.0  # of this process, for every judge and reward of a task on one completion


@bounded
@given(texts)
def test_numbers_are_fractions_and_the_readers_agree(text):
    found = numbers(text)
    assert all(isinstance(number, Fraction) for number in found)
    tagged = f"<answer>{text}</answer>"
    if "answer>" not in text:
        assert strict_answer(tagged) == (found[0] if len(found) == 1 else None)
    inner = boxed(text)
    if inner is None and "####" not in text and "<answer>" not in text:
        assert lenient_answer(text) == (found[-1] if found else None)
    for begin, end in boxes(text):
        assert end is None or end == -1 or text[end] == "}"
        assert 0 < begin <= len(text)


@bounded
@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "${}$", "**{}**", "x = {}", "{} apples", "({})", "{:,}", r"\text{{{}}}"]),
)
def test_every_integer_is_read_back(value, form):
    assert numbers(form.format(value)) == [value]


@bounded
@given(st.integers(0, 999), st.integers(0, 99), st.integers(1, 99))
def test_every_mixed_number_is_read_back(whole, above, below):
    wanted = [whole + Fraction(above, below)]
    assert numbers(rf"{whole}\frac{{{above}}}{{{below}}}") == wanted
    assert numbers(f"{whole} {above}/{below}") == wanted


@bounded
@given(texts, st.integers(-50, 50))
def test_the_judges_of_gsm8k(text, gold):
    row = {"answer": str(gold)}
    for completion in (text, f"<answer>{text}</answer>", rf"\boxed{{{text}}}"):
        assert GSM8K.is_correct(completion, row) <= GSM8K.is_correct_lenient(completion, row)
        for reward in GSM8K.rewards.values():
            (value,) = reward([completion], answer=[str(gold)])
            assert -10 < value <= 1


@settings(bounded, max_examples=60, deadline=None)
@given(st.sampled_from(list(ROWS)), st.one_of(loops, texts))
@example(GSM8K, "1," * 10_000)
@example(GSM8K, "1 " * 10_000)
@example(GSM8K, "minus " * 4_000)
@example(GSM8K, r"\frac{" * 4_000)
@example(MATH, r"\boxed{" * 4_000)
@example(MATH, r"$1$;" * 5_000)
@example(TINYZERO, "<answer>" * 2_500)
def test_every_judge_and_reward_of_a_task_is_quick_and_within_its_contract(task, text):
    row = ROWS[task]
    columns = {name: [value] for name, value in row.items()}
    began = time.process_time()
    for completion in (text, f"<answer>{text}</answer>", rf"\boxed{{{text}}}"):
        assert task.is_correct(completion, row) <= (task.is_correct_lenient(completion, row) is not False)
        hash(task.answer_of(completion))
        for reward in task.rewards.values():
            said = [{"role": "assistant", "content": completion}]  # countdown's prompts are never chat
            for given_as in (completion,) if task is COUNTDOWN else (completion, said):
                (value,) = reward(completions=[given_as], prompts=["?"], **columns)
                assert value is None or abs(value) < 100
    assert time.process_time() - began < SECONDS


@bounded
@given(texts, st.lists(st.integers(1, 30), min_size=3, max_size=3), st.integers(1, 90))
def test_the_judges_of_countdown_and_of_counting(text, numbers_given, target):
    for completion in (text, f"<answer>{text}</answer>", f"1+{text}"):
        small = {"numbers": numbers_given, "target": target}
        assert COUNTDOWN.is_correct(completion, small) in (True, False)
        row = {"nums": numbers_given, "target": target}
        assert CHARACTERS.is_correct(completion, {"count": 3}) <= CHARACTERS.is_correct_lenient(
            completion, {"count": 3}
        )
        strict = TINYZERO.is_correct(completion, row)
        assert strict <= TINYZERO.is_correct_lenient(completion, row)


@bounded
@given(st.text("0123456789+-*/() .x", max_size=60))
@example("(" * 500)
@example("9*" * 90 + "9")
def test_the_expression_parser_agrees_with_python_or_refuses(text):
    try:
        found = parse(text, division=True)
    except ExpressionError:
        return
    exact = re.sub(r"(\d+)", r"Fraction(\1)", re.sub(r"\b0+(?=\d)", "", text))
    assert found.value == eval(exact.strip(), {"Fraction": Fraction})  # digits, operators and brackets only


@bounded
@given(texts)
def test_latex_is_cleaned_without_an_exception(text):
    assert isinstance(plain(text), str)
    assert all(part for part in parts(text) if len(text) <= MAX_ANSWER)


@bounded
@given(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.lists(st.integers(), max_size=2),
    )
)
def test_the_datas_answer_is_text_or_refused(value):
    try:
        text = gold_text(value)
    except ValueError:
        assert not isinstance(value, str) or not value.strip()
        return
    assert text.strip()
    assert isinstance(value, str) or Fraction(text) == Fraction(str(value))


@settings(bounded, max_examples=40, deadline=None)
@given(texts)
def test_the_judge_of_mathematics(text):
    started = time.monotonic()
    row = {"answer": "7"}
    for completion in (text, rf"\boxed{{{text}}}"):
        strict = MATH.is_correct(completion, row)
        assert strict <= MATH.is_correct_lenient(completion, row)
    # Two questions for each, three seconds at most and a new process for what was lost.
    assert time.monotonic() - started < 60
    assert MATH.is_correct(r"\boxed{7.0}", row)
    assert not MATH.is_correct(r"\boxed{8.0}", row)


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=3),
        st.complex_numbers(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@bounded
@given(values)
def test_whatever_a_reward_returns_is_a_list_of_finite_numbers_or_a_fault(value):
    found = call(lambda completions, **_: value, ["a", "b"], {}, 5.0)
    if isinstance(found, Fault):
        assert found.what.isprintable()
        assert len(found.what) < 600
    else:
        assert len(found) == 2
        assert all(number is None or abs(number) <= MAX_REWARD for number in found)


@bounded
@given(st.text(max_size=400), st.integers(10, 300))
def test_one_line_is_one_line(text, limit):
    for line in (one_line(text, limit), show(text, limit)):
        assert line.isprintable()
        assert "\x1b" not in line
        assert len(line) <= limit
