"""The step's start-up check passes where the packed step is exact, and finds what would make it wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rollouts import model_of, trainer_of
from trl import GRPOTrainer

from memhead.integrations import trl as memhead_trl
from recipes.models.tokenizers import character_tokenizer
from recipes.training import packed_attention, packed_forward, packed_step
from recipes.training.step_check import COMPLETIONS, check_step, micro_batch

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12]]


@pytest.fixture(scope="module", autouse=True)
def head():
    with memhead_trl.install():
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "bfloat16"])
def trainer(request, tmp_path_factory):
    """With autocast to bfloat16, or without."""
    made = packed_step.packed(GRPOTrainer)
    place, tokenizer = tmp_path_factory.mktemp("check"), character_tokenizer("0123456789+-*=>abcdef")
    return trainer_of(made, model_of("llama").float(), place, tokenizer, bf16=request.param)


def test_the_micro_batch_is_of_the_prompts_tokens():
    batch = micro_batch(PROMPTS, 0, "cpu")
    assert batch.attention_mask.sum(1).tolist() == [n + c for n in (7, 3) for c in COMPLETIONS]
    assert batch.input_ids[3, :8].tolist() == [0, 0, 0, 0, 10, 11, 12, 4]
    assert set(batch.input_ids[batch.attention_mask.bool()].tolist()) <= set(range(3, 13))


def test_it_passes(trainer):
    trainer.model.eval()
    found = check_step(trainer, PROMPTS)
    assert found["passed"]
    assert not trainer.model.training
    assert (found["rows"], found["tokens"]) == (6, 3 * (7 + 3) + 2 * sum(COMPLETIONS))
    exact = not trainer.args.bf16
    for name, allowed in found["allowed"].items():
        assert allowed == pytest.approx(3 * found["row_by_row"][name] + (1e-4 if exact else 0.05)), name
    assert found["packed"]["logprob_error"] < (1e-5 if exact else 0.05)
    assert found["packed"]["gradient_error"] < (1e-5 if exact else 0.05)
    assert all(p.grad is None for p in trainer.model.parameters())


def positions(monkeypatch: Any) -> None:
    """A completion's begin at 0."""
    right = packed_forward.pack

    def wrong(*a: Any, **k: Any) -> Any:
        packed = right(*a, **k)
        packed.positions[packed.segments > 0] -= 1
        return packed

    monkeypatch.setattr(packed_forward, "pack", wrong)


def masks(monkeypatch: Any) -> None:
    """Completions see each other."""

    def wrong(packed: Any, *rest: Any) -> Any:
        length = packed.source.shape[1]
        return torch.ones(len(packed.source), 1, length, length, dtype=torch.bool).tril()

    monkeypatch.setattr(packed_attention, "masks", wrong)


def first_tokens(monkeypatch: Any) -> None:
    """The first token of a completion is scored by the state before its prompt's last."""
    right = packed_forward.pack

    def wrong(batch: Any, lengths: Any, rows: Any, **k: Any) -> Any:
        packed = right(batch, lengths, rows, **k)
        packed.states[packed.scores % batch.completion_width == 0] -= 1
        return packed

    monkeypatch.setattr(packed_forward, "pack", wrong)


def nothing_learns(monkeypatch: Any) -> None:
    """Log-probabilities are right, without their gradient."""
    right = packed_forward.PackedForward.packed_logps

    def wrong(self: Any, *a: Any) -> Any:
        logps = right(self, *a)
        return logps.detach() + 0 * logps

    monkeypatch.setattr(packed_forward.PackedForward, "packed_logps", wrong)


@pytest.mark.parametrize("fault", [positions, masks, first_tokens, nothing_learns])
def test_a_fault_is_found(trainer, monkeypatch, fault):
    fault(monkeypatch)
    found = check_step(trainer, PROMPTS)
    assert not found["passed"], found
    assert (found["packed"]["logprob_error"] > found["allowed"]["logprob_error"]) == (
        fault is not nothing_learns
    )
    assert found["packed"]["gradient_error"] > found["allowed"]["gradient_error"]


def test_a_fault_is_found_in_a_model_that_has_learned_nothing(tmp_path, monkeypatch):
    """Whose attention is nearly a mean: wrong positions change its log-probabilities by less than 1e-4 nats."""
    made = packed_step.packed(GRPOTrainer)
    tokenizer = character_tokenizer("0123456789+-*=>abcdef")
    trainer = trainer_of(made, model_of("llama", initializer_range=0.02).float(), tmp_path, tokenizer)
    assert check_step(trainer, PROMPTS)["passed"]
    positions(monkeypatch)
    found = check_step(trainer, PROMPTS)
    assert not found["passed"], found


def test_one_that_gives_up_is_trls(trainer, tmp_path):
    made = trainer_of(type(trainer), trainer.model, tmp_path, trainer.processing_class)
    packed_attention.use_varlen(made.model)
    assert made.model.config._attn_implementation == "packed_sdpa"
    made.give_up_packing(GRPOTrainer)
    assert type(made) is GRPOTrainer
    assert made.model.config._attn_implementation == "sdpa"
