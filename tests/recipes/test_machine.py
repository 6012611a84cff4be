"""What is asked of a machine before anything is installed: cards, drivers, what a lock lacks."""

import subprocess
import sys
from pathlib import Path

import pytest

from recipes import processes
from recipes.machine import Card, cards, missing, too_old, why_no_gpu

SMI = """#!/bin/sh
echo "NVIDIA L4, 535.104.05, 23034"
echo "NVIDIA A100-SXM4-40GB, 580.65.06, 40960"
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """An nvidia-smi that answers; the real one needs a card."""

    def place(script):
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return place


def test_cards_are_read_and_a_failing_tool_is_none(smi):
    smi(SMI)
    assert cards() == [
        Card("NVIDIA L4", "535.104.05", 23034 / 1024),
        Card("NVIDIA A100-SXM4-40GB", "580.65.06", 40.0),
    ]
    assert str(cards()[1]) == "NVIDIA A100-SXM4-40GB, 40.0 GiB, driver 580.65.06"
    unified = 'echo "NVIDIA GB10, 580.95.05, [N/A]"\n'  # has no memory of its own
    smi(f"#!/bin/sh\necho No devices were found\n{unified}")
    assert cards() == []
    smi("#!/bin/sh\necho NVIDIA-SMI has failed, because it could not communicate\nexit 9\n")
    assert cards() == []


def test_no_gpu_is_told_from_one_out_of_reach(smi):
    smi("#!/bin/sh\nexit 9\n")
    assert why_no_gpu("13.0") == "there is none"
    smi(SMI)
    assert why_no_gpu(None) == "this torch is for the CPU, beside NVIDIA L4, 22.5 GiB, driver 535.104.05"
    assert why_no_gpu("13.0") == "the driver 535.104.05 is too old for CUDA 13.0, which needs 580 or newer"
    assert why_no_gpu("12.8").startswith("torch does not reach the NVIDIA L4")


@pytest.mark.parametrize(
    ("driver", "cuda", "fault"),
    [
        ("580.65", "13.0", False),
        ("579.1", "13.0", True),
        ("525.60", "12.8", False),
        ("524.9", "12.8", True),
        ("450.80", "11.8", False),
        ("449.9", "11.8", True),
        ("?", "13.0", False),
    ],
)
def test_the_least_driver(driver, cuda, fault):
    assert bool(too_old(driver, cuda)) == fault


def test_what_a_lock_lacks(tmp_path):
    lock = tmp_path / "some.lock"
    lock.write_text(
        f"# a comment==1\npytest=={pytest.__version__}\nno-such-package==1.0\npluggy==0.0.1; python_version > '3'\n"
    )
    assert missing(lock) == ["no-such-package==1.0", "pluggy==0.0.1"]


def test_the_build_that_stands_behind_the_plus_is_no_other_version(tmp_path, monkeypatch):
    place = tmp_path / "made_up_wheel-2.9.0+cu130.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up-wheel\nVersion: 2.9.0+cu130\n")
    monkeypatch.syspath_prepend(tmp_path)
    lock = tmp_path / "some.lock"
    lock.write_text("made-up-wheel==2.9.0\n")
    assert missing(lock) == []
    lock.write_text("made-up-wheel==2.9.1\n")
    assert missing(lock) == ["made-up-wheel==2.9.1"]


def test_it_needs_nothing_installed():
    root = Path(__file__).parents[2]
    code = "import sys; sys.path.insert(0, '.'); import recipes.machine as m; m.cards(); print(m.room())"
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert "GiB of disk free" in ran.stdout


@pytest.mark.parametrize(
    ("rank", "local", "first"), [("0", "0", True), ("8", "0", True), ("9", "1", False), ("0", "-1", True)]
)
def test_of_each_machine_the_first_process_speaks_before_they_know_each_other(
    monkeypatch, rank, local, first
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert processes.is_first_here() is first


@pytest.mark.parametrize(
    ("items", "shares"), [("abcd", ["ad", "bd", "cd"]), ("abcdef", ["ad", "be", "cf"]), ("a", ["a"] * 3)]
)
def test_where_processes_do_not_divide_the_items_the_last_comes_more_than_once(monkeypatch, items, shares):
    monkeypatch.setattr(processes, "count", lambda: 3)
    for place, share in enumerate(shares):
        monkeypatch.setattr(processes, "rank", lambda place=place: place)
        assert "".join(processes.mine(items)) == share


@pytest.mark.parametrize(
    ("variable", "value", "found"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "True", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "false", ""),
        ("ACCELERATE_USE_MEGATRON_LM", "true", ""),
    ],
)
def test_what_keeps_the_model_in_parts(monkeypatch, variable, value, found):
    assert processes.spread() == ""
    monkeypatch.setenv(variable, value)
    assert processes.spread() == found
