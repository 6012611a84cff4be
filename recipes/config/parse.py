"""A section of the YAML as its pydantic model, or everything that is wrong with it, in plain words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from recipes.config.schema import nested_section
from recipes.problems import Problem, describe_type, join, unknown_key

MANY = 50  # problems of one section that are listed
_BOUNDS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
_LIMITS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}


def parse_section(
    name: str, section: type[BaseModel], data: dict[str, Any], known: list[str]
) -> tuple[list[Problem], Any]:
    """`data` as a `section`, strictly; or the problems, one per faulty key.

    name: the section's own key. known: the dotted keys of all sections, to suggest from.
    """
    try:  # through JSON, in whose strict mode a list may become a tuple, but no text a number
        return [], section.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        details = error.errors()
    found: dict[str, Problem] = {}
    for detail in details[:MANY]:
        problem = _problem(name, section, data, dict(detail), known)
        found.setdefault(problem.key, problem)
    if len(details) > MANY:
        found[""] = Problem(name, f"has {len(details) - MANY} more mistakes", remedy="mend these first")
    return list(found.values()), None


def unknown_keys(section: str, data: dict[str, Any], names: Iterable[str], known: list[str]) -> list[Problem]:
    """A problem for each key of `data` that is not among `names`."""
    strange = ((key, value) for key, value in data.items() if key not in names)
    return [unknown_key(section, key, value, known) for key, value in islice(strange, MANY)]


def _problem(
    name: str, section: type[BaseModel], data: dict[str, Any], detail: dict[str, Any], known: list[str]
) -> Problem:
    """One of pydantic's error details in plain words."""
    kind, value = detail["type"], detail["input"]
    words = _real_path(data, detail["loc"]) + ([detail["loc"][-1]] if kind == "missing" else [])
    key = join(name, *words)
    annotation, description = _field_at(section, words)
    if kind == "extra_forbidden":
        return unknown_key(join(name, *words[:-1]), str(words[-1]), value, known)
    if kind == "missing":
        return Problem(key, "is missing", remedy=f"set it: {description}")
    if kind in _BOUNDS:
        bound = detail["ctx"][_LIMITS[kind]]
        return Problem(key, "out of range", value, f"must be {_BOUNDS[kind]} {bound:g}")
    if kind in ("literal_error", "enum") and annotation is not None:
        return Problem(key, "unknown choice", value, f"use {describe_type(annotation)}")
    if kind == "value_error":  # a task's own validator: its words are the message
        return Problem(key, detail["msg"].removeprefix("Value error, "), value)
    if kind == "finite_number" or kind.endswith(("_type", "_parsing")) or "from_" in kind:
        wanted = describe_type(annotation) if annotation is not None else detail["msg"]
        return Problem(key, f"must be {wanted}", _value_at(data, words), description)
    return Problem(key, detail["msg"][0].lower() + detail["msg"][1:], value, description)


def _real_path(data: Any, loc: Sequence[Any]) -> list[Any]:
    """The part of pydantic's location that exists in the data: it adds the names of a union's members."""
    words: list[Any] = []
    for word in loc:
        if not (isinstance(data, dict) and word in data) and not (
            isinstance(data, list) and word in range(len(data))
        ):
            break
        words.append(word)
        data = data[word]
    return words


def _value_at(data: Any, words: Sequence[Any]) -> Any:
    for word in words:
        data = data[word]
    return data


def _field_at(section: type[BaseModel], words: Sequence[Any]) -> tuple[Any, str]:
    """The field's annotation and description; None and "" if there is no such field."""
    annotation, description = None, ""
    for word in words:
        field = section.model_fields.get(str(word))
        if field is None:
            annotation = _inside(annotation)
            break
        annotation, description = field.annotation, field.description or ""
        section = nested_section(annotation) or section
    return annotation, description


def _inside(annotation: Any) -> Any:
    """The type of the values in `dict[…] | None` or `list[…] | None`; another annotation as it is."""
    for candidate in (annotation, *get_args(annotation)):
        if get_origin(candidate) in (dict, list):
            return get_args(candidate)[-1]
    return annotation
