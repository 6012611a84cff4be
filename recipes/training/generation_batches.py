"""The rows of a generation, read once.

TRL's data loader hands every micro-batch the rows of its whole generation, of which only the first is used: with 32
micro-batches a generation of 1,024 rows is read, pinned and looked through for tensors 32 times, 2 s on an H100's host.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset


@dataclass(frozen=True)
class Rows:
    """The rows as one object, in which nobody between loader and trainer looks for tensors."""

    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        """For a script that looks into the loader, as are the next two."""
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One row after another."""
        return iter(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """A row, or a slice of them."""
        return self.rows[index]

    def __contains__(self, key: str) -> bool:
        """transformers asks a batch for "labels"."""
        return False


def taken(batch: Any) -> Any:
    """The rows of a batch, to do with what one likes: the loader may hand out the same ones again."""
    return deepcopy(batch.rows) if isinstance(batch, Rows) else batch


class ReadOnce(Dataset[Any]):
    """A dataset that keeps the rows that it was asked for last."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._asked: list[int] = []
        self._rows: list[dict[str, Any]] = []

    def __len__(self) -> int:
        """Rows of the dataset."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row."""
        return dict(self._dataset[index])

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """What torch's loader calls for a batch."""
        if indices != self._asked:
            self._asked, self._rows = list(indices), self._dataset.__getitems__(indices)
        return self._rows
