"""A plan of the packed step beside every step of a 16-bit Llama that an H200 measured in bins as planned.

benchmarks/results/packed_h200.json. A plan is of a full bin; a window is cut between groups, as evenly as it goes.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.packed_gpu import run_config
from benchmarks.rollouts import SIZE, rollout, shape_for
from recipes.plan.plan import MIB, in_bins, measure
from recipes.plan.setting import Setting
from recipes.training.packing import pack
from recipes.training.rollout import Rollout, padded

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "packed_h200.json"


def rows():
    """MiB by what was run, once each: model, shape, way, tokens of a bin."""
    found = {}
    for name, of_commit in json.loads(RESULTS.read_text()).items():
        for row in of_commit if name.startswith("rows") else ():
            given = tuple(row.get(name) for name in ("model", "shape", "way", "budget"))
            in_16_bits = str(given[0]).startswith("llama") and not {"bits", "weights"} & row.keys()
            planned = isinstance(given[3], int) and given[3] > 9000 and row["zeros"] == 0
            if in_16_bits and planned:
                found[given] = row["peak_mib"]
    return found


ROWS = rows()


def test_there_are_rows_of_both_models_at_every_shape():
    assert {given[:2] for given in ROWS} == {
        (model, shape)
        for model in ("llama-1b", "llama-8b")
        for shape in ("gsm8k", "256+256", "3072+256", "512+2048")
    }


@functools.cache
def largest_bin(model, name, budget):
    """Tokens of it, where all groups are as long, so that their order, which is not known, does not matter."""
    shape = shape_for(model, name)
    cut = Rollout.shuffled(rollout(shape, 1000, 0.0, "cpu"), shape.groups, True, budget)
    bins = (range(bin_.start * SIZE, bin_.stop * SIZE) for bin_ in cut.cut(range(shape.groups)))
    return max(pack(padded(cut.tensors), cut.lengths, rows, one_row=True).tokens for rows in bins)


@pytest.mark.parametrize(("model", "name", "way", "budget"), ROWS, ids=str)
def test_the_planned_peak_is_that_of_a_full_bin(model, name, way, budget):
    shape, measured = shape_for(model, name), ROWS[model, name, way, budget]
    config = run_config(model, shape, f"model.compile_layers={str(way == 'compiled').lower()}")
    setting = in_bins(config, Setting.of(config, device=True), budget)

    def planned(tokens):
        return measure(replace(setting, bin_tokens=tokens)).phases["forward, loss and backward"] / MIB

    if shape.spread == 0:
        assert planned(largest_bin(model, name, budget)) == pytest.approx(measured, rel=0.05)
    assert 0.995 * measured < planned(budget) < 1.18 * measured
