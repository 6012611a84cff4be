"""Checkpoints: whole or not there, passed over when damaged, at the end of a generation, gone on from to the bit."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from children import start
from ready import ROOT
from safetensors.torch import load_file, save_file
from test_finite import command
from tiny import made_up_checkpoint

import train_grpo
from recipes.models.manifest import REFERENCE, condemn, damage, seal
from recipes.tracking.files import CannotWrite
from recipes.tracking.run_folder import RunFolder
from recipes.training.callbacks import BypassGuard
from recipes.training.checkpoints import WholeCheckpoints, _publish, steps_of_generation

KILLED_IN_A_WRITE = """
import os, signal, torch
whole = torch.save
def half(state, path):
    whole(state, path)
    if "4" in str(path).rpartition("checkpoint-")[2].partition("/")[0] and str(path).endswith("optimizer.pt"):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
"""


def test_a_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before_and_the_same_run(tmp_path, capsys):
    settings = command(tmp_path, "grpo.max_steps=5", "run.save_every=2", "grpo.save_total_limit=2")
    assert start(settings, KILLED_IN_A_WRITE).wait(120) == -signal.SIGKILL
    checkpoints = tmp_path / "tiny" / "checkpoints"
    assert [place.name for place in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (checkpoints / "_unfinished" / "checkpoint-4" / "optimizer.pt").is_file()  # it was a real half
    assert train_grpo.main([*settings, "--resume"]) == 0
    assert f"Resuming from {checkpoints / 'checkpoint-2'}" in capsys.readouterr().out
    assert {p.name for p in checkpoints.iterdir() if p.is_dir()} == {
        "checkpoint-4",
        "checkpoint-5",
    }  # the last two

    whole = [s.replace("run.name=tiny", "run.name=whole") for s in settings]
    assert train_grpo.main(whole) == 0
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("tiny", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def nan_weights(place):
    save_file({"fine": torch.ones(2), "head": torch.tensor([1.0, float("nan")])}, place / "model.safetensors")
    seal(place)


def nan_in_an_adapter(place):
    save_file({"lora_A": torch.tensor([float("nan")])}, place / "adapter_model.safetensors")
    seal(place)


def nan_in_a_later_part(place):
    save_file({"head": torch.ones(2)}, place / "model-00001-of-00002.safetensors")
    save_file({"norm": torch.tensor([float("inf")])}, place / "model-00002-of-00002.safetensors")
    seal(place)


def without(name):
    def remove_before_the_manifest(place):
        (place / name).unlink()
        seal(place)

    return remove_before_the_manifest


def without_a_part_in_a_folder(place):
    """As DeepSpeed keeps an optimizer."""
    part = place / "global_step4" / "optim_states.pt"
    part.parent.mkdir()
    part.touch()
    seal(place)
    part.unlink()


def on_a_bad_disk(place):
    """A file of which reading fails, after its size was right."""
    (place / "scheduler.pt").write_text("")
    seal(place)
    (place / "scheduler.pt").unlink()
    (place / "scheduler.pt").symlink_to("/proc/self/mem")


FAULTS = {
    "half a state": (
        lambda place: half(place / "trainer_state.json"),
        "trainer_state.json has 9 bytes, and was wri",
    ),
    "half an optimizer": (
        lambda place: half(place / "optimizer.pt"),
        "optimizer.pt has 6 bytes, and was written wit",
    ),
    "another byte": (
        lambda place: other_byte(place / "scheduler.pt"),
        "scheduler.pt is not what was written",
    ),
    "no optimizer": (lambda place: (place / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "no scheduler": (lambda place: (place / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "no random state": (lambda place: (place / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "never an optimizer": (without("optimizer.pt"), "it was written without its optimizer"),
    "never a random state": (without("rng_state.pth"), "it was written without its random state"),
    "no part of an optimizer": (without_a_part_in_a_folder, "global_step4/optim_states.pt is missing"),
    "no manifest": (lambda place: (place / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda place: half(place / "manifest.json"), "manifest.json cannot be read"),
    "brackets for a manifest": (
        lambda place: (place / "manifest.json").write_text("[" * 100_000),
        "manifest.json cannot be read",
    ),
    "a file that cannot be read": (on_a_bad_disk, "scheduler.pt cannot be read (Input/output error)"),
    "NaN": (nan_weights, "model.safetensors: head holds NaN or infinity"),
    "NaN in an adapter": (nan_in_an_adapter, "adapter_model.safetensors: lora_A holds NaN or infinity"),
    "infinity in a later part": (
        nan_in_a_later_part,
        "model-00002-of-00002.safetensors: norm holds NaN or infinity",
    ),
    "diverged": (lambda place: condemn(place, "the run diverged from there"), "the run diverged from there"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys, fault):
    folder = RunFolder.create(tmp_path, "run")
    early, late = made_up_checkpoint(folder.path, 8), made_up_checkpoint(folder.path, 10)
    assert damage(late) == ""
    make, said = FAULTS[fault]
    make(late)
    found = RunFolder.to_resume(tmp_path, "run")
    assert found.checkpoint == early
    assert found.step == 8
    assert f"{late} is passed over: {said}" in capsys.readouterr().out
    assert late.is_dir()  # nothing is written yet
    found.begin_session()
    assert not late.exists()  # out of the way of the next one of step 10
    assert (late.parent / "damaged-checkpoint-10").is_dir()


def test_a_checkpoint_takes_the_place_of_one_of_a_session_before(tmp_path):
    place, written = tmp_path / "checkpoint-4", tmp_path / "_unfinished" / "checkpoint-4"
    for folder, text in ((place, "before"), (written, "now")):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(text)
    (place / "optimizer.pt").touch()
    _publish(written, place)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert {path.name for path in place.iterdir()} == {"weights", "manifest.json"}
    assert (place / "weights").read_text() == "now"


@pytest.mark.parametrize(
    ("generation", "iterations", "window", "steps"),
    [(1, 1, 1, 1), (4, 1, 2, 2), (4, 2, 2, 4), (2, 1, 4, 1), (3, 1, 2, 3), (1, 3, 2, 3), (4, 3, 8, 3)],
)
def test_steps_from_one_end_of_a_generation_to_the_next(generation, iterations, window, steps):
    """Counted one micro-batch at a time: where an update and a generation end together."""
    arguments = SimpleNamespace(
        steps_per_generation=generation, num_iterations=iterations, gradient_accumulation_steps=window
    )
    ends = [n // window for n in range(1, 200) if n % window == 0 and n % (generation * iterations) == 0]
    assert steps_of_generation(arguments) == steps == ends[0]


def test_a_checkpoint_in_a_generation_is_put_off_to_its_end(tmp_path, capsys):
    settings = command(tmp_path, "grpo.max_steps=9", "grpo.num_iterations=2", "run.save_every=5")
    assert train_grpo.main(settings) == 0
    printed = capsys.readouterr().out
    assert "step 5: no checkpoint inside a generation; the next is after step 6" in printed
    checkpoints = tmp_path / "tiny" / "checkpoints"
    # None at the end of the next generation, where none is due, nor of step 9, the first of its own.
    assert [place.name for place in checkpoints.glob("checkpoint-*")] == ["checkpoint-6"]

    # Going on from there gives the run that was never stopped.
    final = tmp_path / "tiny" / "final" / "model.safetensors"
    wanted = load_file(final)
    shutil.rmtree(tmp_path / "tiny" / "final")
    (tmp_path / "tiny" / "finished.json").unlink()
    assert train_grpo.main([*settings, "--resume"]) == 0
    assert all(torch.equal(wanted[key], value) for key, value in load_file(final).items())


def test_a_reference_that_moves_is_kept_with_the_checkpoint(tmp_path, capsys):
    """grpo.sync_ref_model: begun anew from the first model, it would be another reference without a word."""
    sync = ["grpo.beta=0.5", "grpo.sync_ref_model=true", "grpo.ref_model_sync_steps=1"]
    more = [
        "grpo.learning_rate=0.01",
        "run.warm_start.steps=2",
        "run.warm_start.batch_size=8",
        "run.save_every=1",
    ]
    settings = [*command(tmp_path, "grpo.max_steps=3", *more), *sync]
    assert train_grpo.main(settings) == 0
    folder = tmp_path / "tiny"
    wanted = load_file(folder / "final" / "model.safetensors")
    for place in ("final", "checkpoints/checkpoint-3"):
        shutil.rmtree(folder / place)
    (folder / "finished.json").unlink()
    assert train_grpo.main([*settings, "--resume"]) == 0
    ours = load_file(folder / "final" / "model.safetensors")
    assert all(torch.equal(wanted[key], value) for key, value in ours.items())

    kept = folder / "checkpoints" / "checkpoint-3" / REFERENCE
    moved = kept.rename(tmp_path / "moved")
    seal(folder / "checkpoints" / "checkpoint-3")
    settings[settings.index("grpo.max_steps=3")] = "grpo.max_steps=4"
    assert train_grpo.main([*settings, "--resume"]) == 2
    assert "grpo.sync_ref_model: moved the reference model, and " in capsys.readouterr().err

    moved.rename(kept)
    seal(folder / "checkpoints" / "checkpoint-3")
    settings[settings.index("grpo.sync_ref_model=true")] = "grpo.sync_ref_model=false"
    assert train_grpo.main([*settings, "--resume"]) == 0
    stays = load_file(folder / "checkpoints" / "checkpoint-4" / REFERENCE)  # where it was left
    assert all(torch.equal(stays[key], value) for key, value in load_file(kept).items())


def test_a_stop_inside_a_generation_waits_for_its_end(tmp_path, capsys, monkeypatch):
    ended = BypassGuard.on_step_end

    def stop(self, args, state, control, **kwargs):
        ended(self, args, state, control, **kwargs)
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(BypassGuard, "on_step_end", stop)
    assert train_grpo.main(command(tmp_path, "grpo.max_steps=6", "grpo.num_iterations=3")) == 130
    assert "Stopped at step 3. To go on: " in capsys.readouterr().out
    folder = RunFolder.to_resume(tmp_path, "tiny")
    assert folder.step == 3
    assert (folder.path / "interrupted" / "model.safetensors").is_file()
    assert damage(folder.path / "interrupted", parts={}) == ""
    assert not folder.final.exists()


def test_a_full_disk_is_named_with_what_to_do(tmp_path):
    """On a file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    settings = command(disk, "grpo.max_steps=30", "run.save_every=1")
    mount = f"mount -t tmpfs -o size=2m none {disk} && "
    check = "import sys, train_grpo; sys.exit(train_grpo.main(sys.argv[1:]))"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount + 'exec "$@"', "sh", sys.executable, "-c", check, *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no file system of its own may be mounted here")
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: {disk / 'tiny'}/")  # the checkpoint, or what is written after its failure
    assert "could not be written, 0." in line
    assert "--resume goes on from the last whole checkpoint" in line
    assert "Traceback" not in done.stderr


def test_a_model_card_that_finds_no_room_is_named_with_what_to_do(tmp_path):
    (tmp_path / "README.md.partial").symlink_to("/dev/full")
    (tmp_path / "README.md").symlink_to("/dev/full")
    with pytest.raises(
        CannotWrite, match=r"README\.md could not be written, .* MiB are free there: .* make room"
    ):
        WholeCheckpoints.write_card(SimpleNamespace(card=lambda: "a card"), tmp_path)


def test_manifest_sums_are_the_files(tmp_path):
    place = made_up_checkpoint(tmp_path, 3)
    files = json.loads((place / "manifest.json").read_text())["files"]
    assert set(files) == {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for name, entry in files.items():
        data = (place / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
