"""Reading a run's YAML: safe, no duplicate keys, `base:` files merged, overrides applied, lines remembered.

A file that cannot be a configuration (megabytes, thousands of brackets, aliases of aliases) is refused before it is
built. Scalars follow YAML 1.2: `5e-6` is a number and `no`, `on`, `010` and `2026-01-01` are what they look like.
PyYAML's own rules are YAML 1.1, in which they are a string, two booleans, 8 and a date.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import yaml

from recipes.problems import ConfigError, Problem, join, shortened

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_CORE = (  # order matters: the first pattern that matches names the type
    ("tag:yaml.org,2002:null", re.compile(r"~|null|Null|NULL|")),
    ("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("tag:yaml.org,2002:int", _INT),
    ("tag:yaml.org,2002:float", _FLOAT),
    ("tag:yaml.org,2002:merge", re.compile(r"<<")),
)
_KNOWN_TAGS = {tag for tag, _ in _CORE} | {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}
OVERRIDE = "command line"  # where a value from the command line comes from
# Characters of a file; keys and values, an alias counted as what it stands for.
MAX_TEXT, MAX_VALUES = 200_000, 5_000
MAX_DEPTH, MAX_BRACKETS, MAX_DIGITS = 20, 100, 100  # sections in sections; open at once; of a number


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML, but more than a configuration can mean."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2's core schema and a bound on what it builds."""

    yaml_implicit_resolvers: dict = {}
    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node and all below it, by recursion. Raises _Refused where it is too deep or too large."""
        self.depth += 1
        self.nodes += 1
        mark = self.peek_event().start_mark
        if self.depth > MAX_DEPTH:
            raise _Refused(problem=f"is nested more than {MAX_DEPTH} deep", problem_mark=mark)
        if self.nodes > MAX_VALUES:
            raise _Refused(problem=f"holds more than {MAX_VALUES:,} keys and values", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        """An integer as written: a leading zero does not make it octal. Raises _Refused for an absurdly long one."""
        text = node.value
        if len(text) > MAX_DIGITS:  # beyond 4,300 Python itself will not write it in a message
            raise _Refused(problem=f"is a number of {len(text):,} digits", problem_mark=node.start_mark)
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: a text that looks like a number under either schema is quoted."""

    yaml_implicit_resolvers = {
        key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, _pattern in _CORE:
    _whole = re.compile(f"^(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(_tag, _whole, None)
    _Dumper.add_implicit_resolver(_tag, _whole, None)
_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)


@dataclass
class Document:
    """A parsed file, or several merged: the data, and where each dotted key was written ("x.yaml:12")."""

    data: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)


def dump(data: dict[str, Any]) -> str:
    """YAML text, keys in the given order, that `read_text` reads back to equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def override(key: str, value: Any) -> str:
    """`key=value` as a command line has it, that `read_overrides` reads back to an equal value of the same type.

    Raises ConfigError for a value that YAML cannot express.
    """
    try:
        text = yaml.dump(
            {"value": value}, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf
        )
    except yaml.YAMLError as error:
        remedy = "give text, a number, true or false, a list or a mapping"
        raise ConfigError([Problem(key, "cannot be written as YAML", value, remedy)]) from error
    return f"{key}={text.strip()[len('{value: ') : -1]}"


def read_file(path: Path, _children: tuple[str, ...] = ()) -> Document:
    """A YAML file with its `base:` files merged beneath it.

    Raises ConfigError: missing file, bad YAML, duplicate key, or a base that leads back to itself.
    """
    place = os.path.realpath(path)
    if place in _children:
        chain = " -> ".join(Path(child).name for child in (*_children, place))
        raise ConfigError(
            [Problem("base", f"goes round in a circle: {chain}", remedy="remove one base")], {}, str(path)
        )
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_TEXT + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        cause = Problem(
            "",
            f"cannot be read: {reason}",
            remedy="give the path of a YAML file, such as configs/quickstart.yaml",
        )
        raise ConfigError([cause], {}, str(path)) from error
    document = read_text(text, str(path))
    base = document.data.pop("base", None)
    if base is None:
        return document
    if not isinstance(base, str):
        wrong = Problem("base", "must be the path of one YAML file", base, "write base: other.yaml")
        raise ConfigError([wrong], document.where, str(path))
    target = path.parent / base
    if not os.path.isfile(target):  # False, too, for what cannot be the name of a file
        missing = Problem("base", "no such file", base, "the path is relative to the file that names it")
        raise ConfigError([missing], document.where, str(path))
    return merge(read_file(target, (*_children, place)), document)


def read_text(text: str, name: str) -> Document:
    """One YAML document; `name` stands for the file in messages.

    Raises ConfigError for bad YAML, a duplicate key, a key that is not text, a tag such as !!python/…, a top level
    that is not a mapping, or more than a configuration can hold.
    """
    # PyYAML's scanner takes minutes over many open brackets.
    if len(text) > MAX_TEXT or _open_brackets(text) > MAX_BRACKETS:
        message = (
            f"is longer than {MAX_TEXT:,} characters, or opens more than {MAX_BRACKETS} brackets at once"
        )
        raise ConfigError(
            [Problem("", message, remedy="write less: a configuration is a page or two")], {}, name
        )
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                [Problem("", "must be a mapping of sections", remedy="start with `model:`")], {}, name
            )
        document = Document()
        _walk(node, "", name, document.where, set(), itertools.count(1))
        document.data = loader.construct_document(node)
        return document
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:  # the others from a tag: `!!int x`
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        reason = shortened(getattr(error, "problem", None) or str(error), 300)
        if isinstance(error, _Refused):
            cause = Problem("", reason, remedy="write less: a configuration is a page or two")
        else:
            remedy = "see the indentation, colons and quotes on that line"
            cause = Problem("", f"not valid YAML: {reason}", remedy=remedy)
        raise ConfigError([cause], {}, where) from error
    finally:
        if loader is not None:
            loader.dispose()


def _open_brackets(text: str) -> int:
    """The most brackets that are open at once, as if none stood in quotes."""
    steps = {"[": 1, "{": 1, "]": -1, "}": -1}
    return max(itertools.accumulate(steps.get(character, 0) for character in text), default=0)


def _walk(
    node: yaml.Node,
    key: str,
    name: str,
    where: dict[str, str],
    open_nodes: set[int],
    counted: Iterator[int],
) -> None:
    """Notes the line of every key under `node`; refuses what the schema could not describe."""
    place = f"{name}:{node.start_mark.line + 1}"
    if next(counted) > MAX_VALUES:
        message = f"holds more than {MAX_VALUES:,} keys and values, aliases written out"
        raise ConfigError([Problem("", message, remedy="use fewer aliases")], {}, place)
    if node.tag not in _KNOWN_TAGS:
        raise ConfigError(
            [Problem(key, f"the YAML tag {shortened(node.tag)} is not read", remedy="write a plain value")],
            {},
            place,
        )
    if id(node) in open_nodes:
        raise ConfigError(
            [Problem(key, "an alias inside its own anchor", remedy="write the values out")], {}, place
        )
    inside = open_nodes | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, join(key, index), name, where, inside, counted)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, str] = {}
    for key_node, value_node in node.value:
        line = f"{name}:{key_node.start_mark.line + 1}"
        word = key_node.value
        if not isinstance(word, str) or key_node.tag not in (
            "tag:yaml.org,2002:str",
            "tag:yaml.org,2002:merge",
        ):
            raise ConfigError([Problem(key, "a key must be text", word, "quote it or rename it")], {}, line)
        if word in seen:
            remedy = f"keep one; the first is at {seen[word]}"
            raise ConfigError([Problem(join(key, word), "written twice", remedy=remedy)], {}, line)
        seen[word] = line
        where[join(key, word)] = line
        _walk(value_node, join(key, word), name, where, inside, counted)


def read_overrides(overrides: list[str]) -> Document:
    """`section.key=value` arguments as a document; values are YAML scalars or flow lists.

    Raises ConfigError for an argument without a key or `=`, a key given twice, or a value that is not YAML.
    """
    document = Document()
    for override in overrides:
        key, equals, text = override.partition("=")
        words = key.strip().split(".")
        if not equals or not all(words) or len(words) > MAX_DEPTH:
            wrong = Problem(
                "", "not an override", override, "write section.key=value, such as grpo.learning_rate=2e-5"
            )
            raise ConfigError([wrong], {}, OVERRIDE)
        try:
            data = read_text(f"value: {text}", OVERRIDE).data
        except ConfigError as error:  # what it calls the value is the key
            named = [
                replace(wrong, key=join(key, wrong.key.removeprefix("value").lstrip(".")))
                for wrong in error.problems
            ]
            raise ConfigError(named, {}, OVERRIDE) from error
        if list(data) != ["value"]:  # a line break, and another key after it
            raise ConfigError([Problem(key, "is more than one value", override)], {}, OVERRIDE)
        target = document.data
        for word in words[:-1]:
            target = target.setdefault(word, {})
            if not isinstance(target, dict):
                raise ConfigError([Problem(key, "set as a value and as a section", override)], {}, OVERRIDE)
        if words[-1] in target:
            raise ConfigError([Problem(key, "given twice", override, "keep one of the two")], {}, OVERRIDE)
        target[words[-1]] = data["value"]
        document.where[".".join(words)] = OVERRIDE
    return document


def merge(below: Document, above: Document) -> Document:
    """`above` over `below`: mappings are merged key by key, anything else is replaced.

    A task of another name starts from nothing: the options of the one below mean nothing to it.
    """
    lower = dict(below.data)
    if _task_name(above) not in (None, _task_name(below)):
        lower.pop("task", None)
    where = {
        key: line for key, line in below.where.items() if lower.get("task") is not None or key[:5] != "task."
    }
    return Document(_merge(lower, above.data), {**where, **above.where})


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _task_name(document: Document) -> Any:
    task = document.data.get("task")
    return task.get("name") if isinstance(task, dict) else None
