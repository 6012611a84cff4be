"""Tracking of a real GRPO run of TRL: lines, phases, memory, resume, interruption."""

import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console
from tiny import made_up_checkpoint, tiny_trainer
from transformers import TrainerCallback

from recipes.config.load import load_config
from recipes.config.schema import LoraSection, TrackingConfig
from recipes.tracking import reporters as trackers
from recipes.tracking.files import CannotWrite, CompletionsFile, LinesFile, MetricsFile
from recipes.tracking.phases import PHASES, PhaseClock, attach
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.summary import before_and_after, main_figures, summarize
from recipes.tracking.terminal import Progress, opening
from recipes.tracking.tracker import print_summary, track
from recipes.training.callbacks import AccuracyEvery

ROOT = Path(__file__).parents[3]


def recorded_run(root, *, steps=4, tracking=None, **overrides):
    """A run of the tiny trainer; its folder, its tracker and what the terminal showed."""
    folder = RunFolder.create(root, "run")
    trainer = tiny_trainer(folder.path / "checkpoints", steps=steps, **overrides)
    console = Console(file=io.StringIO(), width=120)
    tracker = track(trainer, folder, tracking, console=console)
    tracker.evaluated(0, {"accuracy": 0.25})
    trainer.train()
    tracker.evaluated(trainer.state.global_step, {"accuracy": 0.5})
    tracker.close()
    print_summary(tracker.summary(), folder, console)
    return folder, tracker, console.file.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from memhead.integrations import trl as memhead_trl

    # With adapters the reference policy, for beta, needs no second model.
    adapters = LoraSection(r=4).peft_config()
    settings = {"beta": 0.04, "gradient_accumulation_steps": 2, "peft_config": adapters}
    with memhead_trl.install():  # for the run alone: other tests install it anew
        return recorded_run(tmp_path_factory.mktemp("runs"), **settings)


def test_one_line_a_step_with_every_figure(run):
    records = run[0].metrics.read()
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert records[0] == {"step": 0, "accuracy": 0.25}
    for record in records[1:]:
        names = {
            "reward",
            "reward_std",
            "entropy",
            "kl",
            "completion_length",
            "clipped_share",
            "zero_std_share",
        }
        assert names | {"step_time", "loss", "grad_norm", "learning_rate"} <= set(record)
        assert set(record["rewards"]) == {"digits_reward", "length_reward"}
        assert record["reward"] == pytest.approx(sum(record["rewards"].values()), abs=1e-4)
    assert records[-1]["accuracy"] == 0.5


def test_every_phase_is_timed_and_trls_clock_agrees(run):
    """TRL's own leaves out the optimizer; the sums are in test_known_answers.py."""
    for record in run[0].metrics.read()[1:]:
        assert set(record["time"]) == set(PHASES)
        inside = sum(seconds for phase, seconds in record["time"].items() if phase != "optimizer")
        assert inside >= 0.9 * record["step_time"]


def test_memory_by_phase(run):
    """What lives from step to step is in every peak: in the first step weights, in the second Adam's moments."""
    first, second, *_, last = run[0].metrics.read()[1:]
    model = run[1]._trainer.model
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    trained = sum(parameter.numel() * 4 for parameter in model.parameters() if parameter.requires_grad)
    for record, lives in ((first, weights), (second, weights + 2 * trained)):
        for phase in ("generation", "scoring", "forward", "backward", "optimizer"):
            peak = record["memory"][phase]["tensor_peak_mib"] * 1_048_576
            assert lives <= peak < lives + 4_000_000
            assert 100 < record["memory"][phase]["resident_mib"] < 100_000
    assert set(last["memory"]["backward"]) == {"resident_mib"}  # step 4 is not a metered one


def test_completions_with_their_rewards(run):
    records = run[0].completions.read()
    assert len(records) == 4 * 4
    assert {"step", "prompt", "completion", "rewards", "advantage"} == set(records[0])
    assert set(records[0]["rewards"]) == {"digits_reward", "length_reward"}
    assert records[0]["prompt"].endswith(">")


def test_environment_and_summary_are_written(run):
    environment = run[0].read_json("environment.json")
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["cores"] >= 1
    assert environment["memory_gib"] == round(psutil.virtual_memory().total / 1_073_741_824, 1)
    summary = run[0].read_json("summary.json")
    assert (summary["accuracy_before"], summary["accuracy_after"], summary["steps"]) == (0.25, 0.5, 4)
    records = run[0].metrics.read()[1:]
    assert summary["seconds"]["backward"] == pytest.approx(sum(r["time"]["backward"] for r in records))
    assert summary["memory"]["backward"]["tensor_peak_mib"] == max(
        record["memory"]["backward"].get("tensor_peak_mib", 0.0) for record in records
    )


def test_the_terminal_shows_reward_accuracy_memory_and_the_table(run):
    shown = run[2]
    assert "step 4/4: reward" in shown
    assert "accuracy 0.250" in shown
    assert "MiB" in shown
    for word in ("accuracy", "0.250", "0.500", "backward", "peak of live tensor bytes", "run folder:"):
        assert word in shown


def test_tracking_changes_no_number(memhead_in_trl, tmp_path):
    def losses(trainer):
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain = losses(tiny_trainer(tmp_path / "plain", steps=3))
    trainer = tiny_trainer(tmp_path / "tracked", steps=3)
    tracker = track(
        trainer, RunFolder.create(tmp_path, "run"), TrackingConfig(memory_every=1), progress=False
    )
    assert losses(trainer) == plain
    tracker.close()


def test_memory_switched_off(memhead_in_trl, tmp_path):
    folder, tracker, _ = recorded_run(tmp_path, steps=2, tracking=TrackingConfig(memory=False))
    assert all(not record.get("memory") for record in folder.metrics.read())
    assert tracker.summary()["memory"] == {}
    assert set(tracker.summary()["seconds"]) == set(PHASES) - {"scoring"}


def test_interrupted_and_resumed_without_duplicate_steps(memhead_in_trl, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    folder = RunFolder.create(tmp_path, "run")
    saving = {"save_strategy": "steps", "save_steps": 2, "steps": 5}
    trainer = tiny_trainer(folder.path / "checkpoints", **saving)
    tracker = track(trainer, folder, progress=False)
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    tracker.close()
    assert [record["step"] for record in folder.metrics.read()] == [1, 2, 3]
    assert folder.read_json("summary.json")["steps"] == 3

    again = RunFolder.to_resume(tmp_path, "run")
    assert again.path == folder.path
    again.begin_session()
    assert (again.path / "environment.1.json").is_file()
    trainer = tiny_trainer(folder.path / "checkpoints", **saving)
    tracker = track(trainer, again, progress=False)
    trainer.train(resume_from_checkpoint=True)
    tracker.close()
    assert [record["step"] for record in again.metrics.read()] == [1, 2, 3, 4, 5]
    steps = [record["step"] for record in again.completions.read()]
    assert steps == sorted(steps)
    assert len(steps) == 5 * 4


def test_a_trainer_without_a_phase_is_named(tmp_path):
    class Odd:
        pass

    with pytest.raises(AttributeError, match="Odd has no method '_generate'"):
        attach(Odd(), PhaseClock(torch.device("cpu"), None))


def test_a_phase_within_a_phase_belongs_to_the_outer():
    clock = PhaseClock(torch.device("cpu"), None)
    with clock.phase("forward"):
        pass  # outside a step: not counted
    clock.begin_step(0, torch.nn.Linear(1, 1), None)
    with clock.phase("forward"), clock.phase("scoring"):
        pass
    clock.end_step()
    seconds, peaks, steps = clock.take()
    assert set(seconds) == {"forward", "other"}
    assert (peaks, steps) == ({}, 1)
    assert clock.take() == ({}, {}, 0)


# The folder and its files


def test_a_second_run_of_the_name_gets_a_number(tmp_path):
    names = [RunFolder.create(tmp_path, "run").path.name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]


def test_the_recorded_name_says_whose_run_a_folder_is(tmp_path):
    """`llama-2` may be the second run of `llama`, or the first of `llama-2`."""

    def begin(name):
        text = f"run: {{name: {name}}}\n"
        folder = RunFolder.create(tmp_path, name, SimpleNamespace(to_yaml=lambda: text))
        made_up_checkpoint(folder.path, 1)
        return folder.path.name

    assert [begin(name) for name in ("llama", "llama-3", "llama", "llama", "llama-3", "llama-2")] == [
        "llama", "llama-3", "llama-2", "llama-4", "llama-3-2", "llama-2-2",
    ]  # fmt: skip
    (tmp_path / "llama-4" / "checkpoints" / "checkpoint-1" / "trainer_state.json").unlink()
    latest = {name: RunFolder.to_resume(tmp_path, name).path.name for name in ("llama", "llama-3", "llama-2")}
    assert latest == {"llama": "llama-2", "llama-3": "llama-3-2", "llama-2": "llama-2-2"}
    (tmp_path / "llama-2").rename(tmp_path / "moved")
    assert RunFolder.to_resume(tmp_path, "moved").path.name == "moved"  # renamed by hand


def test_resume_takes_the_latest_run_that_has_a_whole_checkpoint(tmp_path):
    first, *_ = [RunFolder.create(tmp_path, "run") for _ in range(3)]
    with pytest.raises(FileNotFoundError, match="no run named 'other'"):
        RunFolder.to_resume(tmp_path, "other")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint to resume from"):
        RunFolder.to_resume(tmp_path, "run")
    for step in (8, 10):
        made_up_checkpoint(first.path, step)
    (first.path / "checkpoints" / "checkpoint-12").mkdir()  # cut off while it was written
    found = RunFolder.to_resume(tmp_path, "run")
    assert (found.path.name, found.checkpoint.name) == ("run", "checkpoint-10")


def test_of_checkpoints_the_latest_is_read_first_and_its_name_is_free_for_the_next(tmp_path, capsys):
    """By number: by name 8 comes after 10."""
    run = RunFolder.create(tmp_path, "run").path
    made_up_checkpoint(run, 8)
    (made_up_checkpoint(run, 10) / "optimizer.pt").unlink()
    folder = RunFolder.to_resume(tmp_path, "run")
    assert "checkpoint-10 is passed over: optimizer.pt is missing" in capsys.readouterr().out
    assert folder.checkpoint.name == "checkpoint-8"
    folder.begin_session()
    made_up_checkpoint(run, 10)
    assert folder.checkpoint.name == "checkpoint-10"


def test_a_second_session_of_one_object_keeps_the_folder_and_equal_configurations_are_one(tmp_path):
    """Whoever closes a file lets go of every lock that the process has on it."""
    config = SimpleNamespace(to_yaml=lambda: "run: {name: run}\n")
    folder = RunFolder.create(tmp_path, "run", config)
    folder.begin_session(config)
    assert sorted(path.name for path in folder.path.glob("*.1.*")) == ["environment.1.json"]
    code = "import sys; from pathlib import Path; from recipes.tracking.lock import lock; lock(Path(sys.argv[1]))"
    other = subprocess.run(
        [sys.executable, "-c", code, str(folder.path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert f"is in use by process {os.getpid()}" in other.stderr


def test_a_line_cut_off_in_the_middle_is_left_out(tmp_path):
    file = LinesFile(tmp_path / "x.jsonl")
    file.append({"step": 1, "value": float("nan")})
    file.append({"step": 2, "value": torch.tensor(2.5)})
    with file.path.open("a") as handle:
        handle.write('{"step": 3, "val')
    assert file.read() == [{"step": 1, "value": None}, {"step": 2, "value": 2.5}]


def test_a_reward_that_is_a_whole_number_is_read_and_one_that_is_a_text_is_not(tmp_path):
    file = CompletionsFile(tmp_path / "completions.jsonl")
    for step, reward in enumerate((1, 0.5, None, "1")):
        file.append({"step": step, "rewards": {"right": reward}})
    assert [record["step"] for record in file.read()] == [0, 1, 2]
    assert file.unreadable() == [4]


def test_an_evaluation_joins_the_line_of_its_step(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "reward": 0.1})
    file.write({"step": 2, "reward": 0.2})
    file.write({"step": 2, "accuracy": 0.5})
    file = MetricsFile(tmp_path / "metrics.jsonl")  # as a resumed run opens it
    file.write({"step": 2, "accuracy": 0.6})
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert lines == [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2, "accuracy": 0.6}]


def test_summary_of_nothing():
    summary = summarize([])
    assert summary["reward_first"] is None
    assert summary["steps"] == 0


def test_a_step_with_a_null_reward_keeps_its_seconds_and_memory():
    def step(number, reward):
        memory = {"forward": {"tensor_peak_mib": 10.0 * number}}
        return {"step": number, "reward": reward, "time": {"forward": 2.0}, "memory": memory}

    summary = summarize([{"step": 0, "accuracy": 0.5}, step(1, 0.25), step(2, 0.75), step(3, None)])
    assert (summary["steps"], summary["seconds"]) == (3, {"forward": 6.0})
    assert summary["memory"] == {"forward": {"tensor_peak_mib": 30.0}}
    assert (summary["reward_first"], summary["reward_last"]) == (0.25, 0.75)


def test_the_packed_steps_tokens_are_in_the_table_of_the_run_and_of_several():
    def step(number, share):
        """Every other step samples; only it has a reward, and it takes nine times as long."""
        tokens = {"computed": 600.0, "real": 1000.0 * number, "left_out_share": share}
        first = {"reward": 0.5} if number % 2 else {}
        seconds = {"generation": 8.0, "forward": 1.0} if number % 2 else {"forward": 1.0}
        return {"step": number, **first, "time": seconds, "tokens": tokens}

    records = [{"step": 0}, *(step(n, 0.02 * n) for n in range(1, 41))]
    summary = summarize(records)
    rows = {name: cells for name, *cells in before_and_after(summary).rows}
    assert rows["tokens a second"] == [
        "500",
        "7,700",
    ]  # 1,000 + 2,000 + 3,000 + 4,000 in 20 s; 37,000 + … + 40,000
    assert rows["completions left out"] == ["5 %", "77 %"]
    assert rows["tokens a step, real"] == ["2,500", "38,500"]
    assert rows["tokens a step, computed"] == ["600", "600"]
    without = summarize([{"step": 1, "reward": 0.5, "time": {"forward": 2.0}}])
    assert not any("tokens" in name for name, *_ in before_and_after(without).rows)
    both = {name: cells for name, *cells in main_figures([("packed", summary), ("trl", without)]).rows}
    assert both["tokens a second"] == ["4,100", "–"]
    assert both["tokens a step, computed"] == ["600", "–"]
    assert both["completions left out"] == ["41 %", "–"]


def test_the_terminal_tells_the_speed_of_whole_rollouts():
    shown, console = [], Console(file=io.StringIO(), width=200)
    progress = Progress(console)
    progress.start(0, 6)
    for number, seconds in enumerate([{"generation": 8.0, "forward": 1.0}, {"forward": 1.0}] * 3, 1):
        tokens = {"computed": 600.0, "real": 1000.0 * number, "left_out_share": 0.5}
        progress.logged(number, {"step": number, "time": seconds, "tokens": tokens}, [])
        shown.append(console.file.getvalue().rsplit("step ", 1)[1].split("  ")[3])
    # The first rollout as far as it goes; from then on the last whole one: 3,000 and 7,000 tokens in 10 s.
    assert shown == [f"{rate} tokens/s" for rate in (111, 300, 300, 300, 700, 700)]


def test_the_terminal_tells_the_speed_of_a_rollout_of_one_step_at_once():
    console = Console(file=io.StringIO(), width=200)
    progress = Progress(console)
    progress.start(0, 3)
    for number in (1, 2, 3):
        tokens = {"computed": 600.0, "real": 1000.0 * number, "left_out_share": 0.5}
        progress.logged(number, {"step": number, "time": {"generation": 2.0}, "tokens": tokens}, [])
    assert "1,500 tokens/s" in console.file.getvalue().splitlines()[-1]


# Trackers


def test_tensorboard_gets_reward_memory_and_accuracy(memhead_in_trl, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder.create(tmp_path, "run")
    trainer = tiny_trainer(folder.path / "checkpoints", steps=3, report_to="tensorboard")
    tracker = track(trainer, folder, TrackingConfig(memory_every=1), progress=False)
    trainer.add_callback(
        AccuracyEvery(2, lambda: {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6]}, tracker.evaluated)
    )
    trainer.train()
    tracker.close()
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    records = [record for record in folder.metrics.read() if "reward" in record]
    assert [record["step"] for record in records] == [1, 2, 3]  # an evaluation costs no step its line
    for tag, values in (
        ("train/reward", [record["reward"] for record in records]),
        (
            "train/memory/backward/tensor_peak_mib",
            [r["memory"]["backward"]["tensor_peak_mib"] for r in records],
        ),
        ("train/time/generation", [record["time"]["generation"] for record in records]),
    ):
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [
            (step, pytest.approx(value, rel=1e-5)) for step, value in zip((1, 2, 3), values, strict=True)
        ]
    for tag, value in (("accuracy", 0.5), ("accuracy_interval_low", 0.4), ("accuracy_interval_high", 0.6)):
        assert [(e.step, e.value) for e in events.Scalars(f"eval/{tag}")] == [(2, pytest.approx(value))]


@pytest.mark.parametrize("package", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (problem,) = trackers.missing(package)
    assert (problem.key, problem.value) == ("tracking.report_to", package)
    assert problem.remedy.startswith(f"pip install {package}, or")
    assert not list(trackers.missing("none"))


def test_completions_are_printed_once_a_logged_step(memhead_in_trl, tmp_path, capsys):
    tracking = {"log_completions": True, "num_completions_to_print": 2}
    recorded_run(tmp_path, steps=3, **tracking)
    shown = capsys.readouterr().out
    assert [shown.count(f" Step {step} ") for step in (1, 2, 3)] == [1, 1, 1]
    for word in ("Prompt", "Completion", "digits_reward", "Advantage"):
        assert shown.count(word) == 3


def test_a_line_that_the_disk_has_no_room_for_leaves_the_others_whole(tmp_path):
    """A limit on a file's size stands for the full disk: the write comes back half done."""
    file, before = LinesFile(tmp_path / "x.jsonl"), resource.getrlimit(resource.RLIMIT_FSIZE)
    file.append({"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(CannotWrite, match=r"x\.jsonl could not be written"):
            file.append({"step": 2, "text": "a" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.append({"step": 3})
    assert file.read() == [{"step": 1}, {"step": 3}]
    assert file.unreadable() == []


def test_a_resumed_bar_keeps_the_last_accuracy():
    console = Console(file=io.StringIO(), width=120)
    progress = Progress(console)
    progress.accuracy(0, 0.125, 16)
    progress.start(3, 6, accuracy=0.25)
    progress.logged(4, {"reward": 0.5}, [])
    progress.accuracy(6, 0.375)
    assert console.file.getvalue().splitlines() == [
        "before GRPO: accuracy 0.125 of 16 held-out problems",
        "step 4/6: reward 0.500  accuracy 0.250  peak –",
        "after GRPO: accuracy 0.375",
    ]


@pytest.mark.parametrize(
    ("columns", "last"), [(70, "accuracy"), (80, "peak"), (110, "left out"), (140, "matrix")]
)
def test_a_bar_leaves_the_step_and_the_time_their_room(columns, last):
    console = Console(file=io.StringIO(), width=columns, force_terminal=True, color_system=None)
    progress = Progress(console)
    progress.start(0, 1000)
    tokens = {"computed": 600.0, "real": 20_000.0, "left_out_share": 0.5}
    speed = {"whole step": {"share": 0.0123}, "rate": 1e12}
    record = {"step": 1, "reward": 0.25, "time": {"generation": 2.0}, "tokens": tokens, "speed": speed}
    progress.logged(1000, record, [139.7])
    progress.advance(1000)
    progress.stop()
    line = re.split(r"\x1b\[2K", console.file.getvalue())[-1].splitlines()[0]  # the bar as it stood last
    said = [
        "reward 0.250",
        "accuracy –",
        "peak 139.7 MiB",
        "10,000 tokens/s",
        "50 % left out",
        "of the matrix rate",
    ]
    shown = [part for part in said if part in line]
    assert shown == said[: len(shown)]
    assert last in shown[-1]
    assert "1000/1000" in line
    assert "━━━" in line
    assert line.split()[-1] == "00:00"
    assert len(line) == columns


@pytest.mark.parametrize(
    ("name", "words", "step"),
    [
        ("llama3.1_8b_gsm8k", [], "Unsloth's"),
        ("llama3.1_8b_gsm8k", ["step.impl=packed"], "packed"),
        ("llama3.2_1b_gsm8k", [], "packed"),
    ],
)
def test_the_first_line_names_the_step_that_runs(without_unsloth, name, words, step):
    line = opening(load_config(ROOT / "configs" / f"{name}.yaml", words), "a card")
    assert line.endswith(f" by GRPO; head memhead, step {step}, on a card")


def test_a_record_without_what_its_readers_rely_on_is_left_out(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    folder.write_json("finished.json", {"at": 3})
    folder.write_json("head.json", {"calls": 1, "rows": "x"})
    for name in ("finished.json", "head.json", "head.json"):
        assert folder.read_json(name) is None
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path / 'finished.json'} is damaged (no step) and is left out",
        f"{tmp_path / 'head.json'} is damaged (no rows) and is left out",
    ]
    folder.write_json("finished.json", {"step": 3})
    assert folder.read_json("finished.json") == {"step": 3}
