"""Cases for test_unsloth.py: whole runs of train_grpo.py with the loader unsloth, on Unsloth's CPU backend."""

from __future__ import annotations

import os

os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"

import unsloth  # noqa: F401  # isort: skip  # before trl
import json

import pytest
import torch
from safetensors.torch import load_file
from unsloth_files import write_files

import train_grpo


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same ten steps with Unsloth's own head and with memhead: name -> run folder."""
    torch.set_num_threads(1)  # two cost more than they gain on models of this size
    folder = tmp_path_factory.mktemp("unsloth")
    config = write_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where the user's reward is looked for
        for impl in ("trl", "memhead"):
            assert train_grpo.main(["--config", str(config), f"head.impl={impl}", f"run.name={impl}"]) == 0
    return {impl: folder / "runs" / impl for impl in ("trl", "memhead")}


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_run_equals_that_of_unsloths_own_head(runs):
    own, ours = lines(runs["trl"]), lines(runs["memhead"])
    assert [line["step"] for line in ours] == list(range(11))
    for a, b in zip(own, ours, strict=True):
        assert a.get("reward") == b.get("reward")
        assert a.get("loss", 0.0) == pytest.approx(b.get("loss", 0.0), abs=1e-6)
    adapters = load_file(runs["trl"] / "final" / "adapter_model.safetensors")
    others = load_file(runs["memhead"] / "final" / "adapter_model.safetensors")
    assert len(adapters) == 6
    for name, value in adapters.items():
        torch.testing.assert_close(others[name], value, rtol=0.0, atol=1e-6)
    assert max(value.abs().max() for name, value in adapters.items() if "lora_B" in name) > 1e-3


def test_every_step_went_through_the_head(runs):
    calls = [json.loads((run / "head.json").read_text())["calls"] for run in runs.values()]
    assert calls == [20, 20]  # five generations, scored by the old policy and the reference; ten losses


def test_the_meters_hold(runs):
    first, second = lines(runs["memhead"])[1:3]  # two steps on one generation
    always = {"forward", "backward", "optimizer", "other"}
    assert set(first["time"]) == {"generation", "rewards", "scoring", *always}
    assert set(second["time"]) == always
    for phase in ("generation", "scoring", "forward", "backward"):
        assert first["memory"][phase]["tensor_peak_mib"] > 0
    assert all("accuracy" in lines(runs["memhead"])[step] for step in (0, 5, 10))
    assert (runs["memhead"] / "report.png").stat().st_size > 0
    assert json.loads((runs["memhead"] / "head_check.json").read_text())["passed"]


def test_a_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    config = str(write_files(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert train_grpo.main(["--config", config, "grpo.max_steps=4", "run.save_every=2"]) == 0
    whole = load_file(tmp_path / "runs" / "run" / "final" / "adapter_model.safetensors")
    begun = ["--config", config, "grpo.max_steps=2", "run.save_every=2", "run.name=parts"]
    assert train_grpo.main(begun) == 0
    assert train_grpo.main([*begun[:2], "grpo.max_steps=4", *begun[3:], "--resume"]) == 0
    resumed = load_file(tmp_path / "runs" / "parts" / "final" / "adapter_model.safetensors")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0.0, atol=1e-6)


def test_a_final_folder_is_evaluated_alone(runs, capsys):
    config = runs["memhead"].parents[1] / "run.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(config.parent)
        assert train_grpo.main(["--config", str(config), "--evaluate", str(runs["memhead"] / "final")]) == 0
    assert '"accuracy"' in capsys.readouterr().out


def test_the_packed_step_by_name(runs, monkeypatch):
    """On this backend the model is transformers' and the trainer TRL's: the packed step is the one of every loader."""
    folder = runs["memhead"].parents[1]
    monkeypatch.chdir(folder)
    words = ["--config", str(folder / "run.yaml"), "step.impl=packed", "run.name=packed"]
    assert train_grpo.main(words) == 0
    packed = folder / "runs" / "packed"
    assert json.loads((packed / "environment.json").read_text())["step"]["impl"] == "packed"
    for a, b in zip(lines(runs["memhead"]), lines(packed), strict=True):
        assert a.get("reward") == b.get("reward")
        assert a.get("loss", 0.0) == pytest.approx(b.get("loss", 0.0), abs=1e-5)
    assert all(line["tokens"] for line in lines(packed)[1:])
