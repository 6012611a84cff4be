"""Runs that upload, to a stand-in of the hub: what arrives there, and a hub that takes nothing."""

from __future__ import annotations

import os

import httpx
import pytest
import ready
from hub import hub
from huggingface_hub.errors import HFValidationError
from test_quickstart import CONFIG, TINY

from recipes.training.uploads import Uploads

KEPT = [word for word in TINY if not word.startswith(("run.warm_start", "run.evaluation.every"))]
MORE = [
    "run.save_every=1", "run.evaluation.every=null", "run.warm_start=null", "grpo.push_to_hub=true",
    "grpo.hub_strategy=checkpoint", "grpo.hub_always_push=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory):
    """After a run each, of three steps and as many checkpoints: the stand-in, the run's folder, status and output."""
    root, found = tmp_path_factory.mktemp("uploaded"), {}
    with hub() as takes, hub() as refuses:
        refuses.refuses = True
        runs = {}
        for name, server in (("takes", takes), ("refuses", refuses)):
            environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
            environment |= {
                "HF_ENDPOINT": server.address,
                "HF_TOKEN": "hf_mine",
                "HF_HOME": str(root / "home"),
            }
            place = [f"run.output_root={root / name}", "--config", CONFIG]
            runs[name] = ready.anew("train_grpo.py", *place, *KEPT, *MORE, env=environment, merged=True)
        for name, server in (("takes", takes), ("refuses", refuses)):
            said, _ = runs[name].communicate(timeout=200)
            found[name] = (server, root / name / "tiny", runs[name].returncode, said)
        yield found


def test_checkpoints_and_the_final_model_arrive(uploaded):
    server, folder, status, said = uploaded["takes"]
    assert status == 0, said
    assert "upload to the hub" not in said
    assert server.unknown == []
    commits = server.repositories["me/tiny"]
    messages = [message for message, _ in commits]
    for step in (1, 2, 3):
        assert f"Training in progress, step {step}" in messages
        (files,) = (
            files for message, files in commits if message == f"Training in progress, step {step}, checkpoint"
        )
        there = folder / "checkpoints" / f"checkpoint-{step}"
        assert files == {f"last-checkpoint/{file.name}": file.read_bytes() for file in there.iterdir()}
        assert b"memhead" in files["last-checkpoint/README.md"]
    assert messages[-1] == "Model save"
    last = {path: content for _, files in commits for path, content in files.items()}
    assert last["model.safetensors"] == (folder / "final" / "model.safetensors").read_bytes()
    assert b"memhead" in last["README.md"]
    assert not any(path.startswith(("_", "checkpoint-")) for path in last)


def test_a_hub_that_takes_nothing_costs_no_run(uploaded):
    server, folder, status, said = uploaded["refuses"]
    assert status == 0, said
    assert server.repositories["me/tiny"] == []
    for step in (1, 2, 3):
        assert f"step {step}: the upload to the hub failed: " in said
    assert "by hand: hf upload me/tiny RUN/final\n" in said
    assert (folder / "final" / "model.safetensors").is_file()
    assert "after GRPO: accuracy" in said


@pytest.mark.parametrize(
    "error", [HFValidationError("no name"), ConnectionError("gone"), httpx.ConnectError("gone")]
)
def test_whatever_the_last_upload_fails_by_is_told(capsys, error):
    class Trainer:
        hub_model_id = "me/tiny"

        def is_world_process_zero(self):
            return True

        def push_to_hub(self, *_, **__):
            raise error

    made = type("Uploading", (Uploads, Trainer), {"__init__": lambda self: None})()
    assert made.push_to_hub() is None
    told = f"the upload to the hub failed: {error}; by hand: hf upload me/tiny RUN/final\n"
    assert capsys.readouterr().out == told
