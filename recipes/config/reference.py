"""docs/configuration.md, written from the schema: `python -m recipes.config --markdown > docs/configuration.md`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from recipes.config.grpo import GONE, OWNED, RANGES, REFUSED, grpo_section, import_grpo_config
from recipes.config.schema import ORDER, SECTIONS, nested_section
from recipes.problems import describe_type, show

_OPENING = """# Configuration

One YAML file describes a run. `base: other.yaml` (relative to the file) builds on another file and says only what
differs; `section.key=value` on the command line overrides both. An unknown key, a wrong type or a value out of range
is an error that names file, line, key, value and remedy, before anything is loaded.

This page is generated from the schema: `python -m recipes.config --markdown > docs/configuration.md`.
`python -m recipes.config FILE [key=value …]` prints a configuration as it resolves.
"""
_GRPO = """Any field of the installed TRL's `GRPOConfig` by its own name; its documentation is TRL's. Checked here: the
name, the type, these ranges, the choices of every field that has a list of them, and that a generation batch
(`per_device_train_batch_size` × `steps_per_generation` × processes) is whole groups of `num_generations`.
"""


def markdown() -> str:
    """The whole page."""
    from recipes.tasks import get_task, task_names

    parts = [_OPENING]
    for name in ORDER:
        parts.append(f"## `{name}`\n")
        if name == "grpo":
            parts += list(_grpo())
        elif name == "task":
            parts.append("`task.name` chooses the task; the task's own options stand beside it.\n")
            for task in sorted(task_names()):
                parts += [f"### `task.name: {task}`\n", *_section("task", get_task(task).Options)]
        else:
            parts += list(_section(name, SECTIONS[name]))
    return "\n".join(parts)


def _section(key: str, section: type[BaseModel]) -> Iterator[str]:
    """The section's sentence, its table, and the sections inside it."""
    if key != "task":
        yield f"{' '.join((section.__doc__ or '').split())}\n"
    rows = [_row(f"{key}.{name}", field) for name, field in section.model_fields.items()]
    if rows:
        yield _table(("key", "value", "default", ""), rows)
    for name, field in section.model_fields.items():
        nested = nested_section(field.annotation)
        if nested is not None:
            yield f"### `{key}.{name}`\n"
            yield from _section(f"{key}.{name}", nested)


def _row(key: str, field: FieldInfo) -> tuple[str, str, str, str]:
    if field.is_required():
        default = "required"
    elif field.default_factory is not None:
        default = "its defaults"
    else:
        default = f"`{show(field.default)}`"
    return f"`{key}`", describe_type(field.annotation) + _range(field), default, field.description or ""


def _range(field: FieldInfo) -> str:
    """The bounds in the annotation, such as ` >= 1`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {getattr(bound, name):g}"
        for bound in _metadata(field)
        for name, sign in signs.items()
        if getattr(bound, name, None) is not None
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _metadata(field: FieldInfo) -> Iterator[Any]:
    """Bounds beside the type, and those inside `Annotated[int, …] | None`."""
    yield from field.metadata
    for part in getattr(field.annotation, "__args__", ()):
        for inner in getattr(part, "__metadata__", ()):
            yield from getattr(inner, "metadata", ())


def _grpo() -> Iterator[str]:
    yield _GRPO
    fields = grpo_section(import_grpo_config("")).model_fields
    rows = [
        (f"`{name}`", _range(field).strip(), f"`{show(field.default)}`")
        for name, field in fields.items()
        if name in RANGES
    ]
    yield _table(("field", "range", "TRL's default"), rows)
    yield f"`loss_type`: {describe_type(fields['loss_type'].annotation)}.\n"
    yield "Set elsewhere:\n"
    yield _table(("field", "set instead"), [(f"`{name}`", where) for name, where in sorted(OWNED.items())])
    yield "Refused:\n"
    yield _table(
        ("field", "why, and what to do"), [(f"`{name}`", why) for name, why in sorted(REFUSED.items())]
    )
    yield "No longer in TRL or transformers, though still copied:\n"
    yield _table(("field", "what replaced it"), [(f"`{name}`", what) for name, what in sorted(GONE.items())])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
