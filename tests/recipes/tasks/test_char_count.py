"""Counting letters: the problems that are drawn, the worked answer, which answers count."""

from collections import Counter

import pytest
from pydantic import ValidationError

from recipes.tasks.char_count import CharCount, Problem, worked_answer


def make(seed=0, **options):
    return CharCount(CharCount.Options(**options), seed)


def read(prompt):
    """A problem of its question: word, letter."""
    (message,) = prompt
    assert message["role"] == "user"
    words = message["content"].removesuffix("?").split()
    assert words[:2] + words[3:7] == ["How", "many", "are", "there", "in", "word"]
    return words[7].replace("-", ""), words[2]


def test_the_published_example():
    problem = Problem("nine", "n")
    assert worked_answer(problem) == "n = n.\ni != n.\nn = n.\ne != n.\n\\boxed{2}"
    task = make(train_size=1)
    task._split = [problem], []
    assert task.train[0] == {
        "prompt": [{"role": "user", "content": "How many n are there in word n-i-n-e?"}],
        "count": 2,
    }


def test_nine_thousand_and_one_thousand_problems_with_nothing_in_common():
    task = make()
    train, held_out = ([read(prompt) for prompt in part["prompt"]] for part in (task.train, task.held_out))
    assert (len(train), len(held_out)) == (9000, 1000)
    assert not set(train) & set(held_out)
    problems = [*train, *held_out]
    counts = [*task.train["count"], *task.held_out["count"]]
    assert counts == [word.count(letter) for word, letter in problems]
    lengths = Counter(len(word) for word, _ in problems)
    assert set(lengths) == set(range(5, 21))
    # 625 of each; six standard deviations of a share of 1/16, and what single-letter words held out take away
    assert all(abs(number - 625) < 150 for number in lengths.values())
    of_ten = Counter(count for count, (word, _) in zip(counts, problems, strict=True) if len(word) == 10)
    assert set(of_ten) == set(range(1, 11))
    assert all(abs(number - 62.5) < 50 for number in of_ten.values())
    assert len({letter for _, letter in problems}) == 26


def test_what_is_held_out_is_drawn_evenly():
    """Drawn first, so that nothing is left out of it: the lengths' mean is 12.5, and that of count / length known."""
    task = make(held_out=10_000, train_size=1)
    words = [read(prompt)[0] for prompt in task.held_out["prompt"]]
    assert sum(map(len, words)) / 10_000 == pytest.approx(12.5, abs=0.2)  # its deviation is 0.046
    shares = [count / len(word) for count, word in zip(task.held_out["count"], words, strict=True)]
    expected = sum((length + 1) / (2 * length) for length in range(5, 21)) / 16
    assert sum(shares) / 10_000 == pytest.approx(expected, abs=0.015)  # its deviation is 0.003


def test_the_seed_and_the_sizes_decide_everything():
    assert make(3).train[:] == make(3).train[:]
    assert make(3).held_out["prompt"][:] != make(4).held_out["prompt"][:]
    assert make(3, train_size=5).train[:] == make(3).train[:5]
    short = make(min_letters=3, max_letters=4, train_size=50, held_out=20)
    assert {len(read(prompt)[0]) for prompt in short.train["prompt"]} == {3, 4}
    assert (len(short.train), len(short.held_out)) == (50, 20)


def test_every_train_problem_is_shown_once_before_any_is_shown_again():
    task = make(train_size=64, held_out=16)
    examples = task.warm_start_examples(128)
    for part in (examples[:64], examples[64:]):
        shown = Counter(read(prompt) for prompt, _ in part)
        assert shown == Counter(read(prompt) for prompt in task.train["prompt"])
    assert examples[:64] != examples[64:]
    assert examples == make(train_size=64, held_out=16).warm_start_examples(128)
    assert set(task.corpus()[1::2]) == {answer for _, answer in examples}
    counts = {read(row["prompt"]): row["count"] for row in task.train}
    for prompt, answer in examples:
        assert task.is_correct(answer, {"count": counts[read(prompt)]})
        assert answer.count("\n") == len(read(prompt)[0])
        assert answer.count(" = ") == counts[read(prompt)]


@pytest.mark.parametrize(
    ("completion", "strict", "lenient"),
    [
        ("n = n.\n\\boxed{2}", 1, 1),
        (r"\boxed{3} no, \boxed{2}", 1, 1),
        (r"\boxed{ 2 }", 1, 1),
        (r"\boxed{2} no, \boxed{3}", 0, 0),
        (r"\boxed{2.0}", 0, 1),
        (r"\boxed{n = 2}", 0, 1),
        (r"\boxed{12}", 0, 0),
        (r"\boxed{}", 0, 0),
        (r"\boxed{2", 0, 1),
        ("There are 2 n.", 0, 1),
        ("two", 0, 0),
        ("", 0, 0),
    ],
)
def test_which_answers_count(completion, strict, lenient):
    task, row = make(), {"count": 2}
    assert task.is_correct(completion, row) is bool(strict)
    assert task.is_correct_lenient(completion, row) is bool(lenient)
    chat = [[{"role": "assistant", "content": completion}]]
    assert task.rewards["correct"](chat, prompts=[[]], count=[2]) == [strict]


def test_votes_are_counted_for_the_box():
    assert make().answer_of(r"n = n. \boxed{2}") == make().answer_of(r"\boxed{ 2 }") == "2"
    assert make().answer_of("2") is None


def test_options_are_checked():
    with pytest.raises(ValidationError, match="min_letters 9 is more than max_letters 5; lower it"):
        CharCount.Options(min_letters=9, max_letters=5)
    with pytest.raises(ValidationError):
        CharCount.Options(max_letters=2)
