"""The server benchmark without a GPU: its configurations, its figures, and a server that does not start."""

import json
import os
import time

import pytest

from benchmarks import server_gpu
from benchmarks.server_gpu import CONFIG, UPDATES, WAYS, figures, overrides, parse, table
from recipes.config.load import load_config


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_a_configuration_of_the_same_rollouts(way, tmp_path):
    processes = 2 if way == "colocated" else 1
    given = parse(["--model", "somewhere", "--output", str(tmp_path), "--rollouts", "3", "--port", "8123"])
    config = load_config(CONFIG, overrides(way, given), processes=processes)
    grpo = config.grpo
    rows = processes * grpo["per_device_train_batch_size"]
    assert rows * grpo["steps_per_generation"] == 128 * 8
    assert grpo["steps_per_generation"] // grpo["gradient_accumulation_steps"] == UPDATES
    assert grpo["max_steps"] == 3 * UPDATES
    assert config.step.ahead == (way == "ahead")
    assert grpo["vllm_server_base_url"] == (None if way == "colocated" else "http://127.0.0.1:8123")
    assert grpo["vllm_mode"] == ("colocate" if way == "colocated" else "server")


def test_figures_begin_with_the_end_of_the_first_rollout():
    trl = {"sampling/sampling_logp_difference/mean": 0.01, "sampling/importance_sampling_ratio/mean": 1.0}
    times = {
        True: {"generation": 2.0, "forward": 0.5},
        False: {"forward": 0.5},
    }  # of a rollout's first update
    records = [{"step": 0, "accuracy": 0.25}] + [
        {"step": n, "at": 100.0 + n + 50.0 * (n >= UPDATES), "trl": trl, "time": times[n % UPDATES == 1]}
        for n in range(1, 3 * UPDATES + 1)
    ]
    for record in records[1::UPDATES]:  # a reward is logged where a rollout begins
        record["reward"] = record["step"] / 100
    found = figures(records)
    assert found["rollouts_a_minute"] == pytest.approx(60 * 2 / (174 - 158))
    assert found["seconds"] == pytest.approx({"generation": 2.0, "forward": 4.0})
    assert found["rollouts"] == 3
    assert found["reward"] == [0.01, 0.09, 0.17]
    shown = table([{"way": "ahead", **found}, {"way": "server", "error": "exit status 1"}]).markdown()
    assert "| ahead | 7.50 | 2.00 | 6.00 | 0.0100 | 0.250 |" in shown
    assert "| server | exit status 1 |" in shown


def test_a_server_that_does_not_start_is_a_line_and_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.devnull)  # no vLLM there
    began = time.time()
    assert server_gpu.main(["--model", "nowhere", "--output", str(tmp_path), "--ways", "server"]) == 1
    assert time.time() - began < 30
    (row,) = json.loads((tmp_path / "server.json").read_text())
    assert row["error"] == "the server does not answer; server-server.log says why"
