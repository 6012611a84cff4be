r"""LaTeX answers as people write them, brought into a form that a computer algebra system reads.

    parts(r"$5$;$10$")                        ["5", "10"]                an answer of several parts
    parts("The median is $2/7$.")             ["2/7"]                    one in a sentence
    parts(r"\text{18 m}^2")                   ["18"]                     with its unit
    parts("–5"), parts(r"\boldsymbol{5}")     ["-5"], ["5"]              typography

The data's answers and the contents of boxes are treated alike, so that the results can be compared. Text that is not
understood stays as it is. Every step takes time in proportion to the text.
"""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal
from typing import Any

from recipes.rewards.final_answer import boxed

_WRAPPERS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|mbox|operatorname|emph|underline)\*?\s*+"
    r"\{([^{}]*+)\}"
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUNK = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_TYPOGRAPHY: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]"), lambda match: f" {unicodedata.normalize('NFKC', match[0])}"),
    (
        re.compile("(?<![⁰¹²³⁴⁵⁶⁷⁸⁹])([⁰¹²³⁴⁵⁶⁷⁸⁹]++)\u2044([₀₁₂₃₄₅₆₇₈₉]++)"),
        lambda match: f" {match[1].translate(_RAISED)}/{match[2].translate(_SUNK)}",
    ),
    (re.compile("\u2044"), "/"),
    (re.compile(r"[\u2010-\u2015\u2212\ufe63\uff0d]"), "-"),
    (re.compile(r"\s*+(?:°|º|\^\s*+(?:\{\s*+)?\\(?:circ|degree)(?:\s*+\})?|\\degree(?![A-Za-z]))"), " "),
    (re.compile("√\\s*+\\(([^()]*+)\\)|√\\s*+([0-9A-Za-z]++)"), r"\\sqrt{\1\2}"),
    (re.compile(r"(?<![\w.])([0-9]++(?:\.[0-9]++)?+)[eE]([-+]?+[0-9]{1,4}+)(?![\w.])"), r"\1\\cdot10^{\2}"),
    (
        re.compile(r"(?<![\w.])([0-9]{0,20}+)\.([0-9]{0,20}+)\\(?:overline|bar|dot)\s?\{?([0-9]{1,20}+)\}?"),
        lambda match: _periodic(*match.groups()),
    ),
    (re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]++"), lambda match: f"^{{{match[0].translate(_RAISED)}}}"),
    *(
        (re.compile(sign), rf"\\{command} ")
        for sign, command in {
            "×": "times",
            "[·⋅]": "cdot", "÷": "div", "π": "pi", "∞": "infty", "≤": "le", "≥": "ge", "≠": "ne", "±": "pm",
            "≈": "approx", "∅": "emptyset",
        }.items()
    ),
)  # fmt: skip
_MARKUP: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"(?<=[\w)}\]])\*\*(?=[-({]?[0-9a-zA-Z])"), "^"),  # Python's power; other `**` are bold
    (re.compile(r"\*\*|`++|(?<![A-Za-z0-9_}])__(?=[-0-9A-Za-z(])|(?<=[0-9A-Za-z)])__(?![A-Za-z0-9_{])"), " "),
    (re.compile("[€£¥₹]"), " "),
    (re.compile(r"^\s*+(?:\\(?:approx|simeq|sim)(?![A-Za-z])|~)"), " "),
    (re.compile(r"(?<![A-Za-z\\])(?:not|neither)\s{1,3}+(?=[-$\\]?[0-9(\\}])", re.IGNORECASE), r"\\ne "),
    (re.compile(r"\\(?:nice|s)frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\mid(?![A-Za-z])"), "|"),
    (re.compile(r"\{:\}|\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"(?<=[0-9])\s?[xX]\s?(?=10\s?\^)"), r"\\times "),
    (re.compile(r"\\(?:text)?color\s?\{[A-Za-z!0-9]*+\}"), " "),
    (re.compile(r"\\(?:text|mathrm|operatorname)\s?\{\s?([0-9]{1,40}+|[ie])\s?\}"), r" \1 "),
    (
        re.compile(
            r"(?<=[0-9])(?:\s|\\[ ,]|~){0,3}+(?P<text>\\(?:text|mathrm|mbox)\s?\{)?+(?:\s|\\[ ,]|~){0,3}+"
            rf"(?P<name>{'|'.join(_POWERS)})s?+(?![A-Za-z])(?P<end>\s*+\}})?",
            re.IGNORECASE,
        ),
        lambda match: _magnitude(**match.groupdict(default="")),
    ),
    (
        re.compile(
            r"\\(?:displaystyle|textstyle|bf|rm|it|tt|sf|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])"
        ),
        " ",
    ),
    (re.compile(r"(?<!\\)\\[\[\]()]"), " "),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![A-Za-z\\])((?:arc)?(?:sin|cos|tan)h?+|cot|sec|csc|log|ln|exp)(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"(?<![A-Za-z\\])sqrt\s*+\(([^()]*+)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\*"), r"\\cdot "),
)
_MIXED = re.compile(
    r"(?<![\w.,/^{-])(-?+)([0-9]{1,40}+)(?:\s|\\ |\\,|~){1,3}+([0-9]{1,40}+)\s?+/\s?+([0-9]{1,40}+)(?![\w/]|\.[0-9])"
)
_LAKHS = re.compile(r"(?<![\w.,^])[1-9][0-9]?+(?:,[0-9]{2}){1,6},[0-9]{3}(?![0-9,])")
_NEGATIVE = re.compile(r"(?<![A-Za-z\\])(?:negative|minus)\s{1,3}+(?=[$\\]?[0-9(\\])", re.IGNORECASE)
MONTH = re.compile(
    r"(?<![A-Za-z\\])(?:January|February|March|April|May|June|July|August|September|October|November|December)(?![a-z])"
)
_GROUPED = re.compile(
    r"(?<![\w.^])[1-9][0-9]{0,2}"
    r"(?:(?:\\[,;:! ]|\{,\}(?:\\!)?+|,\\!|~|[ _\u00a0\u2007\u2009\u202f])[0-9]{3}(?![0-9]))++"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FUNCTIONS = _words(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt max min gcd lcm mod det"
)
_UNITS = _words(
    "cm mm km m dm nm in ft yd mi kg g mg lb lbs oz s sec min h hr hrs ms L l mL ml kL Hz N J W V A K C F Pa cal "
    "mph kph cents unit units meter meters metre metres foot feet inch inches yard yards mile miles centimeter "
    "centimeters centimetre centimetres kilometer kilometers kilometre kilometres second seconds"
)
_SHORT = _words("is of or in to at on by an be so it we no")  # words of two letters
_VERBS = _words("is are be equals get have was")
_WORD = re.compile(
    r"(?<![\\A-Za-z_^{])(?P<word>[A-Za-z]++)(?P<per>/[A-Za-z]++)?+(?P<power>\s*+\^\s*+(?:\{\s*+)?-?[0-9](?:\s*+\})?+|[23])?+"
    r"(?!\s*+[+*=^_<>{]|\s*+/|[(\[\w'-]|(?<!\bis)(?<!\bare)(?<!\bbe)\s+[(\[-])"  # f (x), but: is (C), is -5
)
# (1), 1), part (b):, Part 2:, 3., \text{(ii)}, ③
_LABEL = re.compile(
    r"(?:\\text\s?\{\s?)?+(?:[Pp]art\s)?+(?:\(\s?|(?<![\w(.,^{+*/-]))(?P<in>[1-9]|[ivx]{1,4}|[IVX]{1,4}|[a-hA-H])\s?\)(?:\s?\})?+:?+"
    r"|(?<!\S)(?P<before>[1-9])\.(?=\s)|[Pp]art\s(?P<part>[1-9a-hA-H])\s?:|(?P<circled>[\u2460-\u2468])"
)
_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii")
_COUNTS = (tuple("123456789"), tuple("abcdefgh"), tuple("ABCDEFGH"), _ROMAN, tuple(map(str.upper, _ROMAN)))
_FULL_WIDTH = str.maketrans(
    {**dict(zip("；，（）：", ";,():")), "。": ". ", "、": ", ", "Ⅰ": "I", "Ⅱ": "II", "Ⅲ": "III", "Ⅳ": "IV"}
)
_JOIN = re.compile(r"\s*+(?:,?\s*+(?:and|or)|[;,.]|)\s*+", re.IGNORECASE)
_END = re.compile(r"[\s.$]*+$")
MAX_PROSE = 100  # letters around an answer; with more it is a text, not an answer
MAX_ANSWER = 1000  # characters; anything longer is not a final answer, and is neither cleaned nor compared


def gold_text(value: Any) -> str:
    """The data's answer as text. Raises ValueError, with a sentence, for anything but text or a number."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"is {type(value).__name__} and no text")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"is {value} and no finite number")
        text = format(Decimal(repr(value)), "f")
        return text.removesuffix(".0")
    if isinstance(value, int):
        return str(value)
    if not value.strip():
        raise ValueError("is empty")
    return value


def parts(text: str) -> list[str]:
    """The parts of an answer, each as LaTeX without `$`; most have one. Unknown forms stay as they are."""
    inner = boxed(text)
    text = (inner if inner is not None else text).strip().translate(_FULL_WIDTH)
    if len(text) > MAX_ANSWER:
        return [text]
    return [clean for part in _split(text) if (clean := _both_signs(_clean(part)))]


def _both_signs(text: str) -> str:
    r"""Both values of a ± inside braces, where it is not understood: \frac{1\pm\sqrt5}{2}."""
    if r"\pm" not in text or text.count("{", 0, text.index(r"\pm")) <= text.count("}", 0, text.index(r"\pm")):
        return text
    name, equals, value = text.rpartition("=")
    upper = value.replace(r"\pm", "+").replace(r"\mp", "-")
    lower = value.replace(r"\pm", "-").replace(r"\mp", "+")
    return f"{name}{equals}{upper}, {name}{equals}{lower}"


def _split(text: str) -> list[str]:
    """At `;`, at labels (1) (2), and into formulas where nothing else stands between them."""
    if labelled := _labelled(text):
        return [part.replace("$", "") for part in labelled]
    pieces = re.split(r"(?<!\\)\$", text)
    if len(pieces) > 2 and len(pieces) % 2:
        return _formulas(pieces)
    return split_outside("".join(pieces), ";")


def _labelled(text: str) -> list[str]:
    """The texts after the labels (1), (2) … of a text that begins with them, in order; else nothing."""
    labels = list(_LABEL.finditer(text))
    names = tuple(_name_of(match) for match in labels)
    counted = len(names) > 1 and any(names == count[: len(names)] for count in _COUNTS)
    if not counted or text[: labels[0].start()].strip(" $"):
        return []
    ends = [*(match.start() for match in labels[1:]), len(text)]
    found = [
        text[match.end() : end].replace(r"\quad", " ").strip(" ;,.\n") for match, end in zip(labels, ends)
    ]
    return found if all(found) else []


def _name_of(label: re.Match[str]) -> str:
    circled = label["circled"]
    return str(unicodedata.digit(circled)) if circled else label["in"] or label["before"] or label["part"]


def _formulas(pieces: list[str]) -> list[str]:
    """What counts in a text whose odd `pieces` stood between dollars: its formulas, or the text as a whole."""
    outside, inside = pieces[::2], [piece for piece in pieces[1::2] if piece.strip()]
    if all(_JOIN.fullmatch(piece) for piece in outside):
        return _joined(inside, outside[1:-1])
    if any(character.isdigit() for piece in outside for character in piece):
        return ["".join(pieces)]  # 24 $cm^2$
    known = [piece for piece in inside if not _is_unit(piece)] or inside
    between = outside[1:-1]
    if len(known) == len(inside) and all(_JOIN.fullmatch(piece) for piece in between):
        return _joined(known, between)
    return known[-1:]


def _joined(formulas: list[str], between: list[str]) -> list[str]:
    """Separate formulas where `;` or a name separates them; one list, in any order, where a comma or a word does."""
    if any(";" in piece for piece in between) or any("=" in formula for formula in formulas):
        return [part for formula in formulas for part in split_outside(formula, ";")]
    return split_outside(", ".join(formulas), ";")


def _is_unit(text: str) -> bool:
    match = _WORD.fullmatch(_WRAPPERS.sub(r"\1", text).strip())
    return match is not None and match["word"] in _UNITS


def split_outside(text: str, separators: str) -> list[str]:
    """The text split at each one-character separator that is neither in brackets nor part of a LaTeX command."""
    found, depth, start, skip = [], 0, 0, False
    for place, character in enumerate(text):
        if skip:
            skip = False
        elif character == "\\":
            skip = text[place + 1 : place + 2] in (";", ",", "\\", "$", "%")
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif depth <= 0 and character in separators:
            found.append(text[start:place].strip())
            start = place + 1
    return [*found, text[start:].strip()]


def words(text: str) -> str:
    """An answer without wrappers and without more than one blank between words; in small letters if it is prose."""
    bare = text
    for _ in range(3):
        bare = _WRAPPERS.sub(r"\1", bare)
    bare = " ".join(bare.split()).strip(" .")
    return bare.lower() if bare != text or " " in bare else bare


def plain(text: str) -> str:
    """Typography as LaTeX, grouped digits joined and mixed numbers as fractions; words stay."""
    for pattern, latex in _TYPOGRAPHY:
        text = pattern.sub(latex, text)
    text = _MIXED.sub(_improper, text)
    text = _GROUPED.sub(lambda match: re.sub("[^0-9]", "", match[0]), text)
    return _LAKHS.sub(_lakhs, text)


def _lakhs(match: re.Match[str]) -> str:
    """12,05,000 as 1205000. Without a group that begins with 0 it may be a list."""
    return match[0].replace(",", "") if ",0" in match[0] else match[0]


def _periodic(whole: str, before: str, period: str) -> str:
    """0.1\\overline{6} as a fraction."""
    below = (10 ** len(period) - 1) * 10 ** len(before)
    return f"{int(whole + before + period) - int(whole + before or '0')}/{below}"


def _magnitude(text: str, name: str, end: str) -> str:
    r"""5 million as 5\cdot10^{6}, and what else stood in its \text{…} as it was."""
    power = rf"\cdot10^{{{_POWERS[name.lower()]}}}"
    return power if text and end else power + text + end


def _improper(match: re.Match[str]) -> str:
    sign, whole, above, below = match.groups()
    return f"{sign}{int(whole) * int(below) + int(above)}/{int(below)}"


def _clean(text: str) -> str:
    """One part without typography, wrappers and words."""
    text = plain(text)
    for pattern, latex in _MARKUP:
        text = pattern.sub(latex, text)
    bare = text
    for _ in range(3):  # wrappers inside wrappers
        bare = _WRAPPERS.sub(r" \1 ", bare)
    bare = _NEGATIVE.sub("-", bare.strip())
    if MONTH.search(bare):
        return " ".join(re.findall("[0-9A-Za-z]+", bare))
    if not bare.endswith((r"\right.", r"\left.")):
        bare, text = bare.rstrip(". "), text.strip().rstrip(". ")
    core = _without_words(_MIXED.sub(_improper, re.sub(r"\\[ ,;:!]|~", " ", bare)))
    if core is not None:
        return core
    number = re.fullmatch(r"[0-9.,/^{}()+\s-]++", bare)
    return (bare if number else text).strip()


def _without_words(text: str) -> str | None:
    """The formula with words around it, or several joined by and/or; None if the text has another form."""
    words = [match for match in _WORD.finditer(text) if _is_word(match)]
    if not words or sum(len(match["word"]) for match in words) > MAX_PROSE:
        return None
    starts, ends = [0, *(match.end() for match in words)], [*(match.start() for match in words), len(text)]
    chunks = [text[start:end].strip(" :,.;\n") for start, end in zip(starts, ends)]
    full = [index for index, chunk in enumerate(chunks) if re.search(r"[0-9A-Za-z\\]", chunk)]
    kept = [chunks[index] for index in full]
    if len(full) < 2:
        return kept[0] if kept else None
    if words[full[-1] - 1]["word"].lower() in _VERBS:
        return kept[-1]
    joined = all(words[index - 1]["word"].lower() in ("and", "or") for index in full[1:])
    return ", ".join(kept) if joined else None


def _is_word(match: re.Match[str]) -> bool:
    """Whether letters are a word or a unit, rather than a product of variables or a function."""
    word, before = match["word"], match.string[max(0, match.start() - 8) : match.start()]
    apart = not before or before[-1] in " \n,.;:"
    if word in ("I", "a"):
        return apart and re.match(r" [a-z]{3}", match.string[match.end() : match.end() + 4]) is not None
    if word in _UNITS and (apart or len(word) > 1) and re.search(r"[0-9}).]\s*+$", before):
        return len(word) > 1 or _END.match(match.string, match.end()) is not None
    if match["power"] or not apart or word.lower() in _FUNCTIONS:
        return False
    return word.lower() in _SHORT or (len(word) > 2 and re.search("[aeiouy]", word.lower()) is not None)
