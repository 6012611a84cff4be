"""DeepSpeed's ZeRO-3, on a CPU: not among what this repository installs, so the test runs where deepspeed is there."""

import json
import os
from importlib.util import find_spec

import pytest
import zero3_on_ranks
from launched import torchrun


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_gradients_are_those_of_the_model_in_one_piece(tmp_path):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    process = torchrun(2, zero3_on_ranks.__file__, tmp_path)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    for rank in (0, 1):
        errors = json.loads((tmp_path / f"errors-{rank}.json").read_text())
        assert len(errors) == len(zero3_on_ranks.CASES)
        assert max(errors.values()) < 1e-5, errors
