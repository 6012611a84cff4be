"""The real Unsloth package, on the backend that it has without a GPU, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from memhead.integrations import unsloth as memhead_unsloth

HERE = Path(__file__).parent


@pytest.mark.timeout(300)
@pytest.mark.skipif(
    find_spec("unsloth") is None, reason="pip install --no-deps -r requirements-unsloth.lock (make test does)"
)
def test_unsloth(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(HERE.parents[1]),
    ]
    # Unsloth writes its compiled cache into the working folder.
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    result = subprocess.run(
        [*command, "--noconftest", "-c", str(HERE.parents[1] / "pyproject.toml"), str(HERE / "unsloth_cases.py")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def test_before_unsloth_is_imported():
    assert "unsloth" not in sys.modules
    with pytest.raises(RuntimeError, match="import unsloth before"):
        memhead_unsloth.install()
