"""benchmarks.packed_unsloth without Unsloth: what it records of its model's rows, and how it shows that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import packed_unsloth

RESULTS = Path(packed_unsloth.__file__).with_name("results")
ROW = {"model": "m", "shape": "s", "zeros": 0.25, "seconds": 1.0, "scoring": 0.5, "peak_mib": 2048.0}


class Model(torch.nn.Module):
    def forward(self, ids, prefix_seg_info=None, packed_seq_lengths=None):
        return ids


@pytest.mark.parametrize("gradient", [True, False])
def test_forwards_are_counted_by_what_is_in_their_rows(gradient):
    model, ids = Model(), torch.zeros(1, 2)
    with packed_unsloth.forwards(model, gradient=gradient) as counts:
        model(ids, prefix_seg_info="layout")
        model(ids, packed_seq_lengths=torch.tensor([2]), prefix_seg_info=None)
        model(ids)
        with torch.no_grad():  # Unsloth's check of one kind against the other
            model(ids, prefix_seg_info="layout")
    model(ids)
    assert counts == {"shared": 1 if gradient else 2, "packed": 1, "padded": 1}


def test_the_table_shows_what_was_given():
    both = ROW | {"forwards": {"shared": 3}, "scoring_forwards": {"shared": 3, "packed": 1}}
    ours = {"step": "packed", "budget": 9166, "model": "m", "shape": "s", "error": "out of memory"}
    shown = packed_unsloth.table([both, ours]).splitlines()
    assert shown[2] == (
        "| m | s | own | 25% | 1.000 | each prompt once | 0.500 |"
        " packed, prompts repeated: 1; each prompt once: 3 | 2.0 |"
    )
    assert shown[3].startswith("| m | s | packed, bins of 9166 | – | out of memory |")


def test_rows_from_before_that_are_shown_as_not_recorded():
    stored = json.loads((RESULTS / "packed_h200.json").read_text(encoding="utf-8"))
    rows = [row for name, part in stored.items() if name.startswith("unsloths_step_") for row in part]
    old = [row for row in rows if "error" not in row and "forwards" not in row]
    assert len(old) >= 20
    for row, line in zip(old, packed_unsloth.table(old).splitlines()[2:], strict=True):
        assert f"| {row['seconds']:.3f} | not recorded | {row['scoring']:.3f} | not recorded |" in line
