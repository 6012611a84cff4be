"""GSM8K: reading answers, the form of a completion, the real data, and what a config may say of it."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from pydantic import ValidationError

from recipes.data import read_rows
from recipes.problems import ConfigError
from recipes.rewards.final_answer import boxed, lenient_answer, numbers, strict_answer
from recipes.tasks import gsm8k
from recipes.tasks.gsm8k import Gsm8k

Options = Gsm8k.Options
DATA = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"
real_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="GSM8K is not beside this checkout (shared/data/gsm8k)"
)
GOOD = "<reasoning>\nTwo and two\nmake four.\n</reasoning>\n<answer>\n4\n</answer>\n"


def make(seed=0, **options):
    return Gsm8k(Options(**options), seed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", 18), ("$18", 18), ("1,234", 1234), ("$1,234,567.50", Fraction(2469135, 2)), ("-3", -3),
        ("\u22123", -3), ("-$5", -5), ("$-5", -5), ("3.0", 3), (".5", Fraction(1, 2)), ("1/2", Fraction(1, 2)),
        ("2 1/2", Fraction(5, 2)), ("\\frac{3}{4}", Fraction(3, 4)), ("12 dollars", 12), ("20km", 20),
        ("50%", 50), ("50\\%", 50), ("\\$12", 12), ("**12**", 12), ("12.", 12), ("x = 7", 7), ("(5)", 5),
        ("1{,}000", 1000), ("1\\,000", 1000), ("7 \\text{ apples}", 7), ("€3.50", Fraction(7, 2)),
    ],
)  # fmt: skip
def test_numbers_are_read_as_they_are_written(text, expected):
    assert numbers(text) == [expected]
    assert strict_answer(f"<answer>\n{text}\n</answer>") == expected
    assert lenient_answer(f"It was 99, so: {text}") == expected


@pytest.mark.parametrize("text", ["", "none", "5 or 6", "3 + 4 = 7", "5-3", "1,2", "1/0", "9" * 5000, "H2O"])
def test_no_single_number_is_no_strict_answer(text):
    assert strict_answer(f"<answer>{text}</answer>") is None


def test_where_the_answer_is_looked_for():
    assert strict_answer("The answer is 4.") is None
    assert lenient_answer("The answer is 4.") == 4
    assert strict_answer("<answer>3</answer> no, <answer>4</answer>") == 4
    assert strict_answer("<answer>4") is None
    assert lenient_answer(r"\boxed{\frac{1}{2}} of 10") == Fraction(1, 2)
    assert lenient_answer("2 + 2 #### 4") == 4
    assert boxed(r"\boxed{1} then \boxed{x^{2}} end") == "x^{2}"
    assert boxed(r"\boxed{1") is None
    assert lenient_answer("no number") is None


def test_a_hostile_completion_takes_no_time():
    for text in ("<answer>" * 20_000, "1" * 100_000, "1," * 50_000, "<reasoning>\n" * 20_000, "-$" * 50_000):
        lenient_answer(text)
        strict_answer(text)
        gsm8k.strict_format([text])
        gsm8k.soft_format([text])


@pytest.mark.parametrize(
    ("completion", "strict", "soft", "tags"),
    [
        (GOOD, 1, 1, 1.0),
        (GOOD.strip(), 1, 1, 1.0),
        (GOOD + "ok", 0, 1, 1.0 - 2 * 0.002),
        ("Sure!\n" + GOOD, 0, 0, 1.0),
        ("<reasoning>a</reasoning><answer>4</answer>", 0, 1, 0.0),
        ("<reasoning>\na\n</reasoning>\n<answer>\n4", 0, 0, 0.75),
        (GOOD + GOOD, 0, 1, 0.0),
        ("", 0, 0, 0.0),
    ],
)
def test_format_rewards(completion, strict, soft, tags):
    assert gsm8k.strict_format([completion]) == [strict]
    assert gsm8k.soft_format([completion]) == [soft]
    assert gsm8k.tag_count([completion]) == [pytest.approx(tags)]


def test_correctness_and_integer_for_text_and_for_chat():
    chat = [[{"role": "assistant", "content": GOOD}]]
    correctness = make().rewards["correctness"]
    assert correctness([GOOD], answer=["4"]) == correctness(chat, answer=["4.0"]) == [1.0]
    assert correctness([GOOD], answer=["5"]) == [0.0]
    assert gsm8k.integer([GOOD, GOOD.replace("4", "4.5"), "4"]) == [1.0, 0.0, 0.0]
    assert make().is_correct_lenient("I get 4", {"answer": "4"})


@real_data
def test_every_solution_of_the_real_data_is_read_back():
    task = make()
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            gold = row["answer"].rpartition("####")[2].strip()
            text = gsm8k.solution_text(row["answer"])
            assert task.is_correct(text, {"answer": gold}), row
            assert lenient_answer(row["answer"]) == Fraction(gold.replace(",", ""))
            assert "<<" not in text
            assert (
                gsm8k.strict_format([text]) == gsm8k.soft_format([text]) == gsm8k.tag_count([text]) == [1.0]
            )


@real_data
def test_the_real_data_as_prompts():
    task = make(dataset=str(DATA))
    train, test = task.train, task.held_out
    assert (len(train), len(test)) == (7473, 1319)
    assert test[0]["answer"] == "18"
    assert [message["role"] for message in train[0]["prompt"]] == ["system", "user"]
    other = make(1, dataset=str(DATA), prompt="plain")
    assert train["answer"][:50] == make(dataset=str(DATA)).train["answer"][:50]
    assert train["answer"][:50] != other.train["answer"][:50]
    assert test["answer"][:] == other.held_out["answer"][:]
    assert other.held_out[0]["prompt"].startswith("Write your reply")
    assert len(task.warm_start_examples(8000)) == 8000


@pytest.fixture
def data(tmp_path):
    """Twenty train problems and five test problems, as two files."""
    for split, count in (("train", 20), ("test", 5)):
        rows = [{"question": f"{split} {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def questions(task):
    return {prompt[-1]["content"] for prompt in task.train["prompt"]}


def test_train_size_is_of_grpo_warm_start_and_tokenizer_alike(data):
    task = make(dataset=data, train_size=7)
    assert len(questions(task)) == 7
    assert task.train["prompt"][:] == make(dataset=data).train["prompt"][:7]
    examples = task.warm_start_examples(14)
    assert sorted(prompt[-1]["content"] for prompt, _ in examples) == sorted([*questions(task)] * 2)
    assert set(task.corpus()[1::2]) == questions(task)


def test_each_split_is_read_once(data, monkeypatch):
    read = []
    monkeypatch.setattr(gsm8k, "read_rows", lambda *what: read.append(what[1]) or read_rows(*what))
    task = make(dataset=data)
    for _ in range(2):
        _ = task.train, task.held_out, task.warm_start_examples(3), task.corpus()
    assert read == ["train", "test"]
    one_file = make(dataset=f"{data}/train.jsonl", held_out=5)
    _ = one_file.held_out, one_file.train
    assert read[2:] == ["train"]


def test_one_file_is_split_by_the_seed(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(
        "".join(json.dumps({"question": f"q{i}", "answer": f"#### {i}"}) + "\n" for i in range(20))
    )
    task = make(dataset=str(file), held_out=5)
    train, test = set(task.train["answer"]), set(task.held_out["answer"])
    assert (len(train), len(test)) == (15, 5)
    assert not train & test
    with pytest.raises(ValueError, match=r"held_out: 20 of 20 .* lower it"):
        _ = make(dataset=str(file), held_out=20).train


def test_missing_data_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.dataset: holds no train\.jsonl"):
        _ = make(dataset=str(tmp_path)).train
    with pytest.raises(ConfigError, match=r"task\.dataset: no such file or folder"):
        _ = make(dataset="./nowhere.jsonl").train
    (tmp_path / "train.jsonl").write_text('{"problem": "1", "answer": "#### 1"}\n')
    with pytest.raises(ValueError, match=r"lacks 'question'"):
        _ = make(dataset=str(tmp_path)).train


def test_options_are_strict():
    for wrong in (
        {"promt": "chat"},
        {"prompt": "chatty"},
        {"train_size": 0},
        {"rewards": {"correctness": "2"}},
    ):
        with pytest.raises(ValidationError):
            Options(**wrong)


def test_columns_of_another_name(tmp_path):
    file = tmp_path / "mine.jsonl"
    lines = [json.dumps({"problem": f"{n}?", "solution": str(n)}) + "\n" for n in range(6)]
    file.write_text("".join(lines))
    named = {"question": "problem", "answer": "solution"}
    task = Gsm8k(Gsm8k.Options(dataset=str(file), held_out=2, columns=named), 0)
    assert {*task.train["answer"], *task.held_out["answer"]} == set("012345")
    assert all(row["prompt"][-1]["content"] == f"{row['answer']}?" for row in task.train)
    with pytest.raises(
        ValueError, match=r"task\.columns\.question: .* lacks 'question', has problem, solution; set"
    ):
        _ = Gsm8k(Gsm8k.Options(dataset=str(file), held_out=2), 0).train


def test_each_note_of_the_calculator_is_left_out_by_itself():
    text = gsm8k.solution_text("He has 2+3=<<2+3=5>>5 and 5*2=<<5*2=10>>10.\n#### 10")
    assert "\nHe has 2+3=5 and 5*2=10.\n" in text
