"""Whole runs, with TRL's own sampling and rewards: the packed step and TRL's take the same trajectory."""

from __future__ import annotations

import pytest
import torch
from rollouts import model_of, trainer_of
from transformers import set_seed
from trl import GRPOTrainer

from memhead.integrations import trl as memhead_trl
from recipes.models.tokenizers import character_tokenizer
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


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_go_the_same_way(tmp_path, name):
    losses, ours = history(packed(GRPOTrainer), tmp_path, **CASES[name])
    expected, theirs = history(GRPOTrainer, tmp_path, **CASES[name])
    assert [entry["reward"] for entry in ours] == [entry["reward"] for entry in theirs]
    assert 0 < sum(entry["reward"] for entry in ours) < len(ours)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3, abs=1e-5)
