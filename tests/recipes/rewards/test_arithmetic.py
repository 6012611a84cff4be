"""The expression parser: what it reads, what it refuses, and that no text from a model can harm it."""

import random

import pytest

from recipes.rewards.arithmetic import MAX_DEPTH, Expression, ExpressionError, expressions, parse


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, (7,)),
        ("3*7+5", 26, (3, 7, 5)),
        ("5+3*7", 26, (5, 3, 7)),
        ("(5+3)*7", 56, (5, 3, 7)),
        ("9-4-3", 2, (9, 4, 3)),
        ("9-(4-3)", 8, (9, 4, 3)),
        ("((1))", 1, (1,)),
        ("12*3", 36, (12, 3)),
    ],
)
def test_reads(text, value, numbers):
    assert parse(text) == Expression(value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "3+",
        "-3",
        "3++4",
        "3**4",
        "(3",
        "3)",
        "()",
        "3 4",
        "3/1",
        "2^3",
        "x",
        "3,4",
        "٣",
        "²",
        "1e3",
        "__import__('os')",
    ],
)
def test_refuses(text):
    with pytest.raises(ExpressionError):
        parse(text)


def test_refuses_endless_and_bottomless_text():
    with pytest.raises(ExpressionError, match="characters"):
        parse("1" * 10_000)
    with pytest.raises(ExpressionError, match="deep"):
        parse("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1))
    assert parse("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH).value == 1


def test_agrees_with_python_on_random_expressions():
    rng = random.Random(0)

    def draw(depth):
        if depth == 0 or rng.random() < 0.3:
            return str(rng.randint(0, 99))
        text = rng.choice("+-*").join(draw(depth - 1) for _ in range(rng.randint(2, 3)))
        return f"({text})" if rng.random() < 0.5 else text

    for _ in range(300):
        text = draw(3)
        if len(text) <= 200:
            assert parse(text).value == eval(text)  # Python's own reading, of text that we drew


def test_lists_every_expression_without_brackets():
    found = expressions((3, 5, 7))
    assert found[26] == ["3*7+5", "5+3*7", "5+7*3", "7*3+5"]
    assert sum(map(len, found.values())) == 6 * 9
    assert sum(map(len, expressions((2, 2, 2)).values())) == 9
