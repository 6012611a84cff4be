"""A task's data: the rows of a hub id, a folder or a file, and what is held out of them.

rows = read_rows("openai/gsm8k", "train", "main")      from the hub, or its cache
rows = read_rows("../shared/data/gsm8k", "train")      a folder: train.jsonl, train.parquet or data/train-*.parquet
rows = read_rows("problems.jsonl", "train", None, [Column("n", text)])     one file, of any split

Every value of the columns is checked when it is read: a wrong one is one line with file, row and column.
"""

from __future__ import annotations

import json
import logging
import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset, load_dataset

from recipes.problems import ABSENT, ConfigError, Problem, one_of, place_of

Rows = list[dict[str, Any]]
T = TypeVar("T")
_KINDS = (".jsonl", ".json", ".parquet")
# What TRL or a reward's call passes by these names, or takes for something else than a column.
_TAKEN = {
    *("prompt", "prompts", "completion", "completions", "completion_ids", "image", "images", "self"),
    *("environment", "environments", "trainer_state", "log_extra", "log_metric"),
}
MAX_TEXT = 1_000_000  # characters of one value: a book, or a mistake
_ARCHIVES = {  # what a file of another kind begins with
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstd",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class BadValue(ValueError):
    """A value that a column must not hold. str(): what is wrong with it; remedy: what to do about it."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


@dataclass(frozen=True)
class Column:
    """A column that a task reads.

    read: the value as the task takes it; raises BadValue. source: the data's own name of it; None: the same, and there
    is no key to give another.
    """

    name: str
    read: Callable[[Any], Any]
    source: str | None = None


@dataclass(frozen=True)
class _Source:
    """A file, or a split on the hub, and its rows: counted from 1, in a file of lines as its lines are."""

    name: str
    rows: list[tuple[int, Any]]


def read_rows(
    dataset: str,
    split: str,
    config: str | None = None,
    columns: Sequence[Column] = (),
    without: str = "",
) -> Rows:
    """The rows of a split, each column read by its `read`. `config`: the dataset's configuration on the hub.

    without: what else to do where there is no such split, for whoever reads the error.
    Raises ConfigError if they cannot be had, if there are none, or if a value is not what its column holds.
    """
    files = _local_files(dataset, split, without)
    sources = [_read_file(file) for file in files] if files else [_read_hub(dataset, split, config, without)]
    rows = [_checked(source.name, *row, columns) for source in sources for row in source.rows]
    if not rows:
        remedy = "put problems into it, or name another dataset"
        raise ConfigError([Problem("task.dataset", "has no rows", sources[0].name, remedy)])
    return rows


def renamed(columns: Sequence[Column], names: Mapping[str, str]) -> list[Column]:
    """The columns under the data's own names, by those of the task: `task.columns` of the YAML."""
    return [replace(column, source=names[column.name]) for column in columns]


def text(value: Any) -> str:
    """A text that is not blank."""
    if value is None:
        raise BadValue("is null", "fill it in or take the row out")
    if not isinstance(value, str):
        raise BadValue(f"is {kind_of(value)}", "write it as text")
    if not any(unicodedata.category(character)[0] not in "ZC" for character in value):  # blanks, zero width
        raise BadValue("is empty", "fill it in or take the row out")
    if len(value) > MAX_TEXT:
        raise BadValue(f"has {len(value):,} characters", f"take the row out, or cut it to {MAX_TEXT:,}")
    if re.search("[\ud800-\udfff]", value):
        raise BadValue("holds half a surrogate pair", "write the character whole")
    return value


def whole_number(value: Any) -> int:
    """A whole number that a dataset can hold."""
    if value is None:
        raise BadValue("is null", "fill it in or take the row out")
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadValue(f"is {kind_of(value)}", "write a whole number")
    if abs(value) >= 2**63:
        raise BadValue("is too large", "write a whole number below 2**63, or take the row out")
    return value


def kind_of(value: Any) -> str:
    """The kind of a value, in words."""
    for kind, name in ((bool, "true or false"), (str, "a text"), (int, "a number"), (float, "a number")):
        if isinstance(value, kind):
            return name
    return {list: "a list", dict: "an object", type(None): "null"}.get(
        type(value), f"a {type(value).__name__}"
    )


def is_one_file(dataset: str) -> bool:
    """Whether the data is one file, which has no splits."""
    return place_of("task.dataset", dataset).is_file()


def is_on_the_hub(dataset: str) -> bool:
    """Whether the data must be fetched: the name is not that of a file or folder, and does not look like one."""
    return not place_of("task.dataset", dataset).exists() and not _looks_local(dataset)


def hold_out(rows: Rows, count: int, seed: str, same: Callable[[dict[str, Any]], Any]) -> tuple[Rows, Rows]:
    """Rows as (train, held out), shuffled by the seed; a row that occurs twice is not in both.

    same: what two rows of one problem have in common. Raises ConfigError if none is left to train on.
    """
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    held_out = shuffled[:count]
    kept_back = {same(row) for row in held_out}
    train = [row for row in shuffled[count:] if same(row) not in kept_back]
    if len(rows) <= count:
        message = f"{count} of {len(rows)} problems leaves none to train on"
        raise ConfigError([Problem("task.held_out", message, remedy="lower it")])
    if not train:
        message = f"every problem is among the {len(held_out)} held out, or the same as one"
        remedy = "give it problems that differ, or lower task.held_out"
        raise ConfigError([Problem("task.dataset", message, remedy=remedy)])
    return train, held_out


def dataset_of(rows: Rows, columns: Mapping[str, list[Any]]) -> Dataset:
    """A task's columns, and beside them the data's own, which rewards may read; None where a row lacks one.

    Left out is a column whose values are not of one kind, which no table holds, and one by a name of TRL's.
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in _TAKEN and name not in columns)
    others = {name: [row.get(name) for row in rows] for name in names}
    return Dataset.from_dict(
        {**columns, **{name: values for name, values in others.items() if _is_a_column(values)}}
    )


def _is_a_column(values: list[Any]) -> bool:
    import pyarrow

    try:
        pyarrow.array(values)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
        return False
    return True


def rounds(rows: Sequence[T], count: int, seed: str) -> list[T]:
    """`count` rows in the seed's order: all of them once before any is repeated. Raises ValueError for no rows."""
    if not rows:
        raise ValueError("rows: none given; there is nothing to draw from")
    rng = random.Random(seed)
    order: list[T] = []
    while len(order) < count:
        order += rng.sample(rows, len(rows))
    return order[:count]


def _checked(source: str, number: int, row: Any, columns: Sequence[Column]) -> dict[str, Any]:
    """The row with its columns as they are read."""
    if not isinstance(row, dict):
        fault = f"is {kind_of(row)}, no object with columns"
        raise _refused("task.dataset", source, number, fault, row, "write an object")
    found = dict(row)
    for column in columns:
        name = column.name if column.source is None else column.source
        if name not in row:
            there = ", ".join(map(str, row)) or "none"
            key, remedy = "task.dataset", "rename one"
            if column.source is not None:
                key, remedy = f"task.columns.{column.name}", "set it to one of them"
            message = f"{source}, row {number}: lacks {name!r}, has {there}"
            raise ConfigError([Problem(key, message, remedy=remedy)])
        try:
            found[column.name] = column.read(row[name])
        except BadValue as error:
            fault = f"column {name!r} {error}"
            raise _refused("task.dataset", source, number, fault, row[name], error.remedy) from error
    return found


def _refused(key: str, source: str, number: int, message: str, value: Any, remedy: str) -> ConfigError:
    return ConfigError([Problem(key, f"{source}, row {number}: {message}", value, remedy)])


def _read_file(file: Path) -> _Source:
    try:
        if file.suffix == ".parquet":
            return _Source(str(file), list(enumerate(_parquet(file), 1)))
        _require_text(file)
        with file.open(encoding="utf-8-sig") as lines:
            listed = _listed(lines.read()) if file.suffix == ".json" else None
            lines.seek(0)
            rows = list(enumerate(listed, 1)) if listed is not None else list(_lines(file, lines))
            return _Source(str(file), rows)
    except UnicodeDecodeError as error:
        raise _refused("task.dataset", str(file), *_not_utf8(file, error)) from error
    except OSError as error:
        remedy = "mend it: text in UTF-8, or parquet"
        raise ConfigError([Problem("task.dataset", f"cannot be read: {error}", str(file), remedy)]) from error


def _require_text(file: Path) -> None:
    with file.open("rb") as opened:
        begins = opened.read(8)
    for mark, kind in _ARCHIVES.items():
        if begins.startswith(mark):
            remedy = "save it as UTF-8" if kind == "UTF-16" else "unpack it, or name it by its kind"
            raise ConfigError([Problem("task.dataset", f"is {kind}, no text in UTF-8", str(file), remedy)])


def _not_utf8(file: Path, error: UnicodeDecodeError) -> tuple[int, str, bytes, str]:
    """The row of the first byte that is not UTF-8, what is wrong, the bytes there and the remedy."""
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError as found:
            around = line[max(0, found.start - 20) : found.start + 20]
            return number, "is no text in UTF-8", around, "save the file as UTF-8"
    return 1, f"is no text in UTF-8 ({error.reason})", error.object[:20], "save the file as UTF-8"


def _parquet(file: Path) -> Rows:
    """The rows of a Parquet file. Raises OSError for any other file."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file).read()
        twice = {name for name in table.column_names if table.column_names.count(name) > 1}
        if twice:
            raise OSError(f"it has several columns {min(twice)!r}")
        return table.to_pylist()
    except UnicodeDecodeError as error:
        raise _not_utf8_in(file, table) from error
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


def _not_utf8_in(file: Path, table: Any) -> ConfigError:
    """The first row of a table that holds a text which is not UTF-8."""
    for number, row in enumerate(table.to_batches(max_chunksize=1), 1):
        for name in row.column_names:
            try:
                row[name].to_pylist()
            except UnicodeDecodeError as error:
                fault = f"column {name!r} is no text in UTF-8"
                return _refused("task.dataset", str(file), number, fault, error.object, "write it as UTF-8")
    raise AssertionError(f"{file}: every row can be read")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a name that occurs twice, of which one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _listed(text: str) -> list[Any] | None:
    """The rows of a file that is one list; None for a file of lines."""
    try:
        whole = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return None
    return whole if isinstance(whole, list) else None


def _lines(file: Path, lines: Any) -> Iterator[tuple[int, Any]]:
    """One object per line; empty lines are counted, but are not rows."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            reason = str(error) or "too deeply nested"
            fault = f"is no JSON ({reason})"
            raise _refused("task.dataset", str(file), number, fault, line.strip(), "correct it") from error


def _read_hub(dataset: str, split: str, config: str | None, without: str) -> _Source:
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)  # a line for each of its attempts says no more than the last error
    try:
        rows = load_dataset(dataset, config, split=split)
    except Exception as error:  # the hub's client raises a dozen kinds, all meaning the same here
        raise ConfigError([_hub_problem(dataset, split, config, error, without)]) from error
    finally:
        client.setLevel(level)
    return _Source(f"{dataset}, split {split}", list(enumerate(rows, 1)))


def _hub_problem(
    dataset: str, split: str, config: str | None, error: Exception, without: str = ""
) -> Problem:
    configs = re.search(r"(?:available configs|Available): \[(.*?)\]", str(error))
    if configs is not None and "onfig" in str(error):
        names = one_of(name.strip().strip("'\"") for name in configs[1].split(","))
        message = "needs a configuration" if config is None else f"has no configuration {config!r}"
        value = ABSENT if config is None else config
        return Problem("task.config", f"{dataset} {message}", value, f"set it to {names}")
    message = "there is no such folder here, and "
    message += f"split {split!r} cannot be loaded from the hub ({type(error).__name__}: {error})"
    remedy = f"check the network and the id, or give a folder with {split}.jsonl"
    return Problem("task.dataset", message, dataset, _or(remedy, without))


def _or(remedy: str, other: str) -> str:
    return f"{remedy}, or {other}" if other else remedy


def _looks_local(dataset: str) -> bool:
    return Path(dataset).suffix in _KINDS or dataset.startswith((".", "/", "~"))


def _local_files(dataset: str, split: str, without: str = "") -> list[Path]:
    """The files of a split on this machine; none if `dataset` is a hub id."""
    place = place_of("task.dataset", dataset)
    if place.is_dir():
        found = [place / f"{split}{suffix}" for suffix in _KINDS if (place / f"{split}{suffix}").is_file()][
            :1
        ]
        found = found or sorted((place / "data").glob(f"{split}-*.parquet"))  # as the hub lays data out
        if not found:
            message = f"holds no {split}.jsonl and no {split}.parquet"
            raise ConfigError([Problem("task.dataset", message, dataset, _or("put one there", without))])
        return found
    if place.is_file():
        if place.suffix not in _KINDS:
            raise ConfigError(
                [Problem("task.dataset", f"is none of {', '.join(_KINDS)}", dataset, "convert it")]
            )
        return [place]
    if place.exists() or place.is_symlink():
        kind = "is a link that leads nowhere" if place.is_symlink() else "is neither a file nor a folder"
        raise ConfigError([Problem("task.dataset", kind, dataset, "name a file or a folder")])
    if _looks_local(dataset):
        remedy = "correct the path, or give an id of the hub such as openai/gsm8k"
        raise ConfigError([Problem("task.dataset", "no such file or folder", dataset, remedy)])
    return []
