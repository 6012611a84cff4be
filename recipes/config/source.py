"""Reading a run's YAML: safe, no duplicate keys, `base:` files merged, overrides applied, lines remembered.

Scalars follow YAML 1.2: `5e-6` is a number and `no`, `on`, `010` and `2026-01-01` are what they look like.
PyYAML's own rules are YAML 1.1, in which they are a string, two booleans, 8 and a date.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipes.problems import ConfigError, Problem, join

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


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict = {}

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        """An integer as written: a leading zero is no octal."""
        text = node.value
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
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)


@dataclass
class Document:
    """A parsed file, or several merged: the data, and where each dotted key was written ("x.yaml:12")."""

    data: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)


def dump(data: dict[str, Any]) -> str:
    """YAML text, keys in the given order, that `read_text` reads back to equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_file(path: Path, _children: tuple[Path, ...] = ()) -> Document:
    """A YAML file with its `base:` files merged beneath it.

    Raises ConfigError: missing file, bad YAML, duplicate key, or a base that leads back to itself.
    """
    children = (*_children, path.resolve())
    if path.resolve() in _children:
        chain = " -> ".join(child.name for child in children)
        raise ConfigError(
            [Problem("base", f"goes round in a circle: {chain}", remedy="remove one base")], {}, str(path)
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
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
    if not target.is_file():
        missing = Problem("base", "no such file", base, "the path is relative to the file that names it")
        raise ConfigError([missing], document.where, str(path))
    return merge(read_file(target, children), document)


def read_text(text: str, name: str) -> Document:
    """One YAML document; `name` stands for the file in messages.

    Raises ConfigError for bad YAML, a duplicate key, a key that is no text, a tag such as !!python/… or a top
    level that is no mapping.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Document()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                [Problem("", "must be a mapping of sections", remedy="start with `model:`")], {}, name
            )
        document = Document()
        _walk(node, "", name, document.where, set())
        document.data = loader.construct_document(node)
        return document
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        reason = getattr(error, "problem", None) or str(error)
        remedy = "see the indentation, colons and quotes on that line"
        raise ConfigError([Problem("", f"not valid YAML: {reason}", remedy=remedy)], {}, where) from error
    finally:
        loader.dispose()


def _walk(node: yaml.Node, key: str, name: str, where: dict[str, str], open_nodes: set[int]) -> None:
    """Notes the line of every key under `node`; refuses what the schema could not describe."""
    place = f"{name}:{node.start_mark.line + 1}"
    if node.tag not in _KNOWN_TAGS:
        raise ConfigError(
            [Problem(key, f"the YAML tag {node.tag} is not read", remedy="write a plain value")], {}, place
        )
    if id(node) in open_nodes:
        raise ConfigError(
            [Problem(key, "an alias inside its own anchor", remedy="write the values out")], {}, place
        )
    inside = open_nodes | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, join(key, index), name, where, inside)
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
        _walk(value_node, join(key, word), name, where, inside)


def read_overrides(overrides: list[str]) -> Document:
    """`section.key=value` arguments as a document; values are YAML scalars or flow lists.

    Raises ConfigError for an argument without a key or `=`, a key given twice, or a value that is not YAML.
    """
    document = Document()
    for override in overrides:
        key, equals, text = override.partition("=")
        words = key.strip().split(".")
        if not equals or not all(words):
            wrong = Problem(
                "", "not an override", override, "write section.key=value, such as grpo.learning_rate=2e-5"
            )
            raise ConfigError([wrong], {}, OVERRIDE)
        value = read_text(f"value: {text}", OVERRIDE).data["value"]
        target = document.data
        for word in words[:-1]:
            target = target.setdefault(word, {})
            if not isinstance(target, dict):
                raise ConfigError([Problem(key, "set as a value and as a section", override)], {}, OVERRIDE)
        if words[-1] in target:
            raise ConfigError([Problem(key, "given twice", override, "keep one of the two")], {}, OVERRIDE)
        target[words[-1]] = value
        document.where[".".join(words)] = OVERRIDE
    return document


def merge(below: Document, above: Document) -> Document:
    """`above` over `below`: mappings are merged key by key, anything else is replaced.

    A task of another name starts afresh: the options of the one below mean nothing to it.
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
