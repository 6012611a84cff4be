"""Loaders: the character tokenizer, the model from scratch, and that what is saved loads as any checkpoint does."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.config.schema import ModelConfig, ScratchConfig
from recipes.models import load as models
from recipes.models.precision import Precision
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


def test_blanks_and_line_breaks_are_characters_too_however_many():
    tokenizer = character_tokenizer("12 \n\t")
    for text in ("1\n\n2", "1  2", "\n", " \n \t\n1"):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


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


def test_a_revision_is_of_the_model_and_of_no_other_tokenizer(monkeypatch):
    """A commit of one repository is none of another."""
    asked = []
    monkeypatch.setattr(models, "pretrained_tokenizer", lambda *given: asked.append(given))
    for tokenizer in (None, "a/b", "c/d"):
        named = ModelConfig(loader="transformers", name="a/b", revision="v2", tokenizer=tokenizer)
        models._named_tokenizer(named)
    models._named_tokenizer(ModelConfig(loader="scratch", tokenizer="c/d"))
    assert asked == [("a/b", "v2"), ("a/b", "v2"), ("c/d", None), ("c/d", None)]


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch):
    """The third machine's second process; a quantised model is where it belongs already."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"LOCAL_RANK": "1", "RANK": "17"}.items():
        monkeypatch.setenv(name, value)
    plain = SimpleNamespace(to=lambda device: device)
    assert models.to_gpu(plain) == torch.device("cuda", 1)
    quantised = SimpleNamespace(hf_quantizer=object())
    assert models.to_gpu(quantised) is quantised


@pytest.mark.parametrize(("dtype", "computed"), [("float16", torch.float16), ("auto", torch.bfloat16)])
def test_quantised_weights_compute_in_the_models_dtype(dtype, computed):
    asked = ModelConfig(loader="transformers", name="a/b", load_in_4bit=True, dtype=dtype)
    assert models.quantisation(asked)["quantization_config"].bnb_4bit_compute_dtype == computed


def test_a_precision_in_words():
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).half(), torch.nn.Linear(1, 1).bfloat16()
    )
    told = {"products": "as the weights", "logits": "float32"}
    whole = {"trained_weights": "bfloat16, float16, float32", "frozen_weights": "none", **told}
    assert Precision().describe(model) == whole
    model[1:].requires_grad_(False)
    adapters = {"trained_weights": "float32", "frozen_weights": "bfloat16, float16"}
    assert Precision(torch.float16).describe(model) == {**told, **adapters, "products": "float16"}


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_new_model_in_16_bits_computes_what_its_saved_copy_does(tmp_path, dtype):
    """The rotary frequencies are no weights: from_pretrained leaves them in float32, whatever the dtype."""
    shape = ScratchConfig(hidden_size=64, layers=1, heads=2, intermediate_size=16)
    config = ModelConfig(loader="scratch", scratch=shape, dtype=dtype)
    model, tokenizer = models.load(config, TASK, seed=0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ids = tokenizer(["3*7+5=26" * 60], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert model.lm_head.weight.dtype == again.lm_head.weight.dtype == getattr(torch, dtype)
