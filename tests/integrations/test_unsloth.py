"""The real Unsloth package without a GPU: its CPU backend, and its GPU trainer as far as that runs there.

Each file of cases runs in a separate process, because importing Unsloth changes TRL permanently.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from memhead.integrations import unsloth as memhead_unsloth

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.timeout(300)
@pytest.mark.skipif(
    find_spec("unsloth") is None, reason="pip install --no-deps -r requirements-unsloth.lock (make test does)"
)
@pytest.mark.parametrize(
    ("cases", "variables"),
    [
        (("unsloth_cases.py", "unsloth_run_cases.py"), {}),
        (
            ("unsloth_generated_cases.py", "unsloth_script_cases.py", "unsloth_layers_cases.py"),
            {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_COMPILE_DISABLE": "1", "TRITON_INTERPRET": "1"},
        ),
    ],
    ids=["cpu-backend", "generated-trainer"],
)
def test_unsloth(cases, variables, tmp_path):
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "--rootdir",
        ROOT,
        "-c",
        ROOT / "pyproject.toml",
    ]
    # Unsloth writes its compiled cache into the working folder.
    paths = os.pathsep.join(
        [str(ROOT), str(HERE), str(HERE.parent / "recipes"), os.environ.get("PYTHONPATH", "")]
    )
    quiet = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, options), *(str(HERE / name) for name in cases)],
        env=os.environ | {"PYTHONPATH": paths} | quiet | variables,
        cwd=tmp_path, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("entropy_coef", 0.01),
        ("entropy_coef", -0.01),
        ("top_entropy_quantile", 0.2),
        ("use_adaptive_entropy", True),
    ],
)
def test_what_the_generated_trainer_computes_without_memhead_is_refused(monkeypatch, option, value):
    usual = {"entropy_coef": 0.0, "top_entropy_quantile": 1.0, "use_adaptive_entropy": False}
    for generated in (True, False):
        monkeypatch.setattr(memhead_unsloth, "generates_trainers", lambda generated=generated: generated)
        memhead_unsloth.refuse_bypasses(SimpleNamespace(**usual))
        with (
            pytest.raises(ValueError, match=rf"grpo\.{option}={value} .*set it to {usual[option]}")
            if generated
            else nullcontext()
        ):
            memhead_unsloth.refuse_bypasses(SimpleNamespace(**usual | {option: value}))


def test_before_unsloth_is_imported():
    assert "unsloth" not in sys.modules
    with pytest.raises(RuntimeError, match="import unsloth before"):
        memhead_unsloth.install()
