"""Arithmetic expressions: read them without `eval`, list all that can be made of given numbers.

Grammar, over digits, `+ - *` and brackets; no blanks, no signs. `division=True` reads `/`, exactly, and blanks as well:

    sum     := product (("+" | "-") product)*
    product := atom (("*" | "/") atom)*
    atom    := NUMBER | "(" sum ")"

A completion is text from a model: it may be empty, very long or deeply nested. `parse` reads at most `MAX_LENGTH`
characters and `MAX_DEPTH` brackets and raises `ExpressionError` for everything else.
"""

from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations, product

MAX_LENGTH = 200  # characters; keeps the value of a product of many digits small enough to be cheap
MAX_DEPTH = 20  # brackets inside one another; the parser recurses once for each

OPERATORS = "+-*"
_BLANKS = " \t\n"


class ExpressionError(ValueError):
    """The text is not an expression of the grammar above."""


@dataclass(frozen=True)
class Expression:
    """The value of an expression, and the numbers that it uses, left to right."""

    value: int | Fraction  # a Fraction only where something was divided
    numbers: tuple[int, ...]


def parse(text: str, *, division: bool = False) -> Expression:
    """Read `text` as one expression. Raises `ExpressionError` for anything else, including a division by zero."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"{len(text)} characters, at most {MAX_LENGTH} are read")
    parser = _Parser(text, division)
    value = parser.sum(depth=0)
    if parser.peek():
        raise ExpressionError(f"unexpected {text[parser.position]!r} at character {parser.position}")
    return Expression(value, tuple(parser.numbers))


class _Parser:
    """Recursive descent over one string; every method returns the value of what it has read."""

    def __init__(self, text: str, division: bool) -> None:
        self.text = text
        self.skipped, self.products = (_BLANKS, "*/") if division else ("", "*")
        self.position = 0
        self.numbers: list[int] = []

    def peek(self) -> str:
        """The next character, or "" at the end."""
        while (found := self.character()) and found in self.skipped:
            self.position += 1
        return found

    def character(self) -> str:
        """The same without skipping blanks: one between digits ends a number."""
        return self.text[self.position : self.position + 1]

    def take(self, wanted: str) -> str:
        """Consume the next character if it is one of `wanted`; "" if it is not."""
        found = self.peek()
        if found and found in wanted:
            self.position += 1
            return found
        return ""

    def sum(self, depth: int) -> int | Fraction:
        value = self.product(depth)
        while operator := self.take("+-"):
            operand = self.product(depth)
            value = value + operand if operator == "+" else value - operand
        return value

    def product(self, depth: int) -> int | Fraction:
        value = self.atom(depth)
        while operator := self.take(self.products):
            operand = self.atom(depth)
            if operator == "/" and not operand:
                raise ExpressionError(f"a division by zero before character {self.position}")
            value = value * operand if operator == "*" else Fraction(value) / operand
        return value

    def atom(self, depth: int) -> int | Fraction:
        if self.take("("):
            if depth == MAX_DEPTH:
                raise ExpressionError(f"brackets more than {MAX_DEPTH} deep")
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise ExpressionError(f"a bracket is not closed at character {self.position}")
            return value
        return self.number()

    def number(self) -> int:
        self.peek()
        start = self.position
        # Not str.isdigit, which takes other scripts' digits too.
        while (found := self.character()) and found in "0123456789":
            self.position += 1
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
            found.setdefault(int(parse(text).value), set()).add(text)
    return {value: sorted(texts) for value, texts in found.items()}
