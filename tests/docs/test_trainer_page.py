"""docs/trainer.md's script, followed to the letter but for the model, the number of steps and the GPU."""

import pytest
from published import ROOT, blocks

from benchmarks.every_command import make_model
from memhead.integrations import trl as memhead_trl
from recipes.training.packed_step import PackedStep


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny model in it."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path)
    yield tmp_path
    if (handle := memhead_trl.installed()) is not None:
        handle.uninstall()


def test_the_script_runs(place):
    script, _ = blocks(ROOT / "docs" / "trainer.md", "python")
    assert len(script.splitlines()) <= 30
    changed = {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': '"model"',
        "max_steps=200": "max_steps=2, logging_steps=1, use_cpu=True, bf16=False",
    }
    for written, small in changed.items():
        assert script.count(written) == 1
        script = script.replace(written, small)
    names = {}
    exec(compile(script, "docs/trainer.md", "exec"), names)
    trainer = names["trainer"]
    assert trainer.why_not_packed is None
    assert isinstance(trainer, PackedStep)
    assert trainer.state.global_step == 2
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step in steps:
        assert 0 < step["step/tokens_computed"] < step["step/tokens_real"]
    assert (place / "short-answers" / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_the_lines_of_an_unsloth_notebook_import_what_is_there():
    """Unsloth's cases run the trainer (tests/integrations/unsloth_script_cases.py)."""
    _, notebook = blocks(ROOT / "docs" / "trainer.md", "python")
    first, *others = notebook.splitlines()
    assert first.startswith("from unsloth import FastLanguageModel")  # else what follows has TRL's trainer
    exec("\n".join(others), {})
