"""TinyZero's countdown: problems that have a solution, data as it is published, and which answers count."""

import itertools
import json
import random
from fractions import Fraction

import pytest
from datasets import Dataset
from pydantic import ValidationError

from recipes.rewards.arithmetic import ExpressionError, parse
from recipes.tasks.countdown_tinyzero import TinyZero, format

Options = TinyZero.Options
ROW = {"nums": [1, 2, 3, 40], "target": 41, "prompt": []}


def make(seed=0, **options):
    return TinyZero(Options(**options), seed)


@pytest.fixture
def task():
    return make()


def reachable(numbers):
    """Every value of the numbers joined two at a time, by another route than the task's: sets, all pairs, fractions."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for value in (a + b, a - b, a * b, *([Fraction(a) / b] if b else [])):
            found |= reachable([value, *rest])
    return found


def test_every_made_problem_has_a_solution_and_the_splits_share_none():
    task = make(train_size=2000, held_out=300)
    train, held_out = task.train, task.held_out
    keys = [{(*sorted(row["nums"]), row["target"]) for row in rows} for rows in (train, held_out)]
    assert [len(rows) for rows in (train, held_out)] == [len(found) for found in keys] == [2000, 300]
    assert not keys[0] & keys[1]
    assert {len(numbers) for numbers in train["nums"]} == {3, 4}
    assert all(1 <= number <= 99 for numbers in train["nums"] for number in numbers)
    for row in train.select(range(40)):
        assert 10 <= row["target"] <= 99
        assert row["target"] in reachable(row["nums"])


def test_the_seed_decides_everything():
    sizes = {"train_size": 20, "held_out": 20}
    assert make(3, **sizes).train[:] == make(3, **sizes).train[:]
    assert make(3, **sizes).held_out["nums"][:] != make(4, **sizes).held_out["nums"][:]
    assert make(3, **sizes, max_numbers=5).train[:] != make(3, **sizes).train[:]


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "data/train-00000-of-00001.parquet"])
def test_data_in_its_published_form(tmp_path, name):
    rows = [{"target": 10 + i % 7, "nums": [i % 5 + 1, 3, 4]} for i in range(60)]
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(str(file))
    task = make(dataset=str(tmp_path), held_out=10)
    train, held_out = task.train, task.held_out
    keys = [{(*sorted(row["nums"]), row["target"]) for row in part} for part in (train, held_out)]
    assert len(held_out) == 10
    assert not keys[0] & keys[1]  # each problem is there twice: its twin is not trained on
    assert keys[0] | keys[1] == {(*sorted(row["nums"]), row["target"]) for row in rows}
    assert make(dataset=str(file), held_out=10).train["nums"][:] == train["nums"][:]


def test_columns_must_be_there(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"numbers": [1, 2], "target": 3}\n' * 3)
    with pytest.raises(ValueError, match=r"task\.columns\.nums: .* lacks 'nums'"):
        _ = make(dataset=str(file), held_out=1).train


def test_both_forms_of_the_prompt_say_the_problem():
    for prompt in ("chat", "plain"):
        row = make(prompt=prompt, train_size=1).train[0]
        text = row["prompt"] if prompt == "plain" else row["prompt"][-1]["content"]
        assert f"{row['nums']}, create an equation that equals {row['target']}." in text
        assert (row["prompt"][-7:] == "<think>") == (prompt == "plain")


@pytest.mark.parametrize(
    ("answer", "strict", "lenient"),
    [
        ("(1 + 2) / 3 + 40", 1, 1),
        ("40 + (2+1)/3", 1, 1),
        ("40 × 2 ÷ 2", 0, 0),
        ("1 × 2 × 3 − 40", 0, 0),
        ("40 + (1 + 2) ÷ 3", 1, 1),
        ("(1 + 2) / 3 + 40 = 41", 0, 1),
        ("41", 0, 0),
        ("40 + 1", 0, 0),  # comes to it without 2 and 3
        ("40 + 1 + 2 - 2", 0, 0),
        ("40 + 1 / (3 - 2 - 1)", 0, 0),
        ("__import__('os').system('true')", 0, 0),
        ("", 0, 0),
    ],
)
def test_which_answers_count(task, answer, strict, lenient):
    completion = f"<think>\nhm\n</think>\n<answer> {answer} </answer>"
    assert task.is_correct(completion, ROW) is bool(strict)
    assert task.is_correct_lenient(completion, ROW) is bool(lenient)
    chat = [[{"role": "assistant", "content": completion}]]
    assert task.correct(chat, nums=[ROW["nums"]], target=[41]) == [strict]


def test_lenient_reads_a_box_or_the_last_line(task):
    assert task.is_correct_lenient(r"so \boxed{40 + (1 + 2) \div 3 = 41}", ROW)
    assert task.is_correct_lenient("I think:\n40 + (1 + 2) / 3", ROW)
    assert not task.is_correct("I think:\n40 + (1 + 2) / 3", ROW)
    assert not task.is_correct_lenient("", ROW)


def test_division_is_exact(task):
    assert task.is_correct("<answer>8 / (3 - 8 / 3)</answer>", {"nums": [3, 3, 8, 8], "target": 24})
    assert not task.is_correct("<answer>7 / 3 * 3</answer>", {"nums": [3, 7], "target": 7})
    assert not task.is_correct("<answer>25 / 2</answer>", {"nums": [2, 25], "target": 12})


@pytest.mark.parametrize(
    ("completion", "chat", "plain"),
    [
        ("<think>a\nb</think>\n<answer>1</answer>", 1, 0),
        (" a\nb</think>\n<answer>1</answer>", 0, 1),  # the plain prompt has opened the tag
        ("<think>a</think> so <answer>1</answer>", 0, 0),
        ("<think>a</think><answer>1</answer> done", 0, 0),
        ("<answer>1</answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_the_form(completion, chat, plain):
    message = [{"role": "assistant", "content": completion}]
    assert format([message], prompts=[[{"role": "user", "content": "?"}]]) == [chat]
    assert format([completion], prompts=["? <think>"]) == [plain]


def test_votes_are_counted_for_expressions(task):
    assert task.answer_of("<answer> 1 + 2 </answer>") == task.answer_of("<answer>1+2</answer>") == "1+2"
    assert task.answer_of("<answer>x</answer>") is None


def test_the_parser_divides_as_python_does_on_fractions():
    rng = random.Random(1)

    def draw(depth):
        if depth == 0 or rng.random() < 0.3:
            return str(rng.randint(0, 9))
        text = rng.choice([" + ", "-", " * ", "/"]).join(draw(depth - 1) for _ in range(rng.randint(2, 3)))
        return f"({text})" if rng.random() < 0.5 else text

    divided = 0
    for _ in range(400):
        text = draw(3)
        if len(text) > 200:
            continue
        exact = "".join(f"Fraction({part})" if part.isdigit() else part for part in text)
        try:
            wanted = eval(exact, {"Fraction": Fraction})  # Python's own reading, of text that we drew
        except ZeroDivisionError:
            with pytest.raises(ExpressionError, match="zero"):
                parse(text, division=True)
            continue
        divided += "/" in text
        assert parse(text, division=True).value == wanted
    assert divided > 50
    for text in ("1 2", "1/", "1 / / 2", "4/2"):
        with pytest.raises(ExpressionError):
            parse(text, division=text != "4/2")


def test_options_are_checked():
    with pytest.raises(ValidationError, match="min_numbers 4 is more than max_numbers 3"):
        Options(min_numbers=4, max_numbers=3)
