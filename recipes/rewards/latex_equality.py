"""Whether parts of answers are equal: math-verify's verdict, and a second check where it says yes too easily.

Only the process of `math_verifier` imports this: a comparison may take forever, or all of the memory.
"""

from __future__ import annotations

import re
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import (
    And,
    Basic,
    Eq,
    FiniteSet,
    I,
    Intersection,
    Interval,
    MatrixBase,
    Ne,
    Or,
    Rational,
    S,
    Set,
    Symbol,
    Tuple,
    UnevaluatedExpr,
    Union,
)
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from recipes.rewards.latex import MONTH, split_outside, words

_ANYWHERE = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
_OPTIONS: dict[str, Any] = {"parsing_timeout": None}  # its alarms do not end what hangs; the kill does
_BASE = re.compile(r"(?P<digits>[0-9A-Z]{1,100})_(?P<brace>\{)?(?P<base>[0-9]{1,2})(?(brace)\})")
# With nothing before it.
_RELATION = re.compile(r"\s*(?:[<>]|\\(?:[gln]eq?|[gl]eqslant|[gl]t|not)(?![A-Za-z]))")
_MODULUS = re.compile(r"\\[bp]?mod|\\equiv")
_LETTERS = re.compile("[A-Z]{3,}")  # names in an order, as CAB; not a product, which has any
_PERCENT = re.compile(r"\\?%$")
_POINT = re.compile(r"(?:\\left)?\(")
_SET = re.compile(r"(?:\\left)?\\\{(?!\s*(?:\\left)?\()")
_EXPONENT = re.compile(r"\^\s*\{?\s*-?[0-9]+")
_LOOSE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")
_CLOSE = 1e-3  # relative; math-verify rounds to 6 places, which leaves nothing of 1/30!


def same_parts(gold: list[str], given: list[str]) -> bool:
    """Each part equals its counterpart; a list without names or places may come in another order."""
    if len(gold) > 1 and len(given) == 1:
        given = [part for part in split_outside(given[0], ",") if part]
    if len(gold) != len(given):
        return len(gold) == 1 and not any("=" in part for part in given) and same(gold[0], ", ".join(given))
    if all("=" in part for part in (*gold, *given)):  # x=5; y=10 in either order
        gold, given = sorted(gold, key=_name), sorted(given, key=_name)
    return all(same(*pair) for pair in zip(gold, given))


def _name(part: str) -> str:
    return part.partition("=")[0].strip()


def same(gold: str, given: str) -> bool:
    """Whether two LaTeX expressions are equal."""
    if _LOOSE.sub("", gold) == _LOOSE.sub("", given):
        return True
    if words(gold) in (words(given), given.lower()) or words(given) == gold.lower():
        return True
    if MONTH.search(gold) or MONTH.search(given):  # of a date no number is taken by itself
        return False
    if (_POINT.match(gold) and _SET.match(given)) or (_SET.match(gold) and _POINT.match(given)):
        return False
    if _MODULUS.search(gold) and _MODULUS.search(given):  # math-verify leaves the modulus aside
        return _congruence(gold) == _congruence(given)
    if _LETTERS.fullmatch(gold) and _LETTERS.fullmatch(given):
        return False
    if _RELATION.match(gold) or _RELATION.match(given):  # of ≥ 5 math-verify reads the 5
        return same(*(f"x{part}" if _RELATION.match(part) else part for part in (gold, given)))
    ratios = [split_outside(part, ":") for part in (gold, given)]
    if max(map(len, ratios)) > 2:
        return len(ratios[0]) == len(ratios[1]) and all(map(same, *map(_quotients, ratios)))
    bases = [_BASE.fullmatch(part.replace(" ", "")) for part in (gold, given)]
    if bases[0] and bases[1]:
        return _digits(bases[0]) == _digits(bases[1])
    if _same_expressions(_known(gold), _parse(given)):
        return True
    # Of 50\% math-verify takes 50, too; of 12.5\% it does not take 12.5.
    bare = [_PERCENT.sub("", part) for part in (gold, given)]
    return bare != [gold, given] and same(*bare)


def _congruence(part: str) -> str:
    return re.sub(r"\\[bp]?mod|mod", "mod", re.sub(r"[\s{}()]|\\[ ,;:!]|\\q?quad", "", part))


def _quotients(ratio: list[str]) -> list[str]:
    """3:4:5 as 3/5 and 4/5: math-verify reads the first two alone."""
    return [rf"\frac{{{term}}}{{{ratio[-1]}}}" for term in ratio[:-1]]


def _digits(match: re.Match[str]) -> int | str:
    """The value of 101_2, or what is written if its digits are none of that base."""
    try:
        return int(match["digits"], int(match["base"]))
    except ValueError:
        return match[0]


def same_in_text(gold: list[str], text: str) -> bool:
    """Whether the final answer that math-verify finds in a text equals all of `gold`."""
    found = parse(text, extraction_config=_ANYWHERE, **_OPTIONS)
    return _same_expressions(_known(", ".join(gold)), found)


def _known(gold: str) -> list[Any]:
    """The data's answer; of a calculation, 3+5=8, its result."""
    parsed = _parse(gold)
    if parsed and isinstance(parsed[0], (Eq, And)) and _claimed(parsed[0]) and not parsed[0].free_symbols:
        return _parse(split_outside(gold, "=")[-1])
    return parsed


def _parse(latex: str) -> list[Any]:
    parsed: list[Any] = parse(f"${latex}$", extraction_config=_ANYWHERE, **_OPTIONS)
    read = parsed[-1] if parsed else ""
    # Of 5\text{ hours }30\text{ minutes} it reads the 5.
    return parsed if not isinstance(read, str) or _digit_count(read) >= _digit_count(latex) else []


def _digit_count(latex: str) -> int:
    """Digits outside of exponents, which units may have."""
    return sum(character in "0123456789" for character in _EXPONENT.sub("", latex))


def _same_expressions(gold: list[Any], given: list[Any]) -> bool:
    if not gold or not given:
        return False
    if any(_is_inequality(values[0]) for values in (gold, given)):
        solved = [_solutions(values[0]) for values in (gold, given)]
        if None not in solved:
            return bool(solved[0] == solved[1])
    if not verify(gold, given, timeout_seconds=None):
        if _names_i(gold[0], given[0]):
            return _same_expressions(*([_with_i(values[0])] for values in (gold, given)))
        return _same_curve(gold[0], given[0])
    known, found = gold[0], given[0]
    if not isinstance(known, (Relational, And)):
        sides = _claimed(found)
        if len(sides) > 1:  # 6=5 does not say 5
            return all(_same_expressions([known], [side]) for side in sides)
    return not _apart(known, found)


def _is_inequality(value: Any) -> bool:
    some = value.args if isinstance(value, FiniteSet) else (value,)
    return any(isinstance(one, (Relational, And, Or)) for one in some)


def _solutions(value: Any) -> Any:
    """The numbers that an inequality in one unknown, or several, or a set stand for; None for anything else."""
    if isinstance(value, Eq) and isinstance(value.rhs, Set):  # x ∈ [0, 1]
        value = value.rhs
    if isinstance(value, FiniteSet):  # x < 1 or x > 2; others may be meant together
        each = [_solutions(inequality) for inequality in value.args]
        apart = len(each) == 2 and None not in each and Intersection(*each) is S.EmptySet
        return Union(*each) if apart else None
    if isinstance(value, Set):
        return value
    inequalities = isinstance(value, (And, Or, Relational)) and not value.has(Eq, Ne)
    if not inequalities or len(value.free_symbols) != 1:
        return None
    (unknown,) = value.free_symbols
    try:
        return value.subs(unknown, Symbol("x", real=True)).doit().as_set()
    except (NotImplementedError, TypeError, ValueError):
        return None


def _same_curve(known: Any, found: Any) -> bool:
    """Whether equations say the same of several unknowns: their differences are multiples of each other."""
    if not (isinstance(known, Eq) and isinstance(found, Eq)) or len(known.free_symbols) < 2:
        return False
    if isinstance(known.lhs, Symbol) or known.free_symbols != found.free_symbols:
        return False
    try:
        factor = ((known.lhs - known.rhs) / (found.lhs - found.rhs)).doit().simplify()
    except (TypeError, AttributeError):
        return False
    return bool(factor.is_number and factor.is_finite and not factor.is_zero)


def _names_i(*values: Any) -> bool:
    return any(
        named.name == "i" for value in values if isinstance(value, Basic) for named in value.free_symbols
    )


def _with_i(value: Any) -> Any:
    """i as the imaginary unit, which the parser takes for a name like any other."""
    if not isinstance(value, Basic):
        return value
    return value.subs({named: I for named in value.free_symbols if named.name == "i"}).doit()


def _claimed(found: Any) -> list[Any]:
    """The sides of an equation, or of a chain of them, that are numbers."""
    relations = found.args if isinstance(found, And) else [found]
    sides = [side for relation in relations if isinstance(relation, Eq) for side in relation.args]
    return [
        side for side in sides if isinstance(side, Basic) and not side.free_symbols | side.atoms(AppliedUndef)
    ]


def _apart(known: Any, found: Any) -> bool:
    """Whether numbers that are equal after rounding differ: exactly, or relatively where there are decimals.

    In sets, where each must have its like, in tuples and the like, and after the sign of an equation, too.
    """
    if isinstance(known, FiniteSet) and isinstance(found, FiniteSet):
        both = (known.args, found.args), (found.args, known.args)
        return any(all(_apart(one, other) for other in there) for here, there in both for one in here)
    if len(inside := _inside(known)) == len(_inside(found)) and inside:
        return any(_apart(*pair) for pair in zip(inside, _inside(found)))
    if isinstance(known, Eq) and isinstance(found, Eq) and known.lhs != found.lhs:
        return False
    known, found = (value.rhs if isinstance(value, Eq) else value for value in (known, found))
    pair = [value for value in (known, found) if isinstance(value, Basic)]
    if len(pair) < 2 or any(value.free_symbols or value.has(UnevaluatedExpr) for value in pair):
        return False
    try:
        first, second = (value.doit() for value in pair)
        if isinstance(first, Rational) and isinstance(second, Rational):
            return bool(first != second)
        return bool(abs(first - second).evalf() > _CLOSE * max(abs(first).evalf(), abs(second).evalf()))
    except (TypeError, AttributeError, NotImplementedError):  # not numbers: other sets
        return False


def _inside(value: Any) -> list[Any]:
    """The elements of what has an order."""
    if isinstance(value, Interval):
        return [value.start, value.end]
    return list(value) if isinstance(value, (Tuple, MatrixBase)) else []
