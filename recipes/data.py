"""A task's data: the rows of a hub id, a folder or a file, and what is held out of them.

rows = read_rows("openai/gsm8k", "train", "main")      from the hub, or its cache
rows = read_rows("../shared/data/gsm8k", "train")      a folder: train.jsonl, train.parquet or data/train-*.parquet
rows = read_rows("problems.jsonl", "train")            one file, whatever the split is called
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from datasets import load_dataset

from recipes.problems import ConfigError, Problem

Rows = list[dict[str, Any]]
T = TypeVar("T")
_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_rows(dataset: str, split: str, config: str | None = None) -> Rows:
    """The rows of a split. `config`: the dataset's configuration on the hub.

    Raises ConfigError if they cannot be had.
    """
    files = _local_files(dataset, split)
    if files:
        return list(load_dataset(_KINDS[files[0].suffix], data_files=[str(file) for file in files])["train"])
    try:
        return list(load_dataset(dataset, config, split=split))
    except Exception as error:  # the hub's client raises a dozen kinds, all meaning the same here
        message = f"split {split!r} cannot be loaded from the hub ({type(error).__name__}: {error})"
        remedy = f"check the network and the id, or give a folder with {split}.jsonl"
        raise ConfigError([Problem("task.dataset", message, dataset, remedy)]) from error


def is_one_file(dataset: str) -> bool:
    """Whether the data is one file, which has no splits."""
    return Path(dataset).expanduser().is_file()


def hold_out(rows: Rows, count: int, seed: str) -> tuple[Rows, Rows]:
    """Rows as (train, held out), shuffled by the seed. Raises ValueError if none is left to train on."""
    if len(rows) <= count:
        raise ValueError(f"task.held_out: {count} of {len(rows)} problems leaves none to train on; lower it")
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled[count:], shuffled[:count]


def rounds(rows: Sequence[T], count: int, seed: str) -> list[T]:
    """`count` rows in an order by the seed: all of them before any comes again. Raises ValueError for no rows."""
    if not rows:
        raise ValueError("rows: none given; there is nothing to draw from")
    rng = random.Random(seed)
    order: list[T] = []
    while len(order) < count:
        order += rng.sample(rows, len(rows))
    return order[:count]


def _local_files(dataset: str, split: str) -> list[Path]:
    """The files of a split on this machine; none if `dataset` is a hub id."""
    place = Path(dataset).expanduser()
    if place.is_dir():
        found = [place / f"{split}{suffix}" for suffix in _KINDS if (place / f"{split}{suffix}").is_file()][
            :1
        ]
        found = found or sorted((place / "data").glob(f"{split}-*.parquet"))  # as the hub lays data out
        if not found:
            message = f"holds no {split}.jsonl and no {split}.parquet"
            raise ConfigError([Problem("task.dataset", message, dataset, "put one there")])
        return found
    if place.is_file():
        if place.suffix not in _KINDS:
            raise ConfigError(
                [Problem("task.dataset", f"is none of {', '.join(_KINDS)}", dataset, "convert it")]
            )
        return [place]
    if place.suffix in _KINDS or dataset.startswith((".", "/", "~")):
        remedy = "correct the path, or give an id of the hub such as openai/gsm8k"
        raise ConfigError([Problem("task.dataset", "no such file or folder", dataset, remedy)])
    return []
