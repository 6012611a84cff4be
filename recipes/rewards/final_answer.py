"""Reading the final answer out of a completion: as numbers, exactly, in the form asked for or wherever it stands.

    strict     the one number inside the last `<answer>…</answer>`; anything else there is no answer
    lenient    the last `\\boxed{…}`, else `####`, else the answer tag, else the last number of the text

Numbers are compared as fractions: 3.0 is 3, 1,000 is 1000 and 0.5 is 1/2, and nothing is rounded.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

MAX_DIGITS = 40  # a number this long is noise, and endless digits cost quadratic time to convert

_GROUPED = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,]*\d)"
_PLAIN = r"\d+(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?<!\w)(?<!\d[./])(?P<sign>[-+]?)\s?[$€£¥]?(?P<minus>-?)(?P<value>{_GROUPED}|{_PLAIN})"
    r"(?:(?:\s(?P<numerator>\d{1,9}))?/(?P<denominator>\d{1,9}))?(?![./]?\d)"
)
_ANSWER = re.compile(r"<answer>(?P<content>(?:(?!</?answer>).)*)</answer>", re.DOTALL)
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"\\text\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,|[\u00a0\u2009\u202f])(?=\d{3})"), ","),
    (re.compile(r"\\[$%]|\\[(\[)\]]|\*\*"), " "),
    (re.compile(r"[\u2212\u2013](?=[$€£¥\s]?\d)"), "-"),
)


def text_of(completion: Any) -> str:
    """The completion's text: TRL passes text for plain prompts and a list of messages for chat."""
    return completion if isinstance(completion, str) else "".join(part["content"] for part in completion)


def numbers(text: str) -> list[Fraction]:
    """Every number of the text, left to right. Currency, units and percent signs are left aside."""
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    # A sign written apart from its currency ("- $5") belongs to it; one between two numbers subtracts.
    return [value for match in _NUMBER.finditer(text) if (value := _value(match)) is not None]


def _value(match: re.Match[str]) -> Fraction | None:
    """A match as a fraction; None for a zero denominator or more digits than a number has."""
    digits = match["value"].replace(",", "")
    if len(digits) > MAX_DIGITS:
        return None
    value = Fraction(digits)
    if match["denominator"]:
        if not int(match["denominator"]):
            return None
        below = int(match["denominator"])
        value = value + Fraction(int(match["numerator"]), below) if match["numerator"] else value / below
    return -value if "-" in (match["sign"], match["minus"]) else value


def answer_tag(text: str) -> str | None:
    """What stands in the last `<answer>…</answer>`, None without one."""
    found = [match["content"] for match in _ANSWER.finditer(text)]
    return found[-1].strip() if found else None


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}`, its braces balanced; None without one."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start)
    depth = 0
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if not depth:
            return text[begin + 1 : position].strip()
    return None


def strict_answer(text: str) -> Fraction | None:
    """The one number in the answer tag. None without a tag, or with no number or several in it."""
    content = answer_tag(text)
    found = numbers(content) if content is not None else []
    return found[0] if len(found) == 1 else None


def lenient_answer(text: str) -> Fraction | None:
    """The number that a reader would take for the answer; None if the text has none."""
    hashes = text.rpartition("####")
    for part in (boxed(text), hashes[2] if hashes[1] else None, answer_tag(text)):
        if part is not None and (found := numbers(part)):
            return found[-1]
    found = numbers(text)
    return found[-1] if found else None
