"""DeepSpeed's ZeRO-3, on a CPU: not among what this repository installs, so the tests run where deepspeed is there."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import ready
import zero3_on_ranks
from launched import ROOT, launched, torchrun
from safetensors.torch import load_file
from test_sharded_run import RUN, assert_same_run, ended

from recipes.tracking.run_folder import RunFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ON_CPU = Path(__file__).with_name("zero3_on_cpu.py")
ZERO3 = [
    "accelerate.commands.launch", "--config_file", ROOT / "configs" / "accelerate" / "zero3.yaml",
    "--num_processes", "2", "--main_process_port", "0", ON_CPU,
]  # fmt: skip


def by_zero3(*command):
    """Starts a run; anew, since deepspeed reads its accelerator when it is imported."""
    return launched(*ZERO3, *command, start=ready.anew)


def test_gradients_are_those_of_the_model_in_one_piece(tmp_path):
    process = torchrun(2, zero3_on_ranks.__file__, tmp_path)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    for rank in (0, 1):
        errors = json.loads((tmp_path / f"errors-{rank}.json").read_text())
        assert len(errors) == len(zero3_on_ranks.CASES)
        assert max(errors.values()) < 1e-5, errors


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Of a run by DDP, of one by ZeRO-3 from the same weights, and of that ended at step 1 and resumed; and
    of one whose final model alone was missing."""
    whole, parts, resumed, evaluated = (
        tmp_path_factory.mktemp(name) for name in ("whole", "parts", "resumed", "evaluated")
    )
    ended(torchrun(2, "train_grpo.py", *RUN, "step.impl=trl", f"run.output_root={whole}"))
    ended(by_zero3(*RUN, f"run.output_root={parts}"))
    for root, left in (
        (resumed, ("final", "finished.json", "checkpoints/checkpoint-2")),
        (evaluated, ("final", "finished.json")),
    ):
        shutil.copytree(parts / "tiny", root / "tiny")
        for name in left:
            place = root / "tiny" / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        ended(by_zero3(*RUN, f"run.output_root={root}", "--resume"))
    return whole, parts, resumed, evaluated


@pytest.mark.parametrize("other", [0, 2, 3], ids=["whole", "resumed", "evaluated"])
def test_a_run_by_zero_3_is_the_run_whole(roots, other):
    assert_same_run(*(RunFolder(roots[place] / "tiny") for place in (1, other)))


def test_each_process_keeps_its_part_and_a_model_is_named_whole(roots, tmp_path):
    """The way of the run that crashed: a model that transformers loads, though deepspeed will take one apart."""
    ours = RunFolder(roots[1] / "tiny")
    parts = sorted(path.name for path in ours.checkpoint.glob("global_step2/*optim_states.pt"))
    assert parts == [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    named = [key for key in RUN if not str(key).startswith(("model.scratch", "run.warm_start"))]
    begin = ["model.scratch=null", "run.warm_start=null", "model.loader=transformers"]
    begin += [f"model.name={ours.path / 'warm_start'}", f"run.output_root={tmp_path}"]
    ended(by_zero3(*named, *begin))
    weights = load_file(tmp_path / "tiny" / "final" / "model.safetensors")
    expected = load_file(ours.final / "model.safetensors")
    assert max(float((weights[name] - expected[name]).abs().max()) for name in expected) < 1e-6
