"""Configuration errors as one readable line each: file and line, key, what is wrong, value, remedy."""

from __future__ import annotations

import difflib
import re
import types
import typing
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

TROUBLESHOOTING = "docs/troubleshooting.md"
EXIT_STATUS = 2  # what a command line returns for a bad configuration, as argparse does for a bad option

MAX_MESSAGE = 1000  # characters: it may list the columns of a file, or tell what a library says


class _Absent:
    """Marks a problem without a value to show: the key or the file is missing."""

    def __repr__(self) -> str:
        return "<absent>"


ABSENT = _Absent()


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration.

    key: dotted, as in an override ("grpo.learning_rate"); "" for the file itself.
    message: what is wrong. remedy: what to write instead.
    """

    key: str
    message: str
    value: Any = ABSENT
    remedy: str = ""

    def line(self, where: str) -> str:
        """The problem as one line of text; `where` is a file, with its line number if that is known."""
        parts = (where, shortened(self.key, 120), shortened(self.message, MAX_MESSAGE))
        text = ": ".join(part for part in parts if part)
        if not isinstance(self.value, _Absent):
            text += f" (value {show(self.value)})"
        if self.remedy:
            text += f"; {shortened(self.remedy, MAX_MESSAGE)}"
        return visible(" ".join(text.split()))  # a value with line breaks stays on one line


class ConfigError(ValueError):
    """A configuration that cannot be run. str() is one line per problem."""

    def __init__(
        self, problems: Iterable[Problem], locate: Mapping[str, str] | None = None, file: str = ""
    ) -> None:
        self.problems = list(problems)
        self.lines = [p.line(location(p.key, locate or {}, file)) for p in self.problems]
        super().__init__("\n".join(self.lines))


def location(key: str, locate: Mapping[str, str], file: str) -> str:
    """Where `key` was written: its own place, that of a key inside it, of the section around it, or the file."""
    inside = [place for written, place in locate.items() if written.startswith(f"{key}.")]
    if key not in locate and inside:
        return inside[0]
    while key:
        if key in locate:
            return locate[key]
        key = key.rpartition(".")[0]
    return file


def see(section: str) -> str:
    """Where a message's reader finds more: a section of the troubleshooting page, by its anchor."""
    return f"{TROUBLESHOOTING}#{section}"


def show(value: Any, limit: int = 80) -> str:
    """A value as the YAML would show it, shortened to `limit` characters."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, float):
        text = re.sub(r"e([-+])0", r"e\1", f"{value:g}")
    else:
        text = repr(value)
    return shortened(text, limit)


def shortened(text: str, limit: int = 80) -> str:
    """The text, or its beginning and "…" where it is longer than `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def place_of(key: str, name: str) -> Path:
    """The path that a key names, ~ replaced. Raises ConfigError where nobody can say what is there."""
    try:
        if "\0" in name:  # Path.exists() takes it for a name that is not there
            raise ValueError("it holds a NUL character")
        place = Path(name).expanduser()
        place.exists()
    # Too long, another user's folder, the home of nobody.
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            [Problem(key, f"cannot be looked up: {reason}", name, "correct the path")]
        ) from error
    return place


_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def visible(text: str) -> str:
    """The text with escapes (`\\x1b`) for characters that could control a terminal or change the reading direction.

    Line breaks and tabs stay. Half a surrogate pair, which cannot be written to a file, is escaped too.
    """
    return "".join(
        repr(c)[1:-1] if c not in "\n\t" and (c in _BIDI or unicodedata.category(c) in ("Cc", "Cs")) else c
        for c in text
    )


def nearest(word: str, section: str, known: Iterable[str]) -> str:
    """The known dotted key closest to `section.word`, or "" when nothing is near.

    The same name in another section comes first (`learning_rate` at the top level), then a similar name in
    this section, then a similar name anywhere.
    """
    known = sorted(known, key=lambda key: key.count("."))  # the least nested first
    for key in known:
        if key.rpartition(".")[2] == word:
            return key
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    for pool in (siblings, known):
        leaves = {key.rpartition(".")[2]: key for key in reversed(pool)}
        found = difflib.get_close_matches(word, leaves, n=1, cutoff=0.7)
        if found:
            return leaves[found[0]]
    return ""


def unknown_key(section: str, word: str, value: Any, known: Iterable[str]) -> Problem:
    """The problem of an unknown key, with the nearest known one as a remedy."""
    known = list(known)
    guess = nearest(word, section, known)
    siblings = sorted(key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section)
    if guess:
        remedy = f"did you mean {guess}?"
    elif 0 < len(siblings) <= 20:
        remedy = f"known here: {', '.join(siblings)}"
    else:
        remedy = "remove it; docs/configuration.md lists every key"
    return Problem(join(section, word), "unknown key", value, remedy)


def join(*parts: Any) -> str:
    """Dotted key of the non-empty parts."""
    return ".".join(str(part) for part in parts if part != "")


def one_of(choices: Iterable[Any]) -> str:
    """'a, b or c'."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


_PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}


def describe_type(annotation: Any) -> str:
    """A type annotation in words that a person who writes YAML knows."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if origin is typing.Annotated:
        return describe_type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_type(a) for a in arguments if not _is_enum(a)))
    if origin is typing.Literal:
        return one_of(_literal(a) for a in arguments)
    if origin in (list, tuple, set):
        return f"a list of {_plural(arguments[0])}" if arguments else "a list"
    if origin is dict or annotation is dict:
        return "a mapping"
    if _is_enum(annotation):
        return one_of(member.value for member in annotation)
    return "a section of keys" if hasattr(annotation, "model_fields") else "another type"


def _plural(annotation: Any) -> str:
    return {int: "integers", float: "numbers", str: "texts", bool: "true/false"}.get(annotation, "values")


def _literal(value: Any) -> str:
    return show(value) if value is None or isinstance(value, bool) else str(value)


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Enum)
