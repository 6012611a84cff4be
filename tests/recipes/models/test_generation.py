"""Completions as evaluation asks for them, whatever the checkpoint's own generation settings are."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_trainer
from tokenizers.processors import TemplateProcessing
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from recipes.config.schema import ModelConfig, ScratchConfig
from recipes.models import load as models
from recipes.models.generation import (
    UNCUT,
    Sampling,
    _generation_config,
    by_trainer,
    by_transformers,
    encode,
    token_ids,
)
from recipes.models.tokenizers import character_tokenizer
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
    loaded[
        1
    ].padding_side = "right"  # as many a saved tokenizer has it; a completion follows its prompt all the same
    batch = encode(loaded[1], PROMPTS)
    assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1]
    kept = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
    assert token_ids(loaded[1], PROMPTS) == kept


@pytest.mark.parametrize("plain", [True, False])
def test_a_prompt_begins_once(plain):
    """A tokenizer that begins every text with a token of its own does not where the chat template writes it."""
    tokenizer = character_tokenizer("0123456789+-*=>^")
    begin = tokenizer.convert_tokens_to_ids("^")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="^ $A", special_tokens=[("^", begin)]
    )
    tokenizer.chat_template = "^{{ messages[0].content }}"
    prompt = "1>" if plain else [{"role": "user", "content": "1>"}]
    expected = [begin, *tokenizer("1>", add_special_tokens=False).input_ids]
    assert token_ids(tokenizer, [prompt]) == [expected] == encode(tokenizer, [prompt])["input_ids"].tolist()


@pytest.mark.parametrize(
    ("rows", "samples", "cache", "batch"),
    [(3, 1, "static", 3), (2, 1, None, 3), (5, 1, "static", 5), (7, 2, "static", 3), (5, 2, None, 3)],
)
def test_a_batch_has_the_kept_cache_up_to_its_rows(loaded, monkeypatch, rows, samples, cache, batch):
    """Three prompts, each completed so often."""
    model, tokenizer = loaded
    asked = []

    def generate(input_ids, generation_config, **_):
        asked.append((generation_config.cache_implementation, len(input_ids)))
        return input_ids.repeat_interleave(samples, 0)

    monkeypatch.setattr(model, "generate", generate)
    sampling = Sampling(4, samples=samples, temperature=1.0)
    found = by_transformers(model, tokenizer, kept_rows=rows)(PROMPTS, sampling)
    assert asked == [(cache, batch)]
    assert [len(texts) for texts in found] == [samples] * 3


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


WHOLE = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}  # of the distribution nothing is cut off


class Engine:
    """vLLM as TRL drives it: what it samples with is read from its attributes at each call."""

    def __init__(self):
        self.top_p, self.top_k, self.min_p, self.repetition_penalty = 0.5, 9, 0.1, 1.3
        self.temperature, self.max_completion_length = 1.2, 77
        self.synced, self.seen = 0, []

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations):
        names = (*WHOLE, "temperature", "max_completion_length")
        self.seen.append(({name: getattr(self, name) for name in names}, prompts, num_generations))
        if prompts[0] == "broken":
            raise RuntimeError
        return None, [[5] for _ in prompts], None, None


def trainer_with(engine, tokenizer):
    return SimpleNamespace(
        use_vllm=True, vllm_generation=engine, processing_class=tokenizer, chat_template_kwargs={},
        state=SimpleNamespace(global_step=4), _last_loaded_step=3,
    )  # fmt: skip


def test_an_evaluation_by_vllm_is_of_the_weights_as_they_are_and_of_the_whole_distribution():
    engine, tokenizer = Engine(), character_tokenizer("0123456789+-*=>")
    trainer = trainer_with(engine, tokenizer)
    generate, before = by_trainer(trainer), {**vars(engine)}
    answers = generate(["1>", "22>"], Sampling(6, 2, 0.7))
    assert [len(group) for group in answers] == [2, 2]
    (told, prompts, group), *_ = engine.seen
    assert told == {**WHOLE, "temperature": 0.7, "max_completion_length": 6}
    assert prompts == [tokenizer("1>").input_ids] * 2 + [tokenizer("22>").input_ids] * 2
    assert group == 2
    assert (engine.synced, trainer._last_loaded_step) == (1, 4)
    generate(["1>"], Sampling(6))
    assert engine.seen[1][0] == {**WHOLE, "temperature": 0.0, "max_completion_length": 6}
    assert engine.synced == 1  # no step was taken in between
    trainer.state.global_step = 5
    generate(["1>"], Sampling(6))
    assert engine.synced == 2
    assert {name: getattr(engine, name) for name in told} == {name: before[name] for name in told}


def test_an_evaluation_by_vllm_renders_prompts_as_the_run_does():
    engine, tokenizer = Engine(), character_tokenizer("0123456789+-*=>")
    tokenizer.chat_template = "{{ messages[0].content }}{{ '=' if thinking else '>' }}"
    trainer = trainer_with(engine, tokenizer)
    trainer.chat_template_kwargs = {"thinking": True}
    by_trainer(trainer)([[{"role": "user", "content": "1"}]], Sampling(6))
    assert engine.seen[0][1] == [tokenizer("1=").input_ids]


def test_what_the_trainer_samples_with_is_put_back_after_a_failure(monkeypatch):
    engine, tokenizer = Engine(), character_tokenizer("0123456789+-*=>")
    before = {**vars(engine)}
    monkeypatch.setattr("recipes.models.generation.token_ids", lambda *_: ["broken"])
    with pytest.raises(RuntimeError):
        by_trainer(trainer_with(engine, tokenizer))(["1>"], Sampling(6))
    assert (engine.top_p, engine.temperature) == (before["top_p"], before["temperature"])


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        (Sampling(6), {"do_sample": False, "max_new_tokens": 6, "repetition_penalty": 1.0}),
        (
            Sampling(6, 3, 0.7),
            {**WHOLE, "do_sample": True, "max_new_tokens": 6, "temperature": 0.7, "num_return_sequences": 3},
        ),
    ],
)
def test_what_transformers_is_told(sampling, told):
    """A checkpoint's own settings (Qwen2.5: top-k 20, a repetition penalty) would fill what is left out."""
    tokenizer = character_tokenizer("0123456789+-*=>")
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 1]))
    found = _generation_config(model, tokenizer, sampling)
    assert {name: getattr(found, name) for name in told} == told
    assert found.pad_token_id == 0
    assert found.eos_token_id == [1, 7]
