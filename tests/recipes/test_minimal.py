"""The plain GRPO of recipes/minimal.py, against numbers by hand and against TRL's packed step."""

import math

import pytest
import torch

from recipes.config.schema import ScratchConfig
from recipes.minimal import (
    Rollout,
    Settings,
    advantages,
    clipped_loss,
    logprobs_and_entropy,
    loss,
    main,
    rate,
    sample,
    until_end,
)
from recipes.models.load import scratch_llama
from recipes.models.tokenizers import character_tokenizer


@pytest.fixture(scope="module")
def policy():
    tokenizer = character_tokenizer("0123456789>=")
    shape = ScratchConfig(hidden_size=32, layers=2, intermediate_size=64)
    return scratch_llama(shape, tokenizer, seed=0).double(), tokenizer


def test_a_completion_counts_up_to_its_first_end():
    completion_BC = torch.tensor([[5, 1, 0, 0], [1, 1, 7, 1], [5, 6, 7, 8]])
    assert until_end(completion_BC, eos_token_id=1).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


def test_advantages_are_deviations_within_the_group():
    rewards_B = torch.tensor([1.0, 0.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0])
    deviation = math.sqrt(2 / 3)  # of 1, 0, 1, 2 around 1, unbiased
    expected = [0.0, -1 / (deviation + 1e-4), 0.0, 1 / (deviation + 1e-4), 0, 0, 0, 0]
    assert advantages(rewards_B, group=4).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_objective_is_clipped_on_the_side_that_would_gain():
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5]])
    mask = torch.tensor([[1, 1, 1, 0]])

    def value(advantage):
        found = clipped_loss(ratios.log(), torch.zeros(1, 4), torch.tensor([advantage]), mask, 0.2, 0.28)
        return found.item()

    assert value(1.0) == pytest.approx(-(1.28 + 1.28 + 0.5) / 3)
    assert value(-1.0) == pytest.approx((1.5 + 1.5 + 0.8) / 3)


def test_the_rate_rises_and_falls_to_nothing():
    settings = Settings(steps=110, warmup_steps=10, learning_rate=1.0)
    assert [rate(step, settings) for step in (0, 5, 10, 60, 109)] == pytest.approx([0, 0.5, 1, 0.5, 0.01])


def test_padding_of_a_prompt_changes_nothing(policy):
    model, _ = policy
    completion_BC = torch.tensor([[4, 5, 1]])
    alone = Rollout(torch.tensor([[3, 4]]), torch.ones(1, 2).long(), completion_BC, torch.ones(1, 3).long())
    padded = Rollout(
        torch.tensor([[0, 0, 3, 4]]),
        torch.tensor([[0, 0, 1, 1]]),
        completion_BC,
        torch.ones(1, 3).long(),
    )
    for one, other in zip(
        logprobs_and_entropy(model, alone, 0.7), logprobs_and_entropy(model, padded, 0.7), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_what_it_samples_is_scored_as_it_was_drawn(policy):
    model, tokenizer = policy
    torch.manual_seed(0)
    rollout = sample(model, tokenizer, ["12>", "345>"], Settings(group=3, completion_length=4))
    assert rollout.prompt_BS.shape == (6, 4)
    assert torch.equal(rollout.prompt_BS[0], rollout.prompt_BS[2])  # completions of a prompt are adjacent
    assert rollout.prompt_mask_BS[0].tolist() == [0, 1, 1, 1]
    logprobs_BC, entropy_BC = logprobs_and_entropy(model, rollout, 1.0)
    assert logprobs_BC.shape == rollout.completion_mask_BC.shape
    assert (logprobs_BC < 0).all()
    assert (entropy_BC <= math.log(len(tokenizer))).all()


def test_it_is_the_packed_steps_oracle(policy, tmp_path, memhead_in_trl):
    """The gradient of the same rollout through TRL's loss on packed rows, in float64."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from recipes.training.packed_step import packed

    model, tokenizer = policy
    torch.manual_seed(1)
    settings = Settings(group=4, completion_length=5, entropy_coef=0.02)
    rollout = sample(model, tokenizer, ["12>", "345>"], settings)
    advantages_B = torch.tensor([1.0, -0.5, 0.0, -0.5, 0.3, 0.3, -1.2, 0.6]).double()
    objective = loss(model, rollout, advantages_B, settings)
    objective.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    class Fed(packed(GRPOTrainer)):
        def _generate_and_score_completions(self, inputs):
            return {
                "prompt_ids": rollout.prompt_BS,
                "prompt_mask": rollout.prompt_mask_BS,
                "completion_ids": rollout.completion_BC,
                "completion_mask": rollout.completion_mask_BC,
                "advantages": advantages_B,
                "num_items_in_batch": rollout.completion_mask_BC.sum(),
            }

    arguments = GRPOConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=5, entropy_coef=0.02,
        epsilon=0.2, epsilon_high=0.28,
    )  # fmt: skip
    trainer = Fed(
        model=model,
        processing_class=tokenizer,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1>"}] * 8),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
    )
    trainer.create_optimizer()
    trainer.wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    found = trainer.training_step(trainer.wrapped, None, None)
    assert found.item() == pytest.approx(objective.item(), rel=1e-6)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-9)
    model.zero_grad()


def test_it_runs_the_quickstarts_task(monkeypatch, capsys, tmp_path):
    """Two steps after a start of two, from another folder."""
    from recipes.config import load as config_load

    original = config_load.load_config

    def short(path, overrides):
        more = ["run.warm_start.steps=2", "run.warm_start.target_accuracy=null", "task.eval_problems=16"]
        return original(path, [*overrides, *more])

    monkeypatch.setattr(config_load, "load_config", short)
    monkeypatch.chdir(tmp_path)
    assert main(["--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "of 16 held-out problems" in said
    assert "step   1  reward" in said
