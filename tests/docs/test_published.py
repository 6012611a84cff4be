"""The address stands in one place and is carried to all others; which torch is installed is decided and said."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from published import ROOT

import memhead

spec = importlib.util.spec_from_file_location("address", ROOT / ".ci" / "address.py")
address = importlib.util.module_from_spec(spec)
spec.loader.exec_module(address)
NAMED = re.compile(r"github(?:\.com)?/([\w.-]+/memhead)\b")


@pytest.fixture
def copy(tmp_path):
    """What names the address, in a folder of its own."""
    for file in address.published(ROOT):
        place = tmp_path / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return tmp_path


def test_every_place_has_the_address_of_the_metadata():
    found = {
        file.name: set(NAMED.findall(file.read_text(encoding="utf-8"))) for file in address.published(ROOT)
    }
    for name in (
        "pyproject.toml",
        "CITATION.cff",
        "README.md",
        "grpo_llama3_1_8b.py",
        "grpo_llama3_1_8b.ipynb",
    ):
        assert found[name], f"{name} names no address"
    assert set().union(*found.values()) == {address.slug(ROOT)}


def test_no_placeholder_is_left_in_what_is_published(copy):
    address.write(copy, "https://github.com/some-one/memhead.git")
    for file in address.published(copy):
        text = file.read_text(encoding="utf-8")
        assert address.slug(ROOT) not in text, file
        assert "OWNER" not in text or file.name == "release.md", file
    assert address.slug(copy) == "some-one/memhead"


@pytest.mark.parametrize("wrong", ["", "github.com/a/b", "https://github.com/a", "https://github.com/a/b/c"])
def test_no_address_is_refused(copy, wrong):
    with pytest.raises(ValueError, match="is no address such as"):
        address.write(copy, wrong)


def test_nothing_else_names_an_address():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True)
    known = {file.relative_to(ROOT) for file in address.published(ROOT)}
    for name in listed.stdout.splitlines():
        file = ROOT / name
        if (
            Path(name) in known
            or Path(name).parts[0] in (".ci", "tests", "Makefile")
            or file.suffix in (".png", ".json")
        ):
            continue
        assert not NAMED.search(file.read_text(encoding="utf-8", errors="ignore")), name


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == memhead.__version__
    assert f"## {memhead.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def torch_index(tmp_path, gpu="", **environment):
    """What .ci/torch_index decides and says, on a machine with such an nvidia-smi."""
    if gpu:
        fake = tmp_path / "nvidia-smi"
        fake.write_text(f"#!/bin/sh\necho '{gpu}'\n")
        fake.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"
    done = subprocess.run(
        [ROOT / ".ci" / "torch_index"],
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    (said,) = done.stderr.splitlines()
    return done.stdout, said


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the usual index has one torch")
def test_the_torch_that_fits_the_machine_is_chosen_in_one_line(tmp_path):
    if shutil.which("nvidia-smi", path="/usr/bin:/bin") is None:
        index, said = torch_index(tmp_path)
        assert index == "https://download.pytorch.org/whl/cpu"
        assert said.startswith("no NVIDIA GPU found: torch for the CPU")
    index, said = torch_index(tmp_path, gpu="NVIDIA L4, 580.65.06")
    assert index == ""
    assert said.startswith("NVIDIA L4 found: torch with CUDA")
    index, said = torch_index(tmp_path, gpu="NVIDIA L4, 535.104.05")
    assert index == "https://download.pytorch.org/whl/cu126"
    assert "too old for CUDA 13 (535.104.05" in said
    failed = "NVIDIA-SMI has failed because it could not communicate with the driver"
    assert torch_index(tmp_path, gpu=failed)[0] in ("https://download.pytorch.org/whl/cpu", "")
    assert torch_index(tmp_path, TORCH_INDEX="https://x/y")[0] == "https://x/y"
    assert torch_index(tmp_path, TORCH_INDEX="")[0] == ""


def test_what_only_linux_has_is_marked_in_the_lock():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert re.search(r'^triton==\S+; sys_platform == "linux"', lock, re.MULTILINE)
