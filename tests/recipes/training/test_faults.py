"""Stops, kills, moves and changed settings of whole runs."""

import hashlib
import json
import logging
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import ready
import torch
from children import start, wait_for
from test_finite import command
from tiny import saved_llama
from transformers.trainer_utils import compare_trainer_and_checkpoint_args

import train_grpo
from recipes import ask, export
from recipes.export import merge
from recipes.models.manifest import seal
from recipes.report.page import write_report
from recipes.tracking.files import CannotWrite, LinesFile, naming_what_failed
from recipes.tracking.run_folder import RunFolder
from recipes.training.callbacks import AccuracyEvery

ON_ANOTHER = """
model: {{loader: transformers, name: {base}}}
task: {{name: countdown, eval_problems: 8}}
lora: {{r: 2, target_modules: all-linear}}
grpo: {{max_steps: 1, per_device_train_batch_size: 8, num_generations: 4, max_completion_length: 6, entropy_coef: 0.1}}
run: {{name: on, output_root: {root}, save_every: 1, evaluation: {{size: 4}}}}
"""
HELD = """
import time
from recipes.tracking.run_folder import RunFolder
folder = RunFolder({!r})
folder.begin_session()
print("held", flush=True)
time.sleep(300)
"""


def rates(folder):
    return {line["step"]: line["learning_rate"] for line in folder.metrics.read() if "learning_rate" in line}


# Settings that change


def test_an_extended_run_takes_the_rate_of_its_step_and_what_else_changed(tmp_path, capsys):
    plain = ["grpo.warmup_steps=0", "grpo.learning_rate=1e-4"]
    assert train_grpo.main(command(tmp_path, "grpo.max_steps=4", "run.save_every=4", *plain)) == 0
    folder = RunFolder(tmp_path / "tiny")
    assert rates(folder) == pytest.approx({1: 1e-4, 2: 7.5e-5, 3: 5e-5, 4: 2.5e-5})
    changed = [
        "grpo.max_steps=8",
        "grpo.learning_rate=2e-4",
        "grpo.weight_decay=0.05",
        "grpo.adam_beta1=0.8",
        "grpo.adam_beta2=0.95",
        "run.save_every=3",
        "tracking.logging_every=2",
    ]
    capsys.readouterr()
    assert train_grpo.main(command(tmp_path, "grpo.warmup_steps=0", *changed, "--resume")) == 0
    printed = capsys.readouterr().out
    assert "grpo.learning_rate: 0.0002 from here on, 0.0001 before" in printed
    assert "grpo.weight_decay: 0.05 from here on, 0 before" in printed
    found = rates(folder)  # linear from 2e-4 to 0 in 8 steps, logged every second one
    assert {step: found[step] for step in (6, 8)} == pytest.approx({6: 2e-4 * 3 / 8, 8: 2e-4 * 1 / 8})
    assert 7 not in found
    places = sorted(place.name for place in folder.path.glob("checkpoints/checkpoint-*"))
    assert places == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    state = torch.load(folder.checkpoint / "optimizer.pt", weights_only=True)
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.05, 0.0}  # norms have none
    assert {tuple(group["betas"]) for group in state["param_groups"]} == {(0.8, 0.95)}


def test_a_changed_setting_is_said_once():
    """By the run's own lines: transformers has a table of them, by the trainer's names."""
    said = logging.Handler()
    said.emit = lambda record: pytest.fail(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(said)
    arguments = SimpleNamespace(save_steps=3, per_device_train_batch_size=4, n_gpu=1)
    try:
        compare_trainer_and_checkpoint_args(arguments, SimpleNamespace(save_steps=4, train_batch_size=8))
    finally:
        logger.removeHandler(said)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("grpo.optim=sgd", "grpo.optim: 'sgd' differs from the 'adamw_torch"),
        ("grpo.num_iterations=3", "grpo.num_iterations: 3 differs from the 1 of"),
        (
            "run.warm_start.learning_rate=3e-3",
            "run.warm_start.learning_rate: 0.003 differs from the 0.002 of",
        ),
        ("grpo.max_steps=1", "grpo.max_steps: 1 is fewer than the 2 steps that "),
    ],
)
def test_a_setting_that_cannot_be_applied_is_refused_by_name(saved_run, capsys, setting, line):
    assert train_grpo.main([*command(saved_run, setting), "--resume"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(line)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The root of a run of two steps with a checkpoint after each."""
    root = tmp_path_factory.mktemp("first")
    assert train_grpo.main(command(root, "grpo.max_steps=2", "run.save_every=1")) == 0
    return root


@pytest.fixture
def saved_run(first_run, tmp_path):
    shutil.copytree(first_run / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / "finished.json").unlink()
    return tmp_path


# One folder, one process; folders that are not there


def test_a_second_process_is_told_who_holds_the_folder(saved_run, capsys):
    held = start([], HELD.format(str(saved_run / "tiny")))
    try:
        wait_for(held, "held")
        again = command(saved_run, "grpo.max_steps=3", "--resume")
        assert train_grpo.main(again) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(
            f"error: {saved_run / 'tiny'} is in use by process {held.pid} on {os.uname().nodename}"
        )
        assert f"kill {held.pid}" in error
    finally:
        held.kill()
        held.wait()
    assert train_grpo.main(again) == 0  # a process that was killed holds nothing


@pytest.mark.parametrize("kind", ["dangling link", "file"])
def test_an_output_root_that_cannot_be_is_one_line(tmp_path, capsys, kind):
    root = tmp_path / "root"
    root.symlink_to(tmp_path / "unmounted") if kind == "dangling link" else root.write_text("")
    assert train_grpo.main(command(root)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("run.output_root: ")
    assert (f"a link to {tmp_path / 'unmounted'}, which is not there" in line) == (kind == "dangling link")
    assert line.endswith("mount its disk, make the folder, or name another one")


def test_a_moved_run_resumes_evaluates_and_merges(tmp_path, capsys):
    """Its adapters' base is the warm start's model, in the run folder."""
    begun, moved = tmp_path / "begun", tmp_path / "moved"
    lora = "lora.r=2", "run.save_every=1"
    assert train_grpo.main(command(begun, "grpo.max_steps=1", *lora)) == 0
    place = begun / "tiny" / "final"
    assert str(begun) in (place / "adapter_config.json").read_text()
    assert train_grpo.main([*command(begun, *lora), "--evaluate", str(place)]) == 0
    here = capsys.readouterr().out
    shutil.move(begun, moved)
    assert train_grpo.main(command(moved, "grpo.max_steps=2", *lora, "--resume")) == 0
    capsys.readouterr()
    first = moved / "tiny" / "checkpoints" / "checkpoint-1"
    assert train_grpo.main([*command(moved, *lora), "--evaluate", str(first)]) == 0
    there = capsys.readouterr().out
    figure = '"accuracy": '
    measured = [[line for line in text.splitlines() if figure in line] for text in (here, there)]
    assert measured[0] == measured[1] != []
    assert merge(moved / "tiny")["logits_error"] < 1e-4
    shutil.move(first, tmp_path / "on_another_disk")
    first.symlink_to(tmp_path / "on_another_disk")
    assert train_grpo.main([*command(moved, *lora), "--evaluate", str(first)]) == 0


def test_whatever_a_run_leaves_a_model_in_is_sealed(tmp_path):
    """By sums of one's own; and again where the run goes on to another final model."""
    more = ["run.save_every=1", "lora.r=2"]
    run, adapters = tmp_path / "tiny", []
    for steps, resume in ((1, []), (2, ["--resume"])):
        assert train_grpo.main([*command(tmp_path, f"grpo.max_steps={steps}", *more), *resume]) == 0
        for name in ("warm_start", f"checkpoints/checkpoint-{steps}", "final"):
            sums = sums_in(run / name)
            assert sums == sums_of(run / name)
            assert [file for file in sums if file.endswith("model.safetensors")]
            adapters += [sums["adapter_model.safetensors"]] if name == "final" else []
        assert "base.json" in sums_in(run / "final")
    assert adapters[0] != adapters[1]


def sums_in(place):
    """Of the manifest. A model card is written anew, and may be another."""
    files = json.loads((place / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "README.md"}


def sums_of(place):
    """Of the files that are there."""
    files = [path for path in place.rglob("*") if path.is_file()]
    sums = {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {name: digest for name, digest in sums.items() if name not in ("README.md", "manifest.json")}


def sealed_anew(start):
    """As another run's would be."""
    other_bit(start / "model.safetensors")
    seal(start)


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (lambda start: other_bit(start / "model.safetensors"), "model.safetensors is not what was written"),
        (lambda start: (start / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda start: (start / "manifest.json").unlink(), "manifest.json is missing"),
        (sealed_anew, "it is another model: that of another run"),
    ],
    ids=["damaged", "cut", "unsealed", "another"],
)
def test_an_adapter_is_not_put_on_another_warm_start(tmp_path, capsys, harm, found):
    """Figures, answers and a merged model came of it, and nothing was said."""
    more = ["run.save_every=1", "lora.r=2"]
    assert train_grpo.main(command(tmp_path, "grpo.max_steps=1", *more)) == 0
    run = tmp_path / "tiny"
    start, copied = run / "warm_start", tmp_path / "another" / "final"
    shutil.copytree(run / "final", copied)
    shutil.copytree(start, copied.parent / "warm_start")
    sealed_anew(copied.parent / "warm_start")
    assert (
        train_grpo.main([*command(tmp_path, *more), "--evaluate", str(copied)]) == 0
    )  # on the one on record
    harm(start)
    places = [run / "final", run / "checkpoints" / "checkpoint-1"]
    commands = [
        lambda p=p: train_grpo.main([*command(tmp_path, *more), "--evaluate", str(p)]) for p in places
    ]
    commands += [lambda: export.main([str(run), "--merge"]), lambda: ask.main([str(run), "1+1>2="])]
    for place, refused in zip([*places, places[0], places[0]], commands, strict=True):
        capsys.readouterr()
        assert refused() == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"{place}: of its base {start}, {found}")
    assert not (run / "merged").exists()
    capsys.readouterr()
    assert train_grpo.main(command(tmp_path, "grpo.max_steps=2", *more, "--resume")) == 2
    assert f"run.warm_start: of {start}, {found}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (lambda base: other_bit(base / "model.safetensors"), "model.safetensors is not what was written"),
        (sealed_anew, "it is another model: that of another run"),
    ],
    ids=["damaged", "another"],
)
def test_an_adapter_stays_on_the_model_of_another_run_that_it_was_trained_on(tmp_path, capsys, harm, found):
    """Merged again after more steps, it was evaluated, gone on with and exported on another base in silence."""
    base = tmp_path / "merged"
    saved_llama(base)
    seal(base)
    path = tmp_path / "on.yaml"
    path.write_text(ON_ANOTHER.format(root=tmp_path, base=base))
    call = ["--config", str(path)]
    assert train_grpo.main(call) == 0
    run = tmp_path / "on"
    checkpoint = run / "checkpoints" / "checkpoint-1"
    assert train_grpo.main([*call, "--evaluate", str(checkpoint)]) == 0
    assert train_grpo.main([*call, "grpo.max_steps=2", "--resume"]) == 0
    harm(base)
    for refused in (
        lambda: train_grpo.main([*call, "--evaluate", str(run / "final")]),
        lambda: export.main([str(run), "--merge"]),
    ):
        capsys.readouterr()
        assert refused() == 2
        assert f"{run / 'final'}: of its base {base}, {found}" in capsys.readouterr().err
    assert train_grpo.main([*call, "grpo.max_steps=3", "--resume"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"model.name: of {base}, {found}")


@pytest.mark.parametrize(
    ("more", "goes_on"),
    [([], False), (["lora=null"], True), (["run.warm_start={steps: 1, batch_size: 2}"], True)],
    ids=["adapters", "every weight", "a warm start"],
)
def test_a_run_begins_on_no_damaged_model(tmp_path, capsys, more, goes_on):
    """One bit of a weight, and all that is trained on it is of another model than the one named."""
    base, run = tmp_path / "merged", tmp_path / "on"
    saved_llama(base)
    seal(base)
    path = tmp_path / "on.yaml"
    path.write_text(ON_ANOTHER.format(root=tmp_path, base=base))
    call = ["--config", str(path), *more]
    other_bit(base / "model.safetensors")
    for asked in ([], ["--pilot"]):
        assert train_grpo.main([*call, *asked]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"model.name: of {base}, model.safetensors is not what was written"), line
        assert line.endswith("put back what its run wrote, or remove manifest.json if it is meant")
        assert not run.exists()
    seal(base)
    assert train_grpo.main(call) == 0
    other_bit(base / "model.safetensors")
    assert (train_grpo.main([*call, "grpo.max_steps=2", "--resume"]) == 0) is goes_on
    (base / "manifest.json").unlink()
    assert train_grpo.main([*call, "grpo.max_steps=1", "run.name=again"]) == 0


def test_a_stop_while_the_final_model_is_written_keeps_it(tmp_path, monkeypatch, capsys):
    """It was left half-written and called the run's model, and without a checkpoint all that was trained was lost."""
    sealed, seen = seal, []

    def stopped(place):
        seen.append(place.name)
        if seen.count("final") == 1:
            raise KeyboardInterrupt
        sealed(place)

    monkeypatch.setattr("recipes.models.manifest.seal", stopped)
    assert train_grpo.main(command(tmp_path, "grpo.max_steps=1")) == 130
    run = tmp_path / "tiny"
    assert seen.count("final") == 2
    assert sums_in(run / "final") == sums_of(run / "final")
    assert not (run / "interrupted").exists()
    assert train_grpo.main([*command(tmp_path, "grpo.max_steps=1"), "--evaluate", str(run / "final")]) == 0


def test_a_run_that_goes_on_and_stops_leaves_the_model_before_its_card(tmp_path, monkeypatch):
    """The figures of later steps were written into the card of a model that had not taken them."""
    assert train_grpo.main(command(tmp_path, "grpo.max_steps=1", "run.save_every=1")) == 0
    card = tmp_path / "tiny" / "final" / "README.md"
    assert "1 optimizer steps" in (before := card.read_text())
    monkeypatch.setattr(
        AccuracyEvery, "on_step_end", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )  # a stop after its first step
    longer = ["grpo.max_steps=9", "run.save_every=1", "run.evaluation.every=1"]
    assert train_grpo.main([*command(tmp_path, *longer), "--resume"]) == 130
    assert RunFolder(tmp_path / "tiny").step < 9
    assert card.read_text() == before


def other_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("lora", [True, False], ids=["adapters", "reference"])
def test_a_run_is_not_resumed_upon_another_warm_start(tmp_path, capsys, lora):
    """Without its config.json the adapters went on with a model drawn at random, and ended well."""
    more = ["run.save_every=1", "lora.r=2" if lora else "grpo.beta=0.1"]
    assert train_grpo.main(command(tmp_path, "grpo.max_steps=1", *more)) == 0
    start, whole = tmp_path / "tiny" / "warm_start", tmp_path / "whole"
    shutil.copytree(start, whole)
    faults = {
        "config.json is missing": lambda: (start / "config.json").unlink(),
        "model.safetensors is not what was written": lambda: other_bit(start / "model.safetensors"),
        "manifest.json is missing": lambda: shutil.rmtree(start),
    }
    for found, damage in faults.items():
        damage()
        capsys.readouterr()
        assert train_grpo.main(command(tmp_path, "grpo.max_steps=2", *more, "--resume")) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"run.warm_start: of {start}, {found}")
        assert line.endswith("; put the file back, or leave --resume out to begin another run")
        shutil.copytree(whole, start, dirs_exist_ok=True)
    assert train_grpo.main(command(tmp_path, "grpo.max_steps=2", *more, "--resume")) == 0


def test_a_warm_start_that_is_there_is_whole_and_one_that_nothing_needs_may_be_gone(tmp_path, capsys):
    """Of a run without adapters and reference: the model is made as its config.json says, before the checkpoint's."""
    assert train_grpo.main(command(tmp_path, "grpo.max_steps=1", "run.save_every=1")) == 0
    start = tmp_path / "tiny" / "warm_start"
    (start / "config.json").unlink()
    capsys.readouterr()
    assert train_grpo.main(command(tmp_path, "grpo.max_steps=2", "run.save_every=1", "--resume")) == 2
    assert f"run.warm_start: of {start}, config.json is missing" in capsys.readouterr().err
    shutil.rmtree(start)
    assert train_grpo.main(command(tmp_path, "grpo.max_steps=2", "run.save_every=1", "--resume")) == 0


# Files


def test_a_cut_metrics_file_is_noticed_on_resume(saved_run, capsys):
    metrics = saved_run / "tiny" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    lines[1] = lines[1][: len(lines[1]) // 2]  # the warm start's second line
    metrics.write_text("\n".join(lines[:-1]) + "\n")  # and without the last step
    assert train_grpo.main(command(saved_run, "grpo.max_steps=3", "--resume")) == 0
    printed = capsys.readouterr().out
    assert f"{metrics}: line 2 was cut off or overwritten and is left out" in printed
    assert f"{metrics} ends at step 1, the checkpoint at 2: the steps between are lost" in printed
    assert LinesFile(metrics).unreadable() == []
    assert [line["step"] for line in LinesFile(metrics).read() if "step" in line] == [0, 1, 3]


def test_a_checkpoint_beyond_a_limit_of_size_names_its_file(tmp_path):
    """Much of the disk is free, as under a quota: torch.save says nothing but that its position is unexpected."""
    limit = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"""
    run = start(command(tmp_path, "run.save_every=1"), limit)
    _, said = run.communicate(timeout=120)
    assert run.wait() == 1
    assert "Traceback" not in said
    line = said.strip().splitlines()[-1]
    assert line.startswith(f"error: {tmp_path / 'tiny'}/")
    assert " could not be written, " in line


def test_a_line_that_could_not_be_written_names_its_file_and_leaves_the_others(tmp_path):
    full = LinesFile(tmp_path / "full.jsonl")
    full.path.symlink_to("/dev/full")
    with pytest.raises(
        CannotWrite, match=r"full\.jsonl could not be written, .* No space left on device; make room"
    ):
        full.append({"step": 1})
    with pytest.raises(KeyError), naming_what_failed(tmp_path / "x"):
        raise KeyError("a mistake in the code stays what it is")


# Signals


MATH = """
model: {loader: scratch, tokenizer: bpe, scratch: {hidden_size: 32, layers: 1, intermediate_size: 32, heads: 2}}
task: {name: math, dataset: DATA, eval_split: null, held_out: 8, prompt: plain}
grpo: {max_steps: 200, per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 8}
run: {name: math, output_root: ROOT, evaluation: {size: 4}}
"""


def children(parent, words):
    """The processes that `parent` started and whose command line has `words`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            started_by = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if started_by == parent and words in (place / "cmdline").read_text():
                found.append(int(place.name))
    return found


def test_ctrl_c_for_the_whole_group_of_a_math_run_ends_it_in_order(tmp_path):
    """A terminal sends it to every process of the group; the verifier is in a session of its own."""
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(f'{{"problem": "What is {n} + {n}?", "answer": "{2 * n}"}}\n' for n in range(64)))
    path = tmp_path / "math.yaml"
    path.write_text(MATH.replace("DATA", str(data)).replace("ROOT", str(tmp_path)))
    run = start(["--config", str(path)])
    try:
        wait_for(run, "step 10/")
        (verifier,) = children(run.pid, "math_verifier")
        assert os.getsid(verifier) == verifier
        os.killpg(run.pid, signal.SIGINT)
        output, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, errors
    assert "Traceback" not in errors
    assert "To go on: python train_grpo.py" in output
    folder = RunFolder.to_resume(tmp_path, "math")
    assert folder.step >= 10


def test_a_terminal_that_is_closed_ends_the_run_in_order(tmp_path):
    """Nobody reads what it prints, in a locale without its characters; then SIGHUP comes."""
    poor = "import os, sys\nsys.stdout.reconfigure(encoding='ascii')\n"
    heard = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # the suite may run under nohup
    run = start(command(tmp_path, "grpo.max_steps=100000", "run.checks=false"), poor + heard)
    try:
        wait_for(run, "Reading")
        run.stdout.close()
        metrics = tmp_path / "tiny" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (metrics.is_file() and '"reward"' in metrics.read_text()):
            time.sleep(0.1)
        os.kill(run.pid, signal.SIGHUP)
        status = run.wait(60)
        errors = run.stderr.read()
        assert status == 130, errors
    finally:
        run.kill()
    assert "Traceback" not in errors
    assert RunFolder(tmp_path / "tiny").step >= 1


def test_sigterm_in_the_warm_start_is_orderly(tmp_path):
    settings = command(tmp_path, "run.warm_start.steps=100000", "run.warm_start.target_accuracy=null")
    run = start(settings)
    try:
        wait_for(run, "warm start  step 10 ")
        os.kill(run.pid, signal.SIGTERM)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130
    assert "Stopped before training began; run the same command again." in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("milliseconds", [0, 1, 4, 15])
def test_a_second_ctrl_c_in_the_warm_start_cuts_no_sentence_short(tmp_path, milliseconds):
    """It came while objects were let go of, or the sentence was said: a traceback followed, or stood in its place."""
    long = ["run.warm_start.steps=100000", "run.warm_start.target_accuracy=null"]
    run = ready.python(
        "-m", "train_grpo", *command(tmp_path, *long), env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        wait_for(run, "warm start  step 10 ")
        os.kill(run.pid, signal.SIGINT)
        time.sleep(milliseconds / 1000)
        os.kill(run.pid, signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130
    assert errors.strip() == "Stopped before training began; run the same command again."


@pytest.mark.parametrize("seconds", [0.02, 0.3, 1.0, 1.8])
def test_ctrl_c_while_the_run_is_still_imported_is_a_line(tmp_path, seconds):
    """Torch was imported again to say it, which took a second in which another made a traceback, or failed."""
    run = ready.anew("-m", "train_grpo", *command(tmp_path), env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for(run, "Reading ")
        for pause in (seconds, 0.002, 0.05):
            time.sleep(pause)
            with suppress(ProcessLookupError):
                os.kill(run.pid, signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert (errors.strip(), run.returncode) == ("Stopped; the same command begins again.", 130)


def test_a_ctrl_c_within_an_exec_leaves_the_status(tmp_path):
    """As while a dataclass is made. Under -m Python ended by the signal: -2 in the place of 130."""
    text = (
        "from recipes.stops import leave, stopped_in_a_line\n"
        "leave(stopped_in_a_line(lambda _: exec('raise KeyboardInterrupt'))([]))\n"
    )
    (tmp_path / "cut_off.py").write_text(text)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ready.ROOT)])}
    run = ready.anew("-m", "cut_off", env=env)
    _, errors = run.communicate(timeout=60)
    assert (errors.strip(), run.returncode) == ("Stopped; the same command begins again.", 130)


# Files that are damaged while a run is at work


@pytest.fixture
def spoiling(monkeypatch):
    """A function: files of the run's folder get this text in the place of their own as training ends."""

    def spoil(files):
        right = train_grpo.finish

        def after(session, *rest):
            for name, text in files.items():
                (session.folder.path / name).write_bytes(text)
            return right(session, *rest)

        monkeypatch.setattr(train_grpo, "finish", after)

    return spoil


def test_a_damaged_file_costs_a_line_and_not_the_report(tmp_path, capsys, spoiling, monkeypatch):
    monkeypatch.setattr("recipes.report.page.write_report", write_report)  # which conftest.py leaves out
    cut = dict.fromkeys(("environment.json", "head.json", "head_check.json", "plan.json"), b'{"a": \xff')
    spoiling(cut | {"config.yaml": b"head: [", "completions.jsonl": b"\0\0\n{}"})
    assert train_grpo.main(command(tmp_path, "grpo.max_steps=1")) == 0
    folder, printed = RunFolder(tmp_path / "tiny"), capsys.readouterr()
    damaged, without_card = printed.err.splitlines()
    assert damaged.startswith(f"{folder.path / 'environment.json'} is damaged (")
    assert without_card.startswith(
        f"{folder.final} is left without a model card: {folder.path / 'config.yaml'}:1"
    )
    assert f"{folder.path / 'completions.jsonl'}: line 1 was cut off" in printed.out
    assert "ask it:" in printed.out
    assert "and the plan (◆)" in (folder.path / "report.html").read_text()
    assert folder.read_json("plan.json")["measured"]  # the run knows its plan, and writes it anew
    assert folder.read_json("finished.json") == {"step": 1}


def test_metrics_that_were_overwritten_cost_the_report_and_not_the_end(tmp_path, capsys, spoiling):
    spoiling({"metrics.jsonl": b"\0\0\0"})
    assert train_grpo.main(command(tmp_path, "grpo.max_steps=1")) == 0
    printed = capsys.readouterr()
    assert "metrics.jsonl: line 1 was cut off or overwritten and is left out" in printed.out
    assert "ask it:" in printed.out
    assert not (tmp_path / "tiny" / "report.html").exists()
