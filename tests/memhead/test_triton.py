"""The Triton kernels, in Triton's interpreter, against their torch twins and against float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.timeout(300)
def test_kernels_in_the_interpreter() -> None:
    """The interpreter is chosen when Triton is imported, so the cases run in a separate process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    result = subprocess.run(
        command, env={**_environment(), "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)
