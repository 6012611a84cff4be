"""Resuming a run: what may differ from the session before, and what is kept of it."""

import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_quickstart import CONFIG, TINY
from tiny import made_up_checkpoint
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import train_grpo
from recipes.config.load import ConfigError, load_config
from recipes.stops import ctrl_c_once
from recipes.tracking.run_folder import RunFolder
from recipes.training.callbacks import BypassGuard, Interruption, last_words, sigterm_as_ctrl_c
from recipes.training.resume import (
    apply_settings,
    is_finished,
    model_to_load,
    require_same,
    require_same_spread,
    restore,
    what_changed,
)


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


def of_steps(config, *counts):
    """The configuration with other numbers of steps; its checkpoint is after two."""
    return (config.model_copy(update={"grpo": {**config.grpo, "max_steps": count}}) for count in counts)


def test_a_run_is_finished_after_its_last_step(begun):
    """Where epochs decide, only the trainer knows which is the last."""
    configured, folder = begun
    configs = list(of_steps(configured(), -1, 0, 1, 2, 3))
    after_last = [False, False, True, True, False]
    folder.final.mkdir()
    (folder.path / "report.html").touch()
    assert not any(
        is_finished(config, folder) for config in configs
    )  # nothing says which step the model is of
    folder.write_json("finished.json", {"step": 2})
    assert [is_finished(config, folder) for config in configs] == after_last
    folder.final.rmdir()
    assert not any(is_finished(config, folder) for config in configs)


def test_fewer_steps_than_were_taken_are_refused(begun):
    configured, folder = begun
    fewer, *others = of_steps(configured(), 1, -1, 0, 2, 3)
    for config in others:
        require_same(config, folder)
    with pytest.raises(ConfigError) as error:
        require_same(fewer, folder)
    assert error.value.lines == [
        f"grpo.max_steps: 1 is fewer than the 2 steps that {folder.checkpoint} has taken; give as many at least"
    ]


def test_what_this_session_sees_otherwise(begun):
    configured, folder = begun
    assert what_changed(configured(), folder) == []
    now = configured("grpo.learning_rate=0.25", "run.save_every=7").model_copy(update={"processes": 2})
    processes = "sampling goes on from the seed, the data after as many batches of this size"
    rate, every, _ = lines = what_changed(now, folder)
    assert rate.startswith("grpo.learning_rate: 0.25 from here on, ")
    assert every.startswith("run.save_every: 7 from here on, ")
    assert lines[2:] == [f"processes: 2 from here on, 1 before: {processes}"]
    folder.write_json("environment.json", {"processes": 2})
    assert len(what_changed(now, folder)) == 2
    assert what_changed(configured(), folder) == [f"processes: 1 from here on, 2 before: {processes}"]


def optimizer_of(kind, **settings):
    """Two groups, each with a weight decay of its own."""
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [w], "weight_decay": d} for w, d in zip(weights, (0.5, 0.25), strict=True)]
    return kind(groups, **settings)


def test_a_configurations_values_are_put_over_a_checkpoints():
    """Each group's rate is what its own schedule says of the fourth step."""
    optimizer = optimizer_of(torch.optim.AdamW, lr=0.5, betas=(0.5, 0.75), eps=0.125)
    scheduler = LambdaLR(optimizer, [lambda step: 1 - step / 8, lambda step: 1 - step / 16])
    settings = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:  # as another configuration left them
        group.update(lr=0.0, initial_lr=9.0, betas=(0.9, 0.9), eps=1.0, weight_decay=9.0)
    scheduler.base_lrs, scheduler.last_epoch = [9.0, 9.0], 4
    apply_settings(optimizer, scheduler, settings)
    names = ("lr", "initial_lr", "betas", "eps", "weight_decay")
    assert [tuple(group[name] for name in names) for group in optimizer.param_groups] == [
        (0.25, 0.5, (0.5, 0.75), 0.125, 0.5),
        (0.375, 0.5, (0.5, 0.75), 0.125, 0.25),
    ]
    assert (scheduler.base_lrs, scheduler.get_last_lr()) == ([0.5, 0.5], [0.25, 0.375])
    with pytest.raises(ValueError, match="zip"):
        apply_settings(optimizer, scheduler, settings[:1])
    scheduler.lr_lambdas.pop()
    with pytest.raises(ValueError, match="zip"):
        apply_settings(optimizer, scheduler, settings)


def test_a_rate_that_a_metric_decides_stays_the_checkpoints():
    optimizer = optimizer_of(torch.optim.RMSprop, lr=0.5, alpha=0.5, momentum=0.25, foreach=True)
    scheduler = ReduceLROnPlateau(optimizer)
    settings = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(lr=0.125, alpha=0.9, momentum=0.9, foreach=None)
    apply_settings(optimizer, scheduler, settings)
    for group in optimizer.param_groups:
        assert [group[name] for name in ("lr", "alpha", "momentum", "foreach")] == [0.125, 0.5, 0.25, True]


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


def test_a_run_that_was_to_be_longer_has_taken_every_step_of_a_shorter_one(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2, "max_steps": 9}')
    read = []
    trainer = SimpleNamespace(
        _load_from_checkpoint=read.append,
        args=None,
        get_train_dataloader=lambda: None,
        set_initial_training_values=lambda arguments, data: (1, 2, 2),
    )
    restore(trainer, tmp_path)
    assert read == [str(tmp_path)]
    assert (trainer.state.global_step, trainer.state.max_steps) == (2, 2)


def test_a_run_of_epochs_that_is_at_its_end_takes_no_step_more(tmp_path):
    changed = ("grpo.max_steps", "run.evaluation.every", "run.warm_start.")
    shape = [setting for setting in TINY if not setting.startswith(changed)]
    epochs = ["grpo.max_steps=-1", "grpo.num_train_epochs=0.0004", "run.save_every=1", "run.warm_start=null"]
    command = ["--config", CONFIG, *shape, *epochs, f"run.output_root={tmp_path}"]
    assert train_grpo.main(command) == 0
    folder = RunFolder(tmp_path / "tiny")
    steps, weights = folder.step, (folder.final / "model.safetensors").read_bytes()
    assert steps > 0
    assert train_grpo.main([*command, "--resume"]) == 0
    assert folder.step == steps
    assert (folder.final / "model.safetensors").read_bytes() == weights
    assert folder.read_json("finished.json") == {"step": steps}


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


def test_a_ctrl_c_that_comes_with_the_second_cuts_nothing_short():
    """The run is being closed, and who presses twice means no third time."""
    with ctrl_c_once(), Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("cut short")


def test_of_two_stops_within_moments_before_the_steps_one_counts(monkeypatch):
    """Also of a SIGTERM and a Ctrl-C, and after the part in which SIGTERM is one; two seconds later it counts again."""
    before = signal.getsignal(signal.SIGINT)
    with ctrl_c_once():
        with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with sigterm_as_ctrl_c():
            os.kill(os.getpid(), signal.SIGTERM)
        later = time.monotonic() + 2.5
        monkeypatch.setattr("recipes.stops.time.monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_job_in_the_background_hears_no_ctrl_c_and_ends_by_sigterm():
    """A shell has SIGINT ignored there."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ctrl_c_once(), sigterm_as_ctrl_c():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        with Interruption():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("heard", [True, False])
def test_a_closed_terminal_ends_no_run_under_nohup(heard):
    def hear(number, frame):
        """Whoever listened before."""

    before = signal.signal(signal.SIGHUP, hear if heard else signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.asked is heard
        assert signal.getsignal(signal.SIGHUP) == (hear if heard else signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("within", [sigterm_as_ctrl_c, last_words])
def test_handlers_are_put_back_where_the_body_fails(within):
    before = signal.getsignal(signal.SIGTERM)

    def fail():
        assert signal.getsignal(signal.SIGTERM) is not before
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), within():
        fail()
    assert signal.getsignal(signal.SIGTERM) is before


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


def test_one_process_that_is_asked_stops_all_of_them(monkeypatch):
    monkeypatch.setattr("recipes.training.callbacks.anywhere", lambda here: True)
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    arguments = SimpleNamespace(gradient_accumulation_steps=1, steps_per_generation=1, num_iterations=1)
    stop = Interruption()
    stop.on_step_end(arguments, SimpleNamespace(global_step=1), control)
    assert stop.asked
    assert control.should_save
    assert control.should_training_stop


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
    own = config.model.model_copy(update={"compile_layers": False})  # as it is on a CPU
    assert model_to_load(config, folder) == own  # the run begins
    place = folder.path / "warm_start"
    place.mkdir(parents=True)
    (place / "adapter_config.json").touch()  # of Unsloth's adapters, which stand on the run's own model
    assert model_to_load(config, folder) == own
    (place / "config.json").touch()
    found = model_to_load(config, folder)
    assert (found.loader, found.name) == (loader, str(place))
    assert (found.revision, found.tokenizer, found.scratch) == (None, None, None)
    assert found.max_seq_length == config.model.max_seq_length


SPREAD = {
    "": "model.safetensors",
    "FSDP": "pytorch_model_fsdp_0",
    "DeepSpeed": "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt",
}  # by what of a checkpoint's files


@pytest.mark.parametrize("now", SPREAD)
def test_a_checkpoint_is_resumed_by_what_it_was_kept_by(tmp_path, monkeypatch, now):
    for name in ("FSDP", "DEEPSPEED"):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", str(name == now.upper()).lower())
    require_same_spread(SimpleNamespace(checkpoint=None))  # only a warm start, which is whole
    words = {"": "whole in each process", "FSDP": "in parts by FSDP", "DeepSpeed": "in parts by DeepSpeed"}
    for before, file in SPREAD.items():
        place = tmp_path / f"{before}-checkpoint"
        place.mkdir()
        for name in (file, "trainer_state.json"):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).touch()
        folder = SimpleNamespace(checkpoint=place)
        if before == now:
            require_same_spread(folder)
            continue
        said = (
            f"{place} keeps weights and optimizer {words[before]}, and this session {words[now]}; start it as"
        )
        with pytest.raises(ConfigError) as refused:
            require_same_spread(folder)
        assert said in str(refused.value)


def test_a_checkpoint_of_deepspeed_is_resumed_by_as_many_processes(tmp_path, monkeypatch):
    """Which says so itself, by a traceback, after the evaluation."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    place = tmp_path / "checkpoint-2" / "global_step2"
    place.mkdir(parents=True)
    for rank in range(2):
        (place / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(ConfigError, match=r"2 parts by DeepSpeed, .* has 1 process\(es\); start 2"):
        require_same_spread(SimpleNamespace(checkpoint=place.parent))
