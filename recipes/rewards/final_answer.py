r"""Reading the final answer out of a completion, as exact numbers: in the form asked for, or wherever it stands.

    strict     the one number inside the last `<answer>…</answer>`; anything else there is no answer
    lenient    the last `\boxed{…}`, else `####`, else the answer tag, else the last number of the text

Numbers are compared as fractions: 3.0 is 3, 1,000 is 1000 and 0.5 is 1/2, and nothing is rounded. What is read:

    digits        18, 1,234.50, 1,00,000, 1 000, 1'000, 1_000, 1{,}000, .5             ASCII digits only
    commas        0,5, €3,50, 1.234,5, 1.234.567 and 1 234,50            where they cannot separate two numbers
    fractions     1/2, 1 / 2, 3 1/2, 3½, 3 and a half, \frac{1}{2}, \frac12, 2\frac{1}{2}, 1 \over 2
    powers        1e3, 5\times10^3, 5 × 10³, 10^2                               not the exponent of a unit: m^2
    magnitudes    5k, 1.2M, 1.2 million, 3 hundred thousand, 2 lakh
    signs         -5, −5, minus 5, - $5, -(5)                                     not between two numbers: 10 - 15

What is no number: a date, a time, a version, and what the text denies: not 5, \neq 5.

Every step takes time in proportion to the text: no pattern here backtracks (`++`, `*+`); what it has matched is judged
afterwards.
"""

from __future__ import annotations

import collections
import re
import unicodedata
from fractions import Fraction
from typing import Any

MAX_DIGITS = 40  # a number this long is noise, and endless digits cost quadratic time to convert
MAX_EXPONENT = 100

_MINUS = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"  # hyphens, figure dash, en dash, minus signs
_BLANK = r"\u00a0\u2007\u2009\u202f"  # no-break, figure, thin and narrow no-break space
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
_LOWERED = str.maketrans(_RAISED, "0123456789-")
_VULGAR = {
    character: unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    for character in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞↉"
}
_SUNK = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FEW = {"an": 1, "a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5}
# What LaTeX has before a number, often without a blank: x\approx3.5
_BETWEEN = (
    "times|cdot|div|pm|approx|sim(?:eq)?|[gln]eq?|[gl]eqslant|q?quad|to|(?:[Rr]ight|Longright)arrow|implies"
)
_DENIED = re.compile(r"(?:(?<!\w)not|n't|≠|!=|\\neq?)\s*+$", re.IGNORECASE)
_SIMPLE = re.compile(r"\s*+([-+]?+)\s*+\\?+\$?+([0-9][0-9,]*+(?:\.[0-9]++)?+|\.[0-9]++)\s*+")


def _fraction(match: re.Match[str]) -> str:
    """A LaTeX fraction as `1/2`; one that is not made of two numbers is left unreadable."""
    above, below = (
        _SIMPLE.fullmatch(match[name] or match[f"{name}_digit"] or "") for name in ("above", "below")
    )
    if above is None or below is None:
        return " ? "
    sign = "-" if (above[1] == "-") != (below[1] == "-") else ""
    return f" {sign}{above[2]}/{below[2]}".replace(",", "")


_PLAIN: tuple[tuple[re.Pattern[str], Any], ...] = (  # typography, LaTeX and Markdown → what _NUMBER knows
    (re.compile(f"[{''.join(_VULGAR)}]"), lambda match: f" {_VULGAR[match[0]]}"),
    (
        re.compile("(?<![⁰¹²³⁴⁵⁶⁷⁸⁹])([⁰¹²³⁴⁵⁶⁷⁸⁹]++)\u2044([₀₁₂₃₄₅₆₇₈₉]++)"),
        lambda match: f" {match[1].translate(_LOWERED)}/{match[2].translate(_SUNK)}",
    ),
    (re.compile(r"[\u2044\u2215]"), "/"),
    (
        re.compile(
            r"(?<![\w.,])([1-9][0-9]{0,2}(?:\.[0-9]{3})++)"
            r"(?:,([0-9]{1,2}+)(?![0-9])|(?<=\.[0-9]{3}\.[0-9]{3}))(?![.,]?[0-9])"
        ),
        lambda match: match[1].replace(".", "") + (f".{match[2]}" if match[2] else ""),
    ),
    (re.compile(r"(?<![\w.,])(€\s?)?+([0-9]{1,9}+),([0-9]{2})(?![0-9,])(?(1)|(?=\s?€))"), r" €\2.\3"),
    (re.compile(r"(?<![A-Za-z])(?:USD|EUR|GBP|INR|Rs)(?=[0-9])"), " "),
    (re.compile(f"[{_MINUS}]|(?<![^\\s>$=(])[\u2014\u2015](?=[$€£¥₹.0-9])"), "-"),
    (
        re.compile(rf"(?<=[0-9]) and ({'|'.join(_FEW)})[ -]({'|'.join(_PARTS)})s?+(?![\w-])"),
        lambda match: f" {_FEW[match[1]]}/{_PARTS[match[2]]}",
    ),
    (re.compile(r"(?<=[0-9]) and (?=[1-9]/[1-9][0-9]?+(?![\w/]))"), " "),
    (re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|boldsymbol|bm|mbox)\s*+\{([^{}]*+)\}"), r" \1 "),
    (re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])"), ""),
    (re.compile(rf"(?<=[0-9])(?:\{{,\}}(?:\\!)?+|,?+\\[,;:! ]|~|[{_BLANK}])(?=[0-9]{{3}}(?![0-9]))"), ","),
    (re.compile(rf"\\[,;:! ]|~|[{_BLANK}]"), " "),
    (
        re.compile(
            r"\\(?:[dtcs]|nice)?frac\s*+(?:\{(?P<above>[^{}]*+)\}|(?P<above_digit>[0-9]))"
            r"\s*+(?:\{(?P<below>[^{}]*+)\}|(?P<below_digit>[0-9]))"
        ),
        _fraction,
    ),
    (re.compile(rf"\\(?:{_BETWEEN})(?=[0-9])"), r"\g<0> "),
    (re.compile(r"(?<=[0-9}])\s*+\\over(?![A-Za-z])\s*+(?=[0-9{])"), "/"),
    (
        re.compile(
            r"(?:(?<![\^A-Za-z_}{])|(?<=\\times)|(?<=\\cdot))\{\s*+([0-9][0-9,.]*+(?:/[0-9]++)?+)\s*+\}"
        ),
        r" \1",
    ),
    (re.compile(r"(?<=[-+])\s?\(\s?([0-9][0-9,.]*+(?:/[0-9]++)?+)\s?\)"), r"\1"),
    (re.compile(r"(?<=[\w)])\*\*(?=-?[0-9]{1,4}(?![\w*.,]))"), "^"),  # Python's power; other `**` are bold
    (re.compile(r"(?<![A-Za-z0-9_])__?(?=[-+$€£¥.0-9])|(?<=[0-9.%])__?(?![A-Za-z0-9_])"), " "),  # bold, too
    (re.compile(r"\\[$%]|\\[(\[)\]]|\*\*"), " "),
)

# Digits with what may group them; whether the groups are well-formed is checked afterwards.
_RUN = r"[0-9]++(?:,[0-9]++|[_'’][0-9]{3}(?![0-9])|[ ][0-9]{3}(?![0-9]|-[A-Za-z]))*+(?:\.[0-9]++)?+|\.[0-9]++"
_POWER = r"\s?+ \^ \s*+ (?: \{{ \s*+ (?P<{0}> [-+]?[0-9]++ ) \s*+ \}} | (?P<{0}_bare> [-+]?[0-9]++ ) )"
_NUMBER = re.compile(
    rf"""
    (?P<other> (?<!\w) 0 [xXoObB] [0-9A-Fa-f]++                  # hexadecimal is no decimal number
             | \^ \s*+ (?: \{{ [^{{}}]*+ \}} | [-+]?[0-9]++ )?+ )       # nor is the exponent of a unit, as in m^2
  | (?: (?P<word> (?<!\w) (?i:minus|negative) \s{{1,3}}+ ) | (?P<sign> (?<![-\w)\]}}]) [-+] [ \t]?+ ) )?+
    (?: (?P<currency> [$€£¥₹] ) [ ]?+ (?P<minus> -?+ ) )?+
    (?<!\w) (?P<value> {_RUN} )
    (?: {_POWER.format("power")}
      | (?P<raised> [{_RAISED}]++ )
      | [eE] (?P<e> [-+]?[0-9]++ ) (?!\w)
      | \s{{0,2}}+ (?: \\times | \\cdot | [×·⋅*xX] ) \s{{0,2}}+ 10
        (?: {_POWER.format("ten")} | (?P<ten_raised> [{_RAISED}]++ ) )
      | (?: [ ]{{1,4}}+ (?P<numerator> [0-9]++ ) )?+
        [ ]?+ / [ ]?+ (?P<denominator> [0-9]++ (?: ,[0-9]{{3}} (?![0-9]) )*+ (?: \.[0-9]++ )?+ )
    )?+
    (?P<more> (?: [./][0-9]++ | :[0-9]{{2}} (?![0-9]) )*+ )        # a date, a version, a time
    (?: (?(currency) [ ]?+ ) (?P<letter> [kKMBT] | [ ]?+ bn ) (?!\w)
      | (?P<name> (?: \s{{0,4}}+
            (?i: hundred | thousand | lakh | million | crore | billion | trillion ) s?+ (?![\w-]) )++ ) )?+
    """,
    re.VERBOSE,
)
_MAGNITUDES = {"hundred": 2, "k": 3, "thousand": 3, "m": 6, "million": 6, "b": 9, "bn": 9, "billion": 9}
_MAGNITUDES |= {"t": 12, "trillion": 12, "lakh": 5, "crore": 7}
# Between a number and the sign that subtracts from it: nothing, or its unit.
_UNIT = re.compile(r"[\s$%°)\]}]*+(?P<word>[A-Za-z]++(?:\^\{?+-?+[0-9]++\}?+|[²³])?+[\s$)\]}]*+)?+")
_NOUN = re.compile(r"[A-Za-z]\s*+$")
_VERB = re.compile(r"(?:^|\W)(?:is|was|be|are|equals|to|at|of|and|or|than|from|answer)\s*+$", re.IGNORECASE)


def text_of(completion: Any) -> str:
    """The completion's text: TRL passes text for plain prompts and a list of messages for chat."""
    if isinstance(completion, str):
        return completion
    contents = (part.get("content") for part in completion)  # None beside a tool call
    return "".join(content for content in contents if isinstance(content, str))


def last_words(prompt: Any) -> str:
    """What a prompt ends in: the whole of a plain one, the last message of a chat."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def numbers(text: str) -> list[Fraction]:
    """Every number of the text, left to right. Currency, units and percent signs are left aside."""
    return [number for place in _places(text) for number in _read(*place)]


def last_number(text: str) -> Fraction | None:
    """The last number of the text; the others are not worked out."""
    for place in reversed(_places(text)):
        if found := _read(*place):
            return found[-1]
    return None


def only_number(text: str) -> Fraction | None:
    """The number of a text that has just one."""
    found: list[Fraction] = []
    for place in _places(text):
        found += _read(*place)
        if len(found) > 1:
            return None
    return found[0] if found else None


def _places(text: str) -> list[tuple[re.Match[str], int]]:
    """Where numbers stand, each with the end of the number before it (0 for the first)."""
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    matches = [match for match in _NUMBER.finditer(text) if not match["other"]]
    return list(zip(matches, [0, *(match.end() for match in matches)]))


def _read(match: re.Match[str], end: int) -> list[Fraction]:
    """The numbers of one place; several if the digits turn out not to be grouped, none if it is not a number."""
    if _DENIED.search(match.string[max(0, match.start() - 8) : match.start()]):
        return []
    *before, last = _ungrouped(match["value"])
    values = [_decimal(digits) for digits in before] + [_value(match, last)]
    if values[0] is not None and _is_negative(match, end):
        values[0] = -values[0]
    return [value for value in values if value is not None]


def _ungrouped(run: str) -> list[str]:
    """The numbers of a run of digits: one if its groups are those of a number, else each group by itself."""
    grouped, comma, behind = run.rpartition(",")
    if comma and len(behind) <= 2 and re.fullmatch("[0-9]+(?:[ '’][0-9]{3})+", grouped):
        # 1 234,50: the groups have another separator.
        return [f"{one}.{behind}" for one in _ungrouped(grouped)]
    whole, dot, decimals = run.partition(".")
    separators = {character for character in whole if character in ",_'’ "}
    if not separators:
        return [run]
    if len(separators) == 1:
        first, *middle, last = whole.split(separators.pop())
        if first == "0" and "," in whole and not middle and not dot:
            return [f"0.{last}"]  # no thousands begin with 0: a decimal comma
        thousands = len(first) <= 3 and all(len(group) == 3 for group in middle)
        lakhs = "," in whole and len(first) <= 2 and all(len(group) == 2 for group in middle)
        if len(last) == 3 and (thousands or lakhs) and not (" " in whole and first[0] == "0"):
            return ["".join([first, *middle, last]) + dot + decimals]
    if " " in separators:
        return [number for part in run.split(" ") for number in _ungrouped(part)]
    return re.split(r"[,_'’ ]", run)


def _decimal(digits: str) -> Fraction | None:
    """None for more digits than a number has."""
    if len(digits) > MAX_DIGITS:
        return None
    return Fraction(digits) if "." in digits else Fraction(int(digits))


def _value(match: re.Match[str], digits: str) -> Fraction | None:
    """The value of a match without its sign; None if it is not a number: 1/0, a date, too many digits."""
    numerator, denominator = match["numerator"], (match["denominator"] or "").replace(",", "")
    parts = match["value"].rpartition(" ")
    if denominator and not numerator and parts[0] and float(parts[2]) < float(denominator):
        digits, numerator = _ungrouped(parts[0])[-1], parts[2]  # 2 125/200: a whole number and its fraction
    value, over, above = (_decimal(text or "1") for text in (digits, denominator, numerator))
    power = _exponent(match["power"] or match["power_bare"] or match["raised"] or "1")
    shift = _exponent(match["e"] or match["ten"] or match["ten_bare"] or match["ten_raised"] or "0")
    if match["more"] or value is None or above is None or not over or power is None or shift is None:
        return None
    if value == 0 and power < 0:
        return None
    if denominator:
        value = value + above / over if numerator else value / over
    words = (match["letter"] or match["name"] or "").lower().split()
    magnitude = sum(_MAGNITUDES[word if word in _MAGNITUDES else word.rstrip("s")] for word in words)
    return value**power * Fraction(10) ** (shift + magnitude)


def _exponent(text: str) -> int | None:
    """The exponent; None for one that makes more digits than a number has."""
    text = text.translate(_LOWERED)
    short = len(text) <= 4 and re.fullmatch("[-+]?[0-9]+", text)
    return int(text) if short and abs(int(text)) <= MAX_EXPONENT else None


def _is_negative(match: re.Match[str], end: int) -> bool:
    """Whether the sign belongs to the number, rather than subtracting it from the one that ends at `end`."""
    word = (match["word"] or "").strip().lower()
    sign = match["sign"] or ""
    if match["minus"] or word == "negative":
        return True
    if not word and "-" not in sign:
        return False
    text = match.string
    gap = text[end : match.start()] if end and match.start() - end < 40 else "?"
    unit = _UNIT.fullmatch(gap)
    if unit and (word or not unit["word"] or len(sign) > 1):
        return False
    near = text[max(0, match.start() - 12) : match.start()]
    return not (word and _NOUN.search(near) and not _VERB.search(near))


_ANSWER = re.compile(r"<answer>(?P<content>(?:(?!</?answer>).)*+)</answer>", re.DOTALL)


def answer_tag(text: str) -> str | None:
    """The content of the last `<answer>…</answer>`, None without one."""
    found = collections.deque(_ANSWER.finditer(text), maxlen=1)
    return found[0]["content"].strip() if found else None


_BRACES = re.compile(r"\\(?P<box>boxed|fbox)(?![A-Za-z])\s*+(?P<brace>\{?+)|\\.|[{}]", re.DOTALL)
_BARE_END = re.compile(r"\$|\\[)\]]|\n|[.,;:](?=\s|$)|$")


def boxes(text: str) -> list[tuple[int, int | None]]:
    r"""Where the content of each box begins and ends, in order of the beginning; None for an unclosed brace.

    Boxes are `\boxed{5}`, `\boxed {5}`, and `\boxed 5` to the end of its formula or sentence.
    """
    found: list[tuple[int, int | None]] = []
    opened: list[int | None] = []  # for each open brace the place of its box in `found`
    for match in _BRACES.finditer(text):
        if match["box"]:
            begin = match.end()
            if match["brace"]:
                opened.append(len(found))
                found.append((begin, None))
            else:
                found.append((begin, -1))
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}" and opened and (place := opened.pop()) is not None:
            found[place] = (found[place][0], match.start())
    return found


def boxed(text: str) -> str | None:
    r"""The content of the last box that is not empty; None without one, and if it is never closed."""
    for begin, end in reversed(boxes(text)):
        if end is None:
            return None
        if end < 0:
            bare = _BARE_END.search(text, begin)
            end = bare.start() if bare else len(text)
        if content := text[begin:end].strip():
            return content
    return None


def strict_answer(text: str) -> Fraction | None:
    """The one number in the answer tag. None without a tag, or with no number or several in it."""
    content = answer_tag(text)
    return only_number(content) if content is not None else None


def lenient_answer(text: str) -> Fraction | None:
    """The number that a reader would take for the answer; None if the text has none."""
    hashes = text.rpartition("####")
    for part in (boxed(text), hashes[2] if hashes[1] else None, answer_tag(text), text):
        if part is not None and (found := last_number(part)) is not None:
            return found
    return None
