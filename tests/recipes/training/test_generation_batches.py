"""A generation's rows are read once, and are those that TRL's own loader hands out."""

from typing import Any

import pytest
from datasets import Dataset
from tiny import tiny_trainer

from recipes.training.generation_batches import Rows
from recipes.training.packed_step import packed


class Counted:
    """Reads of a dataset, counted."""

    def __init__(self, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = 0
        read = Dataset.__getitems__

        def counting(this: Dataset, indices: Any) -> Any:
            self.reads += 1
            return read(this, indices)

        monkeypatch.setattr(Dataset, "__getitems__", counting)


def test_the_rows_are_trls_and_read_once_a_generation(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, gradient_accumulation_steps=2, steps_per_generation=4)
    expected = [list(rows) for rows in trainer.get_train_dataloader()]
    trainer.__class__ = packed(type(trainer))
    counted = Counted(trainer.train_dataset, monkeypatch)
    found = list(trainer.get_train_dataloader())
    assert all(isinstance(rows, Rows) for rows in found)
    assert [rows.rows for rows in found] == expected
    assert list(found[0]) == [found[0][i] for i in range(len(found[0]))] == expected[0]
    generations = 64 * 4 // 32  # prompts × completions, 4 micro-batches of 8
    assert len(expected) == 4 * generations
    assert counted.reads == generations
    assert "labels" not in found[0]
    assert isinstance(trainer.train_dataset, Dataset)
