"""The benchmarks at toy sizes: that they run, compare like with like and say what is missing."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import head, launches, multi_gpu, seed_results, step_gpu
from benchmarks.contestants import (
    PASSES,
    full_contestant,
    liger_contestant,
    memhead_contestant,
    torch_contestant,
    trl_contestant,
    unsloth_contestant,
)
from benchmarks.measure import peak_bytes
from benchmarks.step_tables import PHASES

CPU = torch.device("cpu")


def contestants():
    return [memhead_contestant(), full_contestant(), torch_contestant()]


@pytest.mark.parametrize("which", PASSES)
def test_contestants_compute_the_same(which):
    tensors = head.make_head(50, 16, 101, torch.float32, CPU)
    results = [function() for c in contestants() if (function := c.run(which, tensors)) is not None]
    assert len(results) >= 2
    for result in results[1:]:
        expected = results[0] if isinstance(results[0], tuple) else (results[0],)
        for a, b in zip(result if isinstance(result, tuple) else (result,), expected, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_peak_bytes_sees_what_lives_at_a_time():
    def function():
        first = torch.zeros(1000)
        del first
        second, third = torch.zeros(2000), torch.zeros(500)
        return second.sum() + third.sum()

    assert 10_000 <= peak_bytes(function, CPU) <= 10_500


def test_head(tmp_path, capsys):
    command = ["--device", "cpu", "--shape", "16x101", "--rows", "20", "--rounds", "1", "--dtype", "float32"]
    command += ["--output", str(tmp_path / "head")]
    for peer in ("trl", "unsloth", "liger"):  # importing unsloth would change TRL for the tests that follow
        command += [f"--{peer}", str(tmp_path / "nowhere")]
    head.main([*command, "--pass", "frozen"])
    results = head.main([*command, "--pass", "trainable", "--pass", "frozen"])
    assert [row["pass"] for row in results["rows"]] == ["frozen", "trainable"]
    row = results["rows"][0]
    assert {"memhead", "full logits"} <= row["contestants"].keys()
    assert "not a folder" in row["absent"]["TRL"]
    assert str(tmp_path) not in row["command"]
    stored = json.loads((tmp_path / "head.json").read_text())
    assert len(stored["rows"]) == 2
    table = (tmp_path / "head.md").read_text()
    assert "| frozen | 2 = " in table
    assert "Absent: TRL" in table


@pytest.mark.parametrize("make", [trl_contestant, unsloth_contestant, liger_contestant])
def test_what_cannot_run_is_named(make, tmp_path):
    absent = make(str(tmp_path / "nowhere"))
    assert "is not a folder" in absent.absent
    assert absent.run("frozen", head.make_head(2, 4, 8, torch.float32, CPU)) is None


def test_seed_results(tmp_path):
    lines = seed_results.main(["--device", "cpu", "--size", "tiny", "--output", str(tmp_path / "seed")])
    exact = [line for line in lines if not line.what.startswith(("time", "memory"))]
    for line in exact:
        if line.what.startswith(
            "input gradient"
        ):  # the target was met on one processor; others round otherwise
            assert float(line.ours) <= 2**-26
        else:
            assert line.met in (True, None), line
    assert (tmp_path / "seed.md").read_text().count("\n|") == len(lines) + 2


def test_launches():
    lines = launches.main(["--toy"])
    assert len(lines) == 2 + len(launches.PASSES)
    ours = lines[0].split(" | ").index("memhead")
    assert all(" (" in line.split(" | ")[ours] for line in lines[2:])


@pytest.mark.timeout(120)
def test_step_gpu(tmp_path):
    """The trainer's own functions, in a separate process; TRL's Triton head by the interpreter."""
    path = step_gpu.main(["--toy", "--stacks", "trl", "--output", str(tmp_path)])
    results = json.loads(path.read_text())
    assert not results["failed"]
    assert [(row["length"], row["head"]) for row in results["rows"]] == [
        (length, head) for length in (8, 16) for head in ("memhead", "trl", "full")
    ]
    assert all(row["seconds"].keys() == {*PHASES, "step"} for row in results["rows"])
    for ours, trls, full in (results["rows"][:3], results["rows"][3:]):
        assert ours["loss"] == pytest.approx(full["loss"], abs=1e-6)
        assert trls["loss"] == pytest.approx(full["loss"], abs=1e-6)
    assert "| 2 × 8 | **memhead** |" in path.with_suffix(".md").read_text()


def test_two_processes_are_started_for_the_head_alone(tmp_path):
    """The steps of one and of two processes are compared by tests/recipes/training/test_processes.py."""
    path = multi_gpu.main(["--toy", "--output", str(tmp_path), "--stages", "head"])
    results = json.loads(path.read_text())
    assert results["failed"] == {}
    assert len(results["rows"]) == 6
    assert all(row["ms"] > 0 for row in results["rows"])
    assert path.with_suffix(".md").read_text().count("\n| ") == 1 + len(results["rows"])
