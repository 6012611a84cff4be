"""The run end to end, tiny: its folder, its errors, its interruption."""

import io
import json
import os
import signal
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_grpo
from recipes.config.load import load_config
from recipes.training.callbacks import BypassGuard

CONFIG = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
TINY = [
    "model.scratch.hidden_size=32",
    "model.scratch.layers=1",
    "model.scratch.intermediate_size=32",
    "grpo.max_steps=3",
    "grpo.per_device_train_batch_size=16",
    "grpo.num_generations=4",
    "run.warm_start.steps=2",
    "run.warm_start.batch_size=8",
    "run.evaluation.size=16",
    "run.evaluation.every=2",
    "run.name=tiny",
]


def run(tmp_path, *more):
    return train_grpo.main(["--config", CONFIG, *TINY, f"run.output_root={tmp_path}", *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The root of a whole run, and what it printed."""
    root, printed = tmp_path_factory.mktemp("whole"), io.StringIO()
    with redirect_stdout(printed):
        assert run(root) == 0
    return root, printed.getvalue()


def test_leaves_a_whole_run_folder(whole):
    root, printed = whole
    assert "nats a token" not in printed  # its weights are of the usual size
    folder = root / "tiny"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    started = [line.pop("warm_start") for line in lines if "warm_start" in line]
    assert [line["step"] for line in started] == list(range(1, len(started) + 1))
    assert all(0 < line["loss"] < 4 and 0 < line["learning_rate"] <= 2e-3 for line in started)
    lines = lines[len(started) :]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all("accuracy" in lines[step] for step in (0, 2, 3))
    assert set(lines[1]["rewards"]) == {"correct", "well_formed"}
    for line in lines[1:]:
        tokens = line["tokens"]
        assert set(tokens) == {"computed", "real", "left_out_share"}
        assert 0 < tokens["computed"] <= tokens["real"]
        assert not any(name.startswith("step/") for name in line["trl"])
    assert load_config(folder / "config.yaml").to_yaml() == (folder / "config.yaml").read_text()
    assert json.loads((folder / "environment.json").read_text())["step"]["impl"] == "packed"
    assert json.loads((folder / "warm_start.json").read_text())["steps"] == len(started) == 2
    assert len((folder / "completions.jsonl").read_text().splitlines()) == 3 * 4
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "head_check.json").read_text())["passed"]
    assert json.loads((folder / "head.json").read_text())["calls"] >= 3  # one step each at least
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / "final"))
    assert (folder / "final" / "model.safetensors").is_file()
    card = (folder / "final" / "README.md").read_text()
    assert "3 optimizer steps; greedy accuracy on" in card  # with the figures of the end
    assert "accuracy" in printed
    assert "generation" in printed


def test_the_resolved_config_runs_again_alike(whole):
    root, _ = whole
    again = ["--config", str(root / "tiny" / "config.yaml"), "run.name=again"]
    assert train_grpo.main(again) == 0
    first, second = (
        [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("tiny", "again")
    )
    for key in ("reward", "loss", "entropy", "accuracy", "grad_norm"):
        assert [line.get(key) for line in first] == [line.get(key) for line in second]


def test_fewer_held_out_problems_than_the_head_check_takes(tmp_path):
    assert run(tmp_path, "task.eval_problems=2") == 0
    folder = tmp_path / "tiny"
    assert json.loads((folder / "head_check.json").read_text())["rows"] == 2 * 6  # of 7 characters each
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["accuracy_problems"] for line in lines if "accuracy" in line} == {2}


def test_a_mistake_in_the_configuration_is_one_line_and_status_2(tmp_path, capsys):
    assert run(tmp_path, "grpo.learning_rat=1e-3") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "learning_rate" in error
    assert not list(tmp_path.iterdir())


def test_a_step_past_the_head_stops_the_run(tmp_path, capsys, monkeypatch):
    from trl import GRPOTrainer

    def elsewhere(self, model, input_ids, attention_mask, logits_to_keep, *rest, **more):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1][:, -logits_to_keep:]
        logps = logits.log_softmax(-1)
        return (
            logps.gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0],
            -(logps.exp() * logps).sum(-1),
            None,
        )

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", elsewhere)
    assert run(tmp_path, "step.impl=trl") == 1  # the packed step has no use for that method
    assert "never reached memhead" in capsys.readouterr().err


def test_nothing_to_resume(tmp_path, capsys):
    assert run(tmp_path, "--resume") == 1
    assert "to begin one" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_keeps_the_folder_and_resume_goes_on(number, tmp_path, capsys, monkeypatch):
    ended = BypassGuard.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        ended(self, args, state, control, **kwargs)
        if state.global_step == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(BypassGuard, "on_step_end", interrupt)
    assert run(tmp_path) == 130
    assert "--resume" in capsys.readouterr().out
    folder = tmp_path / "tiny"
    AutoModelForCausalLM.from_pretrained(folder / "interrupted")
    assert (folder / "report.png").is_file()
    stopped = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert stopped == 1

    monkeypatch.setattr(BypassGuard, "on_step_end", ended)
    assert run(tmp_path, "--resume") == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "warm_start" not in line]
    assert steps == [0, 1, 2, 3]
    assert (folder / "final" / "model.safetensors").is_file()
