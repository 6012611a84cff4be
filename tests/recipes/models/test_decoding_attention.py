"""One query over a static cache: torch's own attention, for every kind of heads and masks."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    GenerationConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from recipes.models.attention import take_away
from recipes.models.decoding_attention import PREFIX, _one_masked_query, decode, use_for_decoding


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decode(heads, key_heads, dtype):
    draw = torch.Generator().manual_seed(heads)
    query = torch.randn(3, heads, 1, 8, generator=draw, dtype=torch.float64).to(dtype)
    key, value = torch.randn(2, 3, key_heads, 11, 8, generator=draw, dtype=torch.float64).to(dtype)
    sees = torch.rand(3, 1, 1, 11, generator=draw) < 0.6
    repeated = (x.double().repeat_interleave(heads // key_heads, 1) for x in (key, value))
    expected = scaled_dot_product_attention(query.double(), *repeated, attn_mask=sees, scale=0.3)
    found = decode(query, key, value, sees, 0.3)
    assert found.dtype == dtype
    error = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=error, rtol=error)


def test_a_query_that_sees_nothing_reads_zeros():
    state = torch.ones(1, 1, 1, 4)
    assert not decode(state, state, state, torch.zeros(1, 1, 1, 1, dtype=torch.bool), 1.0).any()


SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SMALL |= {"num_key_value_heads": 2, "initializer_range": 0.3}
MODELS = {
    "Llama": LlamaConfig(**SMALL),
    "Mistral, window of 5": MistralConfig(**SMALL, sliding_window=5),
    "Qwen3": Qwen3Config(**SMALL, head_dim=16),
    "Granite, scores by a factor of its own": GraniteConfig(**SMALL, attention_multiplier=0.9),
}


def complete(model):
    ids = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    config = GenerationConfig(
        max_new_tokens=12, min_new_tokens=12, pad_token_id=0, eos_token_id=1, cache_implementation="static"
    )
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def counted(*given):
        seen.append(given[0].shape)
        return decode(*given)

    monkeypatch.setattr("recipes.models.decoding_attention.decode", counted)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_greedy_completions_stay(name, calls):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float64).eval()
    before = complete(model)
    use_for_decoding(model)
    use_for_decoding(model)  # twice is once
    assert model.config._attn_implementation == f"{PREFIX}sdpa"
    assert torch.equal(complete(model), before)
    assert len(calls) == 2 * 11  # layers × decoding steps; the prompts take the attention of before
    padding = torch.tensor([[1], [0], [1]])  # one query under a mask, but with a gradient: as before
    assert model(input_ids=before[:, :1], attention_mask=padding).logits.requires_grad
    assert len(calls) == 2 * 11


def test_of_a_model_that_sees_too_the_text_alone_has_another_attention():
    config = Gemma3Config()
    config._attn_implementation = {"": "sdpa", "text_config": "sdpa", "vision_config": "eager"}
    model = SimpleNamespace(config=config)
    use_for_decoding(model)
    assert config.text_config._attn_implementation == f"{PREFIX}sdpa"
    assert config.vision_config._attn_implementation == "eager"
    take_away(model, PREFIX)
    assert config.text_config._attn_implementation == "sdpa"


def test_what_it_cannot_do_goes_to_the_attention_of_before(calls):
    torch.manual_seed(0)
    softcapped = Gemma2Config(**SMALL, head_dim=16, attn_logit_softcapping=2.0)
    model = AutoModelForCausalLM.from_config(
        softcapped, dtype=torch.float64, attn_implementation="sdpa"
    ).eval()
    use_for_decoding(model)
    complete(model)
    assert not calls
    plain = AutoModelForCausalLM.from_config(
        MODELS["Llama"], dtype=torch.float64, attn_implementation="eager"
    )
    before = complete(plain.eval())
    use_for_decoding(plain)
    assert torch.equal(complete(plain), before)  # whose mask is added, not of booleans
    assert not calls
    with torch.no_grad():
        flat = torch.ones(3, 11, dtype=torch.bool)  # as flash attention takes it: a row's padding
        assert not _one_masked_query(torch.ones(3, 4, 1, 8), flat)
        assert _one_masked_query(torch.ones(3, 4, 1, 8), flat[:, None, None])
