"""Loaders: the character tokenizer, the model from scratch, and that what is saved loads as any checkpoint does."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.config.schema import ModelConfig, ScratchConfig
from recipes.models import load as models
from recipes.models.tokenizers import character_tokenizer
from recipes.tasks.countdown import Countdown

SCRATCH = ModelConfig(loader="scratch", scratch=ScratchConfig(hidden_size=16, layers=1, intermediate_size=16))
TASK = Countdown(Countdown.Options(), 0)


def test_one_token_for_each_character_and_back():
    tokenizer = character_tokenizer(Countdown.characters)
    text = "357>26=3*7+5"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == len(Countdown.characters) + 3
    assert tokenizer("3x").input_ids[1] == tokenizer.unk_token_id


def test_a_character_given_twice_is_an_error():
    with pytest.raises(ValueError, match="twice"):
        character_tokenizer("112")


def test_the_quickstart_model_has_0_8_million_parameters():
    shape = ScratchConfig(hidden_size=128, layers=3, heads=4, intermediate_size=512)
    model = models.scratch_llama(shape, character_tokenizer(Countdown.characters), seed=0)
    assert 0.75e6 < sum(parameter.numel() for parameter in model.parameters()) < 0.85e6


def test_the_seed_gives_the_weights_and_leaves_the_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, _ = models.load(SCRATCH, TASK, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    again, _ = models.load(SCRATCH, TASK, seed=1)
    other, _ = models.load(SCRATCH, TASK, seed=2)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_saved_and_loaded_by_the_other_loader(tmp_path):
    model, tokenizer = models.load(SCRATCH, TASK, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path)("3*7").input_ids == tokenizer("3*7").input_ids
    ours, its_tokenizer = models.load(ModelConfig(loader="transformers", name=str(tmp_path)), TASK, seed=0)
    assert torch.equal(ours.lm_head.weight, model.lm_head.weight)
    assert its_tokenizer.padding_side == "left"
    assert its_tokenizer.decode(its_tokenizer("3*7+5").input_ids) == "3*7+5"
