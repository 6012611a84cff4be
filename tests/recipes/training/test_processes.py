"""Several real processes over gloo: the same numbers as one, in one run."""

import os
import subprocess
import sys
from pathlib import Path

import on_ranks
import pytest
import torch

ROOT = Path(__file__).parents[3]


def torchrun(world, *command, **options):
    """Starts `command` on so many processes of this machine, on a port that is free."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    here = [str(ROOT), str(ROOT / "tests" / "recipes"), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(here)}
    return subprocess.Popen(
        [*launcher, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def run_cases(world, folder, names):
    """What each process found by case, and what one process finds on the whole batch."""
    process = torchrun(world, on_ranks.__file__, folder, *names)
    cases = {name: on_ranks.CASES[name] for name in names if name in on_ranks.CASES}
    alone = {name: on_ranks.ALONE[name] for name in dict.fromkeys(case.alone for case in cases.values())}
    expected = on_ranks.results(on_ranks.global_rollout(world), folder / "alone", alone)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(world)], expected


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    names = [*on_ranks.CASES, *on_ranks.WITH_ENTROPY]
    return run_cases(2, tmp_path_factory.mktemp("two"), names)


@pytest.mark.parametrize("case", on_ranks.CASES)
def test_two_processes_end_equal_and_as_one(ranks, case):
    compare(*ranks, case)


def test_so_do_three(tmp_path):
    names = ["trl", "packed", "packed, split head"]
    found = run_cases(3, tmp_path, names)
    for name in names:
        compare(*found, name)


def compare(together, alone, case):
    first, expected = together[0][case], alone[on_ranks.CASES[case].alone]
    for name, value in first["weights"].items():
        for other in together[1:]:
            assert torch.equal(other[case]["weights"][name], value), name
        torch.testing.assert_close(value, expected["weights"][name], rtol=0, atol=1e-9)
    for log, one in zip(first["logs"], expected["logs"], strict=True):
        for name in ("loss", "grad_norm"):
            assert log[name] == pytest.approx(one[name], rel=1e-6, abs=1e-7), name
        assert log.get("step/tokens_real") == one.get("step/tokens_real")


def test_steps_change_the_weights(ranks):
    """So that the test above compares something."""
    start = on_ranks.model_of("llama").state_dict()
    assert all(
        (value - start[name]).abs().max() > 1e-4 for name, value in ranks[0][0]["trl"]["weights"].items()
    )


def test_a_split_head_has_the_entropy_bonus_of_a_whole_one(ranks):
    split, whole = (ranks[0][1][f"entropy, {which} head"] for which in ("split", "whole"))
    for name, value in split["weights"].items():
        torch.testing.assert_close(value, whole["weights"][name], rtol=0, atol=1e-9)
    assert [log["entropy"] for log in split["logs"]] == pytest.approx(
        [log["entropy"] for log in whole["logs"]]
    )
    assert split["logs"][-1]["loss"] != pytest.approx(ranks[0][1]["packed"]["logs"][-1]["loss"], abs=1e-3)


@pytest.mark.parametrize("case", ["trl, sharded", "packed, sharded", "lora, sharded"])
def test_fsdp_gathers_the_weight_of_the_head_once_a_pass(ranks, case):
    """With the last norm, for a head's call and, at most, its backward; never a part of it."""
    found = ranks[0][0][case]
    (vocabulary, hidden), world = on_ranks.model_of("llama").lm_head.weight.shape, len(ranks[0])
    embedding = whole_shards(vocabulary, world) * hidden
    tail = embedding + whole_shards(hidden, world)  # accelerate shards norm and head together
    assert 0 < found["gathers"].count(tail) <= 2 * found["calls"]
    (layer,) = set(found["gathers"]) - {embedding, tail}
    assert found["gathers"].count(layer) <= 2 * 2 * found["calls"]  # there are two


def whole_shards(size, world):
    return -(-size // world) * world
