"""The 2 × 2 of the mismatch script without a GPU: its configurations and its figures."""

import pytest

from benchmarks.mismatch_gpu import CONFIG, ENGINES, HEADS, cell, overrides, table
from recipes.config.load import load_config


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_cell_is_a_configuration(head, engine, tmp_path):
    config = load_config(CONFIG, overrides("somewhere", head, engine, 3, tmp_path))
    assert config.head.impl == head
    assert config.grpo["max_steps"] == 24
    assert (config.model.vllm_engine is None) == (engine == "as it comes")


def test_figures_of_the_steps_that_were_taken_apart():
    shares = [0.0, 0.0, 0.02, 0.0, 0.03, 0.9, 0.04, 0.0, 0.01, 0.0, 0.0]
    mismatch = {"tokens": 10.0, "mean": 0.004, "head": 0.003, "rest": 0.002, "head_share": 0.6}
    records = [
        {"step": 1, "mismatch": mismatch, "ratios": {"sampler": shares}},
        {"step": 2, "ratios": {"policy": shares}},
        {"step": 9, "mismatch": mismatch | {"mean": 0.006}, "ratios": {"sampler": shares}},
    ]
    found = cell(records)
    assert found["mean"] == pytest.approx(0.005)
    assert found["outside_1"] == pytest.approx(0.1)
    assert found["outside_10"] == pytest.approx(0.03)
    shown = table([{"head": "trl", "engine": "as it comes", "figures": found}]).markdown()
    assert "| trl | as it comes | 0.00500 | 0.00300 | 0.00200 | 60.00 % | 10.00 % | 3.00 % |" in shown
    with pytest.raises(ValueError, match="no step's mismatch"):
        cell(records[1:2])
