"""Resuming a run: what may differ from the session before, and what is kept of it."""

import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_quickstart import CONFIG, TINY
from tiny import made_up_checkpoint

import train_grpo
from recipes.config.load import ConfigError, load_config
from recipes.tracking.run_folder import RunFolder
from recipes.training.callbacks import BypassGuard, Interruption, sigterm_as_ctrl_c
from recipes.training.resume import is_finished, model_to_load, require_same


@pytest.fixture
def begun(tmp_path):
    """A function: the configuration with these overrides; and the folder of a run by it, with a checkpoint."""

    def configured(*more):
        return load_config(CONFIG, [*TINY, f"run.output_root={tmp_path}", *more])

    folder = RunFolder.create(tmp_path, "tiny", configured())
    made_up_checkpoint(folder.path, 2)
    return configured, folder


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.scratch.heads=2", "model.scratch.heads: 2 differs from the 4 of the run being resumed, "),
        ("task.eval_problems=100", "task.eval_problems: 100 differs from the 512 of the run being resumed, "),
        ("lora.r=4", "lora: {'r': 4, "),
        ("run.seed=1", "run.seed: 1 differs from the 0 of the run being resumed, "),
    ],
)
def test_another_model_task_or_seed_is_refused(begun, override, line):
    configured, folder = begun
    with pytest.raises(ConfigError) as error:
        require_same(configured(override), folder)
    assert len(error.value.lines) == 1
    assert error.value.lines[0].startswith(line)
    assert "leave --resume out" in error.value.lines[0]


def test_steps_batches_and_what_concerns_memory_may_change(begun):
    configured, folder = begun
    memory = ["model.gradient_checkpointing=true", "model.attn_implementation=eager"]
    more = ["grpo.learning_rate=1e-3", "run.save_every=1", *memory]
    require_same(configured(*more), folder)


def test_a_refused_resume_leaves_the_folder_alone(begun, tmp_path, capsys):
    _, folder = begun
    files = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    command = ["--config", CONFIG, *TINY[1:], "model.scratch.hidden_size=64", f"run.output_root={tmp_path}"]
    assert train_grpo.main([*command, "--resume"]) == 2
    assert capsys.readouterr().err.startswith("model.scratch.hidden_size: 64 differs from the 32 of")
    assert files == {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def test_the_former_configuration_is_kept_where_it_differs(begun):
    configured, folder = begun
    before = (folder.path / "config.yaml").read_text()
    folder.begin_session(configured())
    assert not (folder.path / "config.1.yaml").exists()
    folder.begin_session(configured("run.save_every=5"))
    assert (folder.path / "config.1.yaml").read_text() == before
    assert load_config(folder.path / "config.yaml").run.save_every == 5
    assert (folder.path / "environment.2.json").is_file()


def test_a_run_that_took_every_step_is_finished_and_no_more(tmp_path, capsys):
    steady = [
        "grpo.lr_scheduler_type=constant_with_warmup",
        "run.save_every=2",
        "run.warm_start=null",
        "grpo.max_steps=2",
    ]
    changed = ("grpo.max_steps", "run.warm_start.")
    kept = [setting for setting in TINY if not setting.startswith(changed)]
    command = ["--config", CONFIG, *kept, *steady, f"run.output_root={tmp_path}"]
    assert train_grpo.main(command) == 0
    folder = RunFolder(tmp_path / "tiny")
    files = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    capsys.readouterr()

    assert train_grpo.main([*command, "--resume"]) == 0  # nothing is missing
    *before, said = capsys.readouterr().out.splitlines()
    assert said == f"{folder.path} is finished; a larger grpo.max_steps would go on."
    assert len(before) == 2  # which file is read, and what the run is
    assert files == {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}

    # Killed in the evaluation, an older session's step still on record.
    (folder.path / "finished.json").unlink()
    shutil.rmtree(folder.final)
    folder.metrics.append({"step": 3, "reward": 1.0})
    assert train_grpo.main([*command, "--resume"]) == 0
    weights = folder.final / "model.safetensors"
    assert weights.read_bytes() == files[weights]
    lines = folder.metrics.read()
    assert [line["step"] for line in lines if "warm_start" not in line] == [0, 1, 2]
    assert "accuracy" in lines[-1]
    assert folder.checkpoint.name == "checkpoint-2"
    assert folder.read_json("finished.json") == {"step": 2}

    longer = [setting.replace("max_steps=2", "max_steps=3") for setting in command]
    assert train_grpo.main([*longer, "--resume"]) == 0
    assert folder.read_json("finished.json") == {"step": 3}
    assert weights.read_bytes() != files[weights]


def test_a_finished_run_whose_last_checkpoint_is_an_early_one_is_finished_too(begun):
    configured, folder = begun
    folder.final.mkdir()
    (folder.path / "report.html").touch()
    folder.write_json("finished.json", {"step": 3})
    # Of three steps; the checkpoint, where it was stopped once, is of two.
    assert is_finished(configured(), folder)
    (folder.path / "report.html").unlink()
    assert not is_finished(configured(), folder)


def test_a_stop_in_the_last_step_leaves_the_evaluation_to_resume(tmp_path, capsys, monkeypatch):
    ended = BypassGuard.on_step_end

    def stop(self, args, state, control, **kwargs):
        ended(self, args, state, control, **kwargs)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    command = ["--config", CONFIG, *TINY, f"run.output_root={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(BypassGuard, "on_step_end", stop)
        assert train_grpo.main(command) == 130
    assert "--resume" in capsys.readouterr().out
    folder = RunFolder(tmp_path / "tiny")
    assert folder.checkpoint.name == "checkpoint-3"
    assert "accuracy" not in folder.metrics.read()[-1]
    weights = (folder.final / "model.safetensors").read_bytes()
    assert train_grpo.main([*command, "--resume"]) == 0
    steps = [line["step"] for line in folder.metrics.read() if "warm_start" not in line]
    assert steps == [0, 1, 2, 3]
    assert "accuracy" in folder.metrics.read()[-1]
    assert (folder.final / "model.safetensors").read_bytes() == weights


def test_a_run_stopped_half_way_ends_as_one_that_was_not(tmp_path, monkeypatch):
    """The same weights to the bit: the packed step keeps nothing from one generation to the next."""
    ended = BypassGuard.on_step_end

    def stop(self, args, state, control, **kwargs):
        ended(self, args, state, control, **kwargs)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    changed = ("grpo.max_steps", "run.evaluation.every", "run.warm_start.", "run.name")
    kept = [setting for setting in TINY if not setting.startswith(changed)]
    settings = [
        "grpo.max_steps=4", "grpo.gradient_accumulation_steps=2", "run.warm_start=null", "run.evaluation.every=null",
        "run.save_every=2", "step.impl=packed", f"run.output_root={tmp_path}",
    ]  # fmt: skip
    whole, halves = (
        ["--config", CONFIG, *kept, *settings, f"run.name={name}"] for name in ("whole", "halves")
    )
    assert train_grpo.main(whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(BypassGuard, "on_step_end", stop)
        assert train_grpo.main(halves) == 130
    assert train_grpo.main([*halves, "--resume"]) == 0
    found, expected = (
        [line for line in RunFolder(tmp_path / name).metrics.read() if "reward" in line]
        for name in ("halves", "whole")
    )
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    halves, whole = (
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("halves", "whole")
    )
    start = load_file(tmp_path / "halves" / "checkpoints" / "checkpoint-2" / "model.safetensors")
    assert any(not torch.equal(start[name], value) for name, value in whole.items())  # it learns
    assert all(torch.equal(halves[name], value) for name, value in whole.items())


def test_sigterm_asks_once_and_ctrl_c_after_it_stops_at_once():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_a_stop_waits_for_the_end_of_a_generation():
    """Of four micro-batches, two a step, used twice: four steps from one end to the next."""
    arguments = SimpleNamespace(gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2)
    stop, found = Interruption(), []
    for step in range(1, 10):
        stop.asked = stop.asked or step == 3
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        stop.on_step_end(arguments, SimpleNamespace(global_step=step), control)
        assert control.should_save is control.should_training_stop
        found += [step] if control.should_save else []
    assert found == [4, 8]


def test_sigterm_before_the_steps_is_a_ctrl_c():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("model", "loader"),
    [
        ("{loader: unsloth, name: some/model, revision: v1, tokenizer: other}", "unsloth"),
        ("{loader: transformers, name: some/model, revision: v1}", "transformers"),
        ("{loader: scratch}", "transformers"),
    ],
)
def test_a_resumed_run_loads_what_the_warm_start_left_by_its_own_loader(
    tmp_path, without_unsloth, model, loader
):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {model}\ntask: {{name: countdown}}\nrun: {{warm_start: {{}}}}\n")
    config, folder = load_config(path), RunFolder(tmp_path / "run")
    assert model_to_load(config, folder) == config.model  # the run begins
    place = folder.path / "warm_start"
    place.mkdir(parents=True)
    (place / "adapter_config.json").touch()  # of Unsloth's adapters, which stand on the run's own model
    assert model_to_load(config, folder) == config.model
    (place / "config.json").touch()
    found = model_to_load(config, folder)
    assert (found.loader, found.name) == (loader, str(place))
    assert (found.revision, found.tokenizer, found.scratch) == (None, None, None)
    assert found.max_seq_length == config.model.max_seq_length
