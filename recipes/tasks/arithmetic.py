"""Arithmetic expressions: read them without `eval`, list all that some numbers make.

Grammar, over digits, `+ - *` and brackets; no blanks, no signs, no division:

    sum     := product (("+" | "-") product)*
    product := atom ("*" atom)*
    atom    := NUMBER | "(" sum ")"

A completion is text from a model: it may be empty, endless or nested without end. `parse` reads at most `MAX_LENGTH`
characters and `MAX_DEPTH` brackets and answers everything else with `ExpressionError`.
"""

from dataclasses import dataclass
from itertools import permutations, product

MAX_LENGTH = 200  # characters; keeps the value of a product of many digits small enough to be cheap
MAX_DEPTH = 20  # brackets inside one another; the parser recurses once for each

OPERATORS = "+-*"


class ExpressionError(ValueError):
    """The text is not an expression of the grammar above."""


@dataclass(frozen=True)
class Expression:
    """What an expression comes to, and the numbers that it uses, left to right."""

    value: int
    numbers: tuple[int, ...]


def parse(text: str) -> Expression:
    """Read `text` as one expression. Raises `ExpressionError` for anything else."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"{len(text)} characters, at most {MAX_LENGTH} are read")
    parser = _Parser(text)
    value = parser.sum(depth=0)
    if parser.position != len(text):
        raise ExpressionError(f"unexpected {text[parser.position]!r} at character {parser.position}")
    return Expression(value, tuple(parser.numbers))


class _Parser:
    """Recursive descent over one string; every method returns the value of what it has read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.numbers: list[int] = []

    def peek(self) -> str:
        """The next character, or "" at the end."""
        return self.text[self.position : self.position + 1]

    def take(self, wanted: str) -> str:
        """Consume the next character if it is one of `wanted`; "" if it is not."""
        found = self.peek()
        if found and found in wanted:
            self.position += 1
            return found
        return ""

    def sum(self, depth: int) -> int:
        value = self.product(depth)
        while operator := self.take("+-"):
            operand = self.product(depth)
            value = value + operand if operator == "+" else value - operand
        return value

    def product(self, depth: int) -> int:
        value = self.atom(depth)
        while self.take("*"):
            value *= self.atom(depth)
        return value

    def atom(self, depth: int) -> int:
        if self.take("("):
            if depth == MAX_DEPTH:
                raise ExpressionError(f"brackets more than {MAX_DEPTH} deep")
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise ExpressionError(f"a bracket is not closed at character {self.position}")
            return value
        return self.number()

    def number(self) -> int:
        start = self.position
        while self.take("0123456789"):  # ASCII only: str.isdigit would let other scripts' digits through
            pass
        digits = self.text[start : self.position]
        if not digits:
            raise ExpressionError(f"a number is missing at character {start}")
        self.numbers.append(int(digits))
        return self.numbers[-1]


def expressions(numbers: tuple[int, ...]) -> dict[int, list[str]]:
    """Every expression without brackets that uses the numbers once each, by its value; texts sorted, no repeats."""
    found: dict[int, set[str]] = {}
    for order in set(permutations(numbers)):
        for operators in product(OPERATORS, repeat=len(numbers) - 1):
            rest = (operator + str(number) for operator, number in zip(operators, order[1:], strict=True))
            text = str(order[0]) + "".join(rest)
            found.setdefault(parse(text).value, set()).add(text)
    return {value: sorted(texts) for value, texts in found.items()}
