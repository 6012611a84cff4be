"""Whether parts of answers are equal: math-verify's verdict, and a second check where it says yes too easily.

Only the process of `math_verifier` imports this: a comparison may take forever, or all of the memory.
"""

from __future__ import annotations

from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import And, Basic, Eq, FiniteSet, Interval, MatrixBase, Rational, Tuple, UnevaluatedExpr
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from recipes.rewards.latex import split_outside

_ANYWHERE = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
_OPTIONS: dict[str, Any] = {"parsing_timeout": None}  # its alarms do not end what hangs; the kill does
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
    if gold == given:
        return True
    return _same_expressions(_known(gold), _parse(given))


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
    return parsed


def _same_expressions(gold: list[Any], given: list[Any]) -> bool:
    if not gold or not given or not verify(gold, given, timeout_seconds=None):
        return False
    known, found = gold[0], given[0]
    if not isinstance(known, (Relational, And)):
        sides = _claimed(found)
        if len(sides) > 1:  # 6=5 does not say 5
            return all(_same_expressions([known], [side]) for side in sides)
    return not _apart(known, found)


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
