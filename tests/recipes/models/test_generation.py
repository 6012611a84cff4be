"""Completions as evaluation asks for them, whatever the checkpoint's own generation settings are."""

import inspect

import pytest
import torch
from tiny import tiny_trainer
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from recipes.config.schema import ModelConfig, ScratchConfig
from recipes.models import load as models
from recipes.models.generation import UNCUT, Sampling, by_trainer, by_transformers, encode, token_ids
from recipes.tasks.countdown import Countdown

SCRATCH = ModelConfig(loader="scratch", scratch=ScratchConfig(hidden_size=16, layers=1, intermediate_size=16))
PROMPTS = ["357>26=", "1>", "229>31="]
GREEDY = Sampling(12)


@pytest.fixture
def loaded():
    model, tokenizer = models.load(SCRATCH, Countdown(Countdown.Options(), 0), seed=0)
    with torch.no_grad():  # far from uniform, so that greedy has something to choose
        model.lm_head.weight.mul_(20.0)
    return model, tokenizer


def test_greedy_in_spite_of_the_checkpoints_wishes(loaded):
    model, tokenizer = loaded
    plain = by_transformers(model, tokenizer)(PROMPTS, GREEDY)
    assert [len(texts) for texts in plain] == [1, 1, 1]
    assert by_transformers(model, tokenizer)(PROMPTS, Sampling(12)) == plain
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    assert by_transformers(model, tokenizer)(PROMPTS, GREEDY) == plain


def test_sampling_is_from_the_whole_vocabulary(loaded):
    model, tokenizer = loaded
    model.generation_config.top_k = 1  # which would make every sample the greedy one
    torch.manual_seed(0)
    drawn = by_transformers(model, tokenizer)(PROMPTS, Sampling(12, samples=8, temperature=5.0))
    assert [len(texts) for texts in drawn] == [8, 8, 8]
    assert all(len(set(texts)) > 1 for texts in drawn)


def test_every_token_that_the_model_declares_ends_a_completion(loaded):
    model, tokenizer = loaded
    (text,) = by_transformers(model, tokenizer)(["357>26="], GREEDY)[0]
    third = tokenizer.convert_tokens_to_ids(text[2])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, third]
    (shorter,) = by_transformers(model, tokenizer)(["357>26="], GREEDY)[0]
    assert shorter == text[: text.index(text[2]) + 1]


def test_the_same_tokens_with_and_without_padding(loaded):
    batch = encode(loaded[1], PROMPTS)
    kept = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
    assert token_ids(loaded[1], PROMPTS) == kept


def test_a_trainer_without_vllm_generates_with_its_model(memhead_in_trl, tmp_path):
    trainer = tiny_trainer(tmp_path)
    prompts = ["01>", "42>"]
    assert by_trainer(trainer)(prompts, GREEDY) == by_transformers(trainer.model, trainer.processing_class)(
        prompts, GREEDY
    )


def test_trl_still_has_what_the_way_through_vllm_uses():
    """By name only, since vLLM is not installed for the tests."""
    options = inspect.signature(VLLMGeneration).parameters
    assert {*UNCUT, "temperature", "max_completion_length"} <= set(options)
    assert {"prompts", "images", "num_generations"} <= set(
        inspect.signature(VLLMGeneration.generate).parameters
    )
    assert "self._last_loaded_step" in inspect.getsource(GRPOTrainer._generate_single_turn)
    source = inspect.getsource(VLLMGeneration.generate)
    for name in (*UNCUT, "temperature", "max_completion_length"):
        assert f"= self.{name}" in source, f"{name} is read elsewhere now"
