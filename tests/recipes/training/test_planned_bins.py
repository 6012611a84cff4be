"""A training with planned bins: TRL's losses in fewer passes, what is said of it, and a plan that was wrong.

There is no GPU: the plan is of one, and a dense mask computes. Which bins are planned is held against a run's in
tests/recipes/plan/test_script.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from test_packed_trainer import PROMPTS, _head_as_it_was, compared, history, lora, made, same_weights, saved
from trl import GRPOTrainer

from recipes import packed_trainer
from recipes.packed_trainer import PackedGRPOTrainer
from recipes.plan.plan import GIB
from recipes.plan.script import unknown
from recipes.training import planned_bins
from recipes.training.packed_step import PackedStep

__all__ = ["_head_as_it_was"]  # a fixture
SLOTS = "bins of a micro-batch's slots: without a GPU none are planned"


@pytest.fixture
def planned(monkeypatch):
    """As on a GPU with some room for this model."""
    setting_of = planned_bins.setting_of

    def on_a_gpu(room):
        monkeypatch.setattr(planned_bins, "unknown", lambda trainer: iter(()))
        monkeypatch.setattr(planned_bins, "room", lambda trainer, setting: room)
        monkeypatch.setattr(
            planned_bins, "setting_of", lambda *given: replace(setting_of(*given), device_type="cuda")
        )

    return on_a_gpu


@pytest.fixture
def passes(monkeypatch):
    """The micro-batches of each loss."""
    found = []
    own = PackedStep._score_bin

    def score(self, model, part, *, entropy):
        if entropy and self.model.training:
            found.append(len(part.run))
        return own(self, model, part, entropy=entropy)

    monkeypatch.setattr(PackedStep, "_score_bin", score)
    return found


CASES = {
    "every weight": (dict, {}),
    "lora": (lambda: {"peft_config": lora()}, {}),
    "checkpointed": (dict, {"gradient_checkpointing": True}),
    "two iterations": (dict, {"num_iterations": 2}),
    "a reference": (dict, {"beta": 0.04}),
}


@pytest.mark.parametrize("name", CASES)
def test_planned_bins_have_trls_losses(tmp_path, capsys, planned, passes, name):
    script, settings = CASES[name]
    settings = {"gradient_accumulation_steps": 4, "max_steps": 3, **settings}
    planned(80 * GIB)
    model = saved(tmp_path)
    ours = made(PackedGRPOTrainer, tmp_path, model=model, script=script(), **settings)
    ours.train()
    theirs = made(GRPOTrainer, tmp_path, model=model, script=script(), **settings)
    theirs.train()
    compared(history(ours)[0], history(theirs)[0])
    same_weights(ours.model, theirs.model)
    assert ours.packed_bins == f"bins of {ours._token_budget} tokens, planned"
    assert capsys.readouterr().out.count(f"packed step: {ours.packed_bins}\n") == 1
    assert set(passes) == {4}  # the whole window
    assert passes.count(4) == 3


def test_bins_are_of_the_memory_that_is_there(tmp_path, planned, passes):
    planned(GIB // 2)  # less than is kept in reserve
    trainer = made(PackedGRPOTrainer, tmp_path, max_steps=1, gradient_accumulation_steps=4)
    trainer.train()
    width = max(len(prompt) for prompt in PROMPTS)
    groups = trainer.args.per_device_train_batch_size // trainer.num_generations
    assert trainer._token_budget == groups * (width + 4 * (trainer.max_completion_length - 1))
    assert max(passes) < 4


@pytest.mark.parametrize(
    ("told", "said"), [(None, SLOTS), (60, "bins of 60 tokens, as told, a micro-batch at least")]
)
def test_without_a_gpu_bins_are_as_told_or_of_slots(tmp_path, capsys, told, said):
    trainer = made(PackedGRPOTrainer, tmp_path, script={"token_budget": told}, max_steps=2)
    assert trainer.packed_bins is None
    trainer.train()
    assert (trainer._token_budget, trainer.packed_bins) == (told, said)
    assert [line for line in capsys.readouterr().out.splitlines() if "packed step" in line] == [
        f"packed step: {said}"
    ]
    trainer.train()
    assert "packed step" not in capsys.readouterr().out
    # On a trainer of TRL's own nothing else is in the way: its optimizer, in accelerate's wrapper, is what optim names.
    found = list(unknown(trainer))
    assert found == ["without a GPU none are planned", "torch's variable-length attention does not run here"]


def test_only_the_main_process_speaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packed_trainer, "is_main", lambda: False)
    made(PackedGRPOTrainer, tmp_path, max_steps=1).train()
    assert "packed step" not in capsys.readouterr().out


def samples_itself():
    class Own(PackedGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return super()._generate_and_score_completions(inputs)

    return Own


@pytest.mark.parametrize("kind", [PackedGRPOTrainer, samples_itself()])
def test_the_prompt_is_the_longest_of_the_first_generation(tmp_path, monkeypatch, kind):
    """Not of an evaluation before it, nor of a later one."""
    asked = []

    def spy(trainer, told, prompt):
        asked.append((told, prompt, trainer.model.training, bool(trainer.optimizer.state)))
        return planned_bins.Bins(None, "a test")

    monkeypatch.setattr(packed_trainer, "bins_of", spy)
    rows = ["1+1=", "12+1=", "1=", "123+4=", *["1234567890123="] * 12]  # four prompts a generation
    trainer = made(
        kind,
        tmp_path,
        script={
            "train_dataset": Dataset.from_dict({"prompt": rows}),
            "eval_dataset": Dataset.from_dict({"prompt": ["12345678901234567="] * 4}),
        },
        shuffle_dataset=False,
        eval_on_start=True,
        per_device_eval_batch_size=8,
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert asked == [(None, 6, True, False)]


def fails(monkeypatch, error):
    def no_memory(*_, **__):
        raise error

    monkeypatch.setattr(PackedStep, "_compute_loss", no_memory)


def notes(trainer, error):
    with pytest.raises(type(error)) as raised:
        trainer.train()
    return getattr(raised.value, "__notes__", [])


def test_planned_bins_that_do_not_fit_name_the_way_out(tmp_path, monkeypatch, planned):
    planned(80 * GIB)
    trainer, error = made(PackedGRPOTrainer, tmp_path), torch.OutOfMemoryError("CUDA out of memory")
    fails(monkeypatch, error)
    (note,) = notes(trainer, error)
    budget = trainer._token_budget
    assert note.startswith(f"memhead planned bins of {budget} tokens")
    assert f"PackedGRPOTrainer(…, token_budget={budget // 2}) takes smaller ones" in note


def test_an_error_that_is_no_shortage_is_left_alone(tmp_path, monkeypatch, planned):
    planned(80 * GIB)
    trainer, error = made(PackedGRPOTrainer, tmp_path), RuntimeError("something else")
    fails(monkeypatch, error)
    assert notes(trainer, error) == []


@pytest.mark.parametrize("told", [None, 60])
def test_a_shortage_in_bins_that_are_not_planned_is_left_alone(tmp_path, monkeypatch, told):
    trainer = made(PackedGRPOTrainer, tmp_path, script={"token_budget": told})
    error = torch.OutOfMemoryError("CUDA out of memory")
    fails(monkeypatch, error)
    assert notes(trainer, error) == []
