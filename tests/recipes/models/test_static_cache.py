"""The kept static cache: the same completions as the growing one, one allocation for many calls."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_trainer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from memhead.integrations.trl import install
from recipes.models import static_cache
from recipes.models.decoding_attention import decode, use_for_decoding
from recipes.models.generation import Sampling, by_trainer
from recipes.models.static_cache import ROUND_TO, keep_cache, rows_by_graphs, sample_by_graphs

STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape)).eval()
    keep_cache(made)
    return made


def complete(model, length, **options):
    ids = torch.randint(3, 64, (4, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0  # padding on the left
    config = GenerationConfig(
        max_new_tokens=20,
        min_new_tokens=20,
        pad_token_id=0,
        eos_token_id=1,
        return_dict_in_generate=True,
        **options,
    )
    found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return found.sequences, found.past_key_values


def test_same_completions_and_one_allocation(model):
    seen = []
    for length in (9, 7, 9, ROUND_TO - 19, ROUND_TO - 18, 5):
        tokens, cache = complete(model, length, **STATIC)
        assert torch.equal(tokens, complete(model, length)[0]), length
        seen.append((cache.layers[0].keys.data_ptr(), cache.layers[0].keys.shape[2]))
    assert len(set(seen[:4])) == 1
    assert [size for _, size in seen] == [ROUND_TO] * 4 + [2 * ROUND_TO] * 2
    assert seen[4] == seen[5]


def test_one_dtype_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        tokens, cache = complete(model, 11, **STATIC)
    assert cache.layers[1].keys.dtype == cache.layers[1].values.dtype == torch.bfloat16
    assert cache.layers[0].keys[:, :, :30].abs().sum() > 0
    held = weakref.ref(cache)
    del cache
    assert complete(model, 11, **STATIC)[1].layers[0].keys.dtype == torch.float32
    gc.collect()
    assert held() is None  # there is room for one
    assert tokens.shape == (4, 31)


def test_trl_samples_through_it(tmp_path, monkeypatch):
    def sampled(**options):
        trainer = tiny_trainer(tmp_path, **options)
        if options:
            sample_by_graphs(trainer, trainer.model)
            assert trainer.generation_config.disable_compile is False
        torch.manual_seed(3)
        trainer.model.train()  # as TRL samples while it trains
        found = trainer._generate_single_turn([[3, 4, 5], [6, 7]], None, {}, 1)[0]
        assert trainer.model.training
        return found

    plain = sampled()
    modes = []

    def counted(*given):
        modes.append(trainer_model[0].training)
        return decode(*given)

    monkeypatch.setattr("recipes.models.decoding_attention.decode", counted)
    trainer_model = []
    monkeypatch.setattr(
        "recipes.models.static_cache.use_for_decoding",
        lambda model: (trainer_model.append(model), use_for_decoding(model)),
    )
    assert sampled(cache_implementation="static") == plain
    assert set(modes) == {False}  # every step of decoding, in the mode of an evaluation


def test_an_evaluation_uses_the_cache_of_training(tmp_path, monkeypatch):
    prompts, greedy = ["01>", "42>", "7>"], Sampling(5)
    plain = tiny_trainer(tmp_path)
    expected = by_trainer(plain)(prompts, greedy)
    assert rows_by_graphs(plain) is None
    trainer = tiny_trainer(tmp_path, cache_implementation="static")
    sample_by_graphs(trainer, trainer.model)
    rows = trainer.args.generation_batch_size
    assert rows_by_graphs(trainer) == rows > len(prompts)
    shapes = []
    forward = trainer.model.forward

    def seen(*args, **given):
        shapes.append(tuple(given["input_ids"].shape))
        return forward(*args, **given)

    monkeypatch.setattr(trainer.model, "forward", seen)
    assert by_trainer(trainer)(prompts, greedy) == expected
    assert {shape[0] for shape in shapes} == {rows}  # what a compiled step was made for
    shapes.clear()
    assert len(by_trainer(trainer)(prompts * rows, greedy)) == 3 * rows
    assert {shape[0] for shape in shapes} == {3 * rows}  # more than that: once, with a growing cache
    twice = by_trainer(trainer)(prompts, Sampling(5, samples=2, temperature=1.0))
    assert [len(texts) for texts in twice] == [2, 2, 2]
    twice = by_trainer(trainer)(prompts * 2, Sampling(5, samples=2, temperature=1.0))
    assert [len(texts) for texts in twice] == [2] * 6  # more than it has room for twice


def test_each_process_keeps_a_cache_of_its_own_completions():
    arguments = SimpleNamespace(generation_batch_size=64, world_size=4)
    by_graphs = SimpleNamespace(generation_config=SimpleNamespace(disable_compile=False), args=arguments)
    assert rows_by_graphs(by_graphs) == 16


def test_one_cache_for_training_and_evaluations_under_autocast(tmp_path, monkeypatch):
    made = []

    class Counted(static_cache.OneDtypeCache):
        def __init__(self, **options):
            made.append(options)
            super().__init__(**options)

    monkeypatch.setattr(static_cache, "OneDtypeCache", Counted)
    trainer = tiny_trainer(tmp_path, cache_implementation="static", bf16=True, steps=2)

    sample_by_graphs(trainer, trainer.model)
    evaluate = by_trainer(trainer)
    evaluate(["01>", "42>"], Sampling(5))
    with install():
        trainer.train()
    evaluate(["01>", "42>"], Sampling(5))
    assert len(made) == 1
