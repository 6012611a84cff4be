"""GSM8K: reading answers, the form of a completion, the real data, and what a config may say of it."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from pydantic import ValidationError

from recipes.problems import ConfigError
from recipes.rewards.final_answer import boxed, lenient_answer, numbers, strict_answer
from recipes.tasks import get_task, gsm8k
from recipes.tasks.gsm8k import Options

DATA = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"
real_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="GSM8K is not beside this checkout (shared/data/gsm8k)"
)
GOOD = "<reasoning>\nTwo and two\nmake four.\n</reasoning>\n<answer>\n4\n</answer>\n"


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
    assert gsm8k.correctness([GOOD], answer=["4"]) == gsm8k.correctness(chat, answer=["4.0"]) == [1.0]
    assert gsm8k.correctness([GOOD], answer=["5"]) == [0.0]
    assert gsm8k.integer([GOOD, GOOD.replace("4", "4.5"), "4"]) == [1.0, 0.0, 0.0]
    assert gsm8k.is_correct_lenient("I get 4", {"answer": "4"})


@real_data
def test_every_solution_of_the_real_data_is_read_back():
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            gold = row["answer"].rpartition("####")[2].strip()
            text = gsm8k.solution_text(row["answer"])
            assert gsm8k.is_correct(text, {"answer": gold}), row
            assert lenient_answer(row["answer"]) == Fraction(gold.replace(",", ""))
            assert "<<" not in text
            assert (
                gsm8k.strict_format([text]) == gsm8k.soft_format([text]) == gsm8k.tag_count([text]) == [1.0]
            )


@real_data
def test_the_real_data_as_prompts():
    options = Options(dataset=str(DATA))
    train, test = gsm8k.train_dataset(options, 0), gsm8k.eval_dataset(options, 1)
    assert (len(train), len(test)) == (7473, 1319)
    assert test[0]["answer"] == "18"
    assert [message["role"] for message in train[0]["prompt"]] == ["system", "user"]
    assert train["answer"][:50] == gsm8k.train_dataset(options, 0)["answer"][:50]
    assert train["answer"][:50] != gsm8k.train_dataset(options, 1)["answer"][:50]
    plain = gsm8k.eval_dataset(Options(dataset=str(DATA), prompt="plain"), 0)
    assert plain[0]["prompt"].startswith("Write your reply")
    assert len(gsm8k.warm_start_examples(options, 0, 8000)) == 8000


def test_one_file_is_split_by_the_seed(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(
        "".join(json.dumps({"question": f"q{i}", "answer": f"#### {i}"}) + "\n" for i in range(20))
    )
    options = Options(dataset=str(file), held_out=5)
    train, test = (set(make(options, 0)["answer"]) for make in (gsm8k.train_dataset, gsm8k.eval_dataset))
    assert (len(train), len(test)) == (15, 5)
    assert not train & test
    with pytest.raises(ValueError, match=r"held_out: 20 of 20 .* lower it"):
        gsm8k.train_dataset(Options(dataset=str(file), held_out=20), 0)


def test_missing_data_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.dataset: holds no train\.jsonl"):
        gsm8k.train_dataset(Options(dataset=str(tmp_path)), 0)
    with pytest.raises(ConfigError, match=r"task\.dataset: no such file or folder"):
        gsm8k.train_dataset(Options(dataset="./nowhere.jsonl"), 0)
    (tmp_path / "train.jsonl").write_text('{"problem": "1", "answer": "#### 1"}\n')
    with pytest.raises(ValueError, match=r"lacks 'question'"):
        gsm8k.train_dataset(Options(dataset=str(tmp_path)), 0)


def test_options_are_strict():
    assert get_task("gsm8k") is gsm8k
    assert set(gsm8k.WEIGHTS) == set(gsm8k.rewards)
    for wrong in (
        {"promt": "chat"},
        {"prompt": "chatty"},
        {"train_size": 0},
        {"rewards": {"correctness": "2"}},
    ):
        with pytest.raises(ValidationError):
            Options(**wrong)
