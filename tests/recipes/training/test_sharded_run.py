"""A whole run under FSDP2, in two real processes, by accelerate's launcher and the configuration that is published."""

import shutil

import fsdp_on_cpu
import pytest
import ready
import vllm_on_ranks
from launched import ROOT, launched, torchrun
from safetensors.torch import load_file
from test_quickstart import CONFIG

import train_grpo
from recipes.tracking.run_folder import RunFolder

# Long enough a warm start for some rewards, so that there is something to compare.
RUN = [
    "--config", CONFIG, "model.scratch.hidden_size=32", "model.scratch.layers=2", "model.scratch.intermediate_size=64",
    "run.warm_start.steps=80", "run.warm_start.check_every=80", "run.warm_start.batch_size=32",
    "run.warm_start.learning_rate=1e-2", "task.rewards.correct=0.0", "task.rewards.well_formed=1.0",
    "grpo.max_steps=2", "grpo.per_device_train_batch_size=16", "grpo.gradient_accumulation_steps=2",
    "grpo.lr_scheduler_type=constant", "grpo.warmup_steps=0", "run.save_every=1", "run.evaluation.size=15",
    "run.evaluation.every=1", "run.name=tiny",
]  # fmt: skip
FSDP2 = [
    "accelerate.commands.launch", "--config_file", ROOT / "configs" / "accelerate" / "fsdp2.yaml",
    "--num_processes", "2", "--main_process_port", "0", fsdp_on_cpu.__file__,
]  # fmt: skip


def ended(*processes):
    """They have ended well."""
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


def assert_same_run(ours, others):
    """They have learned the same, and something; returns the records of GRPO."""
    weights, expected = (load_file(folder.final / "model.safetensors") for folder in (ours, others))
    assert weights.keys() == expected.keys()
    start = load_file(ours.path / "warm_start" / "model.safetensors")
    assert max(float((weights[name] - start[name]).abs().max()) for name in start) > 1e-4
    assert max(float((weights[name] - expected[name]).abs().max()) for name in weights) < 1e-6
    records, wanted = (
        [record for record in folder.metrics.read() if "warm_start" not in record]
        for folder in (ours, others)
    )
    for record, want in zip(records, wanted, strict=True):
        assert (record["step"], record["accuracy"]) == (want["step"], want["accuracy"])
        assert record["accuracy_problems"] == 15
    for record, want in zip(records[1:3], wanted[1:3], strict=True):
        assert record["reward"] == want["reward"] > 0
        for name in ("loss", "grad_norm", "entropy"):
            assert record[name] == pytest.approx(want[name], rel=1e-5)
    return records


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Of a run in parts, of the same run whole in two processes, and of that in parts ended at step 1 and resumed."""
    parts, whole, resumed = (tmp_path_factory.mktemp(name) for name in ("parts", "whole", "resumed"))
    begun = launched(*FSDP2, *RUN, f"run.output_root={parts}", start=ready.anew)
    ended(begun, torchrun(2, "train_grpo.py", *RUN, f"run.output_root={whole}"))
    shutil.copytree(parts / "tiny", resumed / "tiny")
    for left in ("final", "finished.json", "checkpoints/checkpoint-2"):
        place = resumed / "tiny" / left
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    ended(launched(*FSDP2, *RUN, f"run.output_root={resumed}", "--resume"))
    return parts, whole, resumed


@pytest.mark.slow
@pytest.mark.parametrize("other", [1, 2], ids=["whole", "resumed"])
def test_a_run_in_parts_is_the_run_whole(roots, other):
    ours, others = (RunFolder(roots[place] / "tiny") for place in (0, other))
    assert [record["step"] for record in assert_same_run(ours, others)] == [0, 1, 2]
    assert (ours.checkpoint / "pytorch_model_fsdp.bin").is_file()


@pytest.mark.slow
def test_parts_are_resumed_as_parts_and_whole_as_whole(roots, monkeypatch, capsys):
    parts, whole, _ = roots
    longer = [*RUN, "grpo.learning_rate=1e-5", "--resume"]
    longer[longer.index("grpo.max_steps=2")] = "grpo.max_steps=3"
    assert train_grpo.main([*longer, f"run.output_root={parts}"]) == 2
    refused = capsys.readouterr().err
    assert "--resume: " in refused
    assert "checkpoint-2 keeps weights and optimizer in parts by FSDP, and this session whole" in refused
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert train_grpo.main([*longer, f"run.output_root={whole}"]) == 2
    assert "optimizer whole in each process, and this session in parts by FSDP" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_gets_the_weights_before_they_are_parts_and_after(tmp_path):
    """The evaluation before training is of the model in one piece, which TRL would put together."""
    given = ("run.warm_start.", "grpo.per_device", "task.rewards.")
    kept = [key for key in RUN if not str(key).startswith(given)]
    small = ["run.warm_start=null", "grpo.per_device_train_batch_size=4", f"run.output_root={tmp_path}"]
    on_server = ["grpo.num_generations=4", "grpo.use_vllm=true", "grpo.vllm_mode=server", "step.ahead=true"]
    ended(launched(*FSDP2[:-1], vllm_on_ranks.__file__, tmp_path, *kept, *small, *on_server))
    records = RunFolder(tmp_path / "tiny").metrics.read()
    assert [record["accuracy_problems"] for record in records] == [15, 15, 15]
    gap = [record["trl"]["sampling/sampling_logp_difference/max"] for record in records[1:]]
    assert gap[0] < 1e-4  # the first rollout is by the weights of the evaluation before
