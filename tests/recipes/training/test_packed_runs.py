"""Whole runs, with TRL's own sampling and rewards: the packed step and TRL's take the same trajectory."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from rollouts import model_of, trainer_of
from transformers import set_seed
from trl import GRPOTrainer

import train_grpo
from memhead.integrations import trl as memhead_trl
from recipes.models.tokenizers import character_tokenizer
from recipes.tracking.run_folder import RunFolder
from recipes.training.packed_step import packed

CASES = {
    "one-window": {"gradient_accumulation_steps": 2},
    "two-iterations": {"gradient_accumulation_steps": 2, "num_iterations": 2},
    "two-generations-a-window": {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    # TRL's bonus is a mean over a micro-batch, so over other rows where there are several.
    "entropy": {"entropy_coef": 0.01, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 16},
    "masked": {"mask_truncated_completions": True},
}


def reward(completion_ids, **_):
    """Equal for a whole group now and then."""
    return [float(len(ids) > 2 and ids[1] % 2 == 0) for ids in completion_ids]


def history(kind, folder, lora=None, **settings):
    set_seed(0)
    model = model_of("llama").float()
    tokenizer = character_tokenizer("0123456789+-*=>abcdef")
    with memhead_trl.install():
        trainer = trainer_of(
            kind, model, folder, tokenizer, max_steps=10, learning_rate=1e-2, logging_steps=1, peft_config=lora,
            save_strategy="no", lr_scheduler_type="constant", **settings,
        )  # fmt: skip
        trainer.reward_funcs = [reward]
        losses = []
        compute = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: losses.append(loss := compute(*a, **k)) or loss
        trainer.train()
    count = trainer.args.gradient_accumulation_steps
    steps = torch.stack([x.detach() for x in losses]).view(-1, count).sum(1)
    return steps, [entry for entry in trainer.state.log_history if "reward" in entry]


@pytest.mark.parametrize("adapters", [False, True])
def test_where_the_policy_is_the_reference_kl_pulls_nowhere(tmp_path, adapters):
    """Exactly 0, as in TRL's step: Adam makes a full step of the least rounding. Nothing is earned here."""
    set_seed(0)
    model = model_of("llama").float()
    tokenizer = character_tokenizer("0123456789+-*=>abcdef")
    lora = LoraConfig(r=4, target_modules="all-linear") if adapters else None
    if not adapters:  # TRL loads the reference from where the model came from
        model.save_pretrained(tmp_path / "model")
        model = type(model).from_pretrained(tmp_path / "model")
    with memhead_trl.install():
        trainer = trainer_of(
            packed(GRPOTrainer), model, tmp_path, tokenizer, max_steps=2, learning_rate=1e-2, logging_steps=1,
            save_strategy="no", beta=0.04, gradient_accumulation_steps=2, steps_per_generation=4, peft_config=lora,
        )  # fmt: skip
        trainer.reward_funcs = [lambda completions, **_: [0.0] * len(completions)]
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert [entry["kl"] for entry in steps] == [0.0, 0.0]
    assert [entry["grad_norm"] for entry in steps] == [0.0, 0.0]
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_go_the_same_way(tmp_path, name):
    losses, ours = history(packed(GRPOTrainer), tmp_path, **CASES[name])
    expected, theirs = history(GRPOTrainer, tmp_path, **CASES[name])
    assert [entry["reward"] for entry in ours] == [entry["reward"] for entry in theirs]
    assert 0 < sum(entry["reward"] for entry in ours) < len(ours)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3, abs=1e-5)


OWN = """
model:
  loader: scratch
  tokenizer: bpe
  scratch: {vocabulary: 600, hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2}
task: {name: prompts, dataset: rows.jsonl, held_out: 4, rewards: {own_reward.even: 1.0}}
grpo:
  {max_steps: 10, per_device_train_batch_size: 32, num_generations: 4, max_completion_length: 6, learning_rate: 0.01}
run: {name: ten, evaluation: {size: 4, every: null}}
"""


def test_so_do_ten_steps_of_a_run(tmp_path, monkeypatch):
    """By step.impl alone."""
    rows = ({"prompt": f"{number} and {7 * number} are", "answer": "two"} for number in range(40))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ten.yaml").write_text(OWN)
    (tmp_path / "own_reward.py").write_text(
        "def even(completion_ids, **_):\n    return [float(sum(ids) % 2 == 0) for ids in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for impl in ("packed", "trl"):
        given = [f"step.impl={impl}", f"run.output_root={tmp_path / impl}"]
        assert train_grpo.main(["--config", "ten.yaml", *given]) == 0
        found.append(RunFolder(tmp_path / impl / "ten").metrics.read()[1:])
    packed_run, trls = found
    assert ["tokens" in step for step in packed_run + trls] == [True] * 10 + [False] * 10
    rewards = [step["reward"] for step in packed_run]
    assert rewards == [step["reward"] for step in trls]
    assert 0.1 < min(rewards) < max(rewards) < 1
    for mine, other in zip(packed_run, trls, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
