"""A model in half precision computed with in float32, a layer at a time: as if all of it were, and then as before."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model

from recipes.models.parts import in_float32, merged_once_rounded

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
MODELS = {
    "llama": t.LlamaConfig(**SMALL),
    "tied": t.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gemma3": t.Gemma3TextConfig(**SMALL, head_dim=8, query_pre_attn_scalar=8),
    "phi": t.PhiConfig(**SMALL),
    "experts": t.Qwen3MoeConfig(**SMALL, **EXPERTS),
    "gpt2": t.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64),
}
TOKENS = torch.arange(20)[None]


def model_of(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(MODELS[name]).to(dtype).eval()


def adapted(name: str, dtype: torch.dtype, **lora: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        model_of(name, dtype), LoraConfig(r=4, **{"target_modules": "all-linear", **lora})
    ).eval()
    for weight_name, weight in model.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


@contextmanager
def watched(model: Any, most: list[int]) -> Iterator[None]:
    """Notes how many bytes of the model's weights are float32 at once, whenever one of its modules begins."""

    def look(*_: Any) -> None:
        wide = {id(w): w.numel() * 4 for w in model.parameters() if w.dtype == torch.float32}
        most.append(sum(wide.values()))

    handles = [module.register_forward_pre_hook(look) for module in model.modules()]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_whole_model_in_float32(name, dtype):
    model = model_of(name, dtype)
    wanted = copy.deepcopy(model).float()(input_ids=TOKENS).logits
    weights = dict(model.named_parameters())
    before = {key: weight.data for key, weight in weights.items()}
    with in_float32(model):
        found = model(input_ids=TOKENS).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    for key, weight in model.named_parameters():
        assert weight is weights[key]
        assert weight.dtype == dtype
        assert weight.data_ptr() == before[key].data_ptr()
    assert model(input_ids=TOKENS).logits.dtype == dtype
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_no_more_than_one_layer_is_float32_at_once(name):
    model, most = model_of(name, torch.bfloat16), []
    with in_float32(model), watched(model, most):
        model(input_ids=TOKENS)
    stack = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    around = [*stack, model.get_input_embeddings()]
    largest = max(sum(4 * w.numel() for w in module.parameters()) for module in around)
    assert 0 < max(most) <= largest


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "experts", "gpt2"])
def test_so_are_those_with_an_adapter(name):
    lora = {"target_parameters": ["mlp.experts.gate_up_proj"]} if name == "experts" else {}
    model = adapted(name, torch.bfloat16, **lora)
    wanted = copy.deepcopy(model).float()(input_ids=TOKENS).logits
    with in_float32(model):
        assert torch.equal(model(input_ids=TOKENS).logits, wanted)
        with model.disable_adapter():
            assert not torch.equal(model(input_ids=TOKENS).logits, wanted)
    assert {w.dtype for key, w in model.named_parameters() if "lora" not in key} == {torch.bfloat16}


class Table(torch.nn.Module):
    """Computes with a buffer in half precision, and finds its rows by one of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(3, 4).half())
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("exact", torch.eye(4, dtype=torch.float64))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return (given @ self.table[self.order]).double() @ self.exact


def test_buffers_are_widened_too_if_they_are_in_half_precision():
    model, given = Table(), torch.randn(2, 3)
    with in_float32(model):
        found = model(given)
    assert torch.equal(found, (given @ model.table.float()[[2, 0, 1]]).double())
    assert [b.dtype for b in model.buffers()] == [torch.float16, torch.int64, torch.float64]


@torch.no_grad()
def test_weights_are_as_they_were_after_a_pass_that_fails():
    model = model_of("llama", torch.bfloat16)
    with in_float32(model), pytest.raises(IndexError):
        model(input_ids=TOKENS + 50)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama", "tied", "experts", "gpt2"])
def test_a_merge_is_that_of_the_whole_model_in_float32_rounded(name):
    lora = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = adapted(name, torch.bfloat16, **(lora if name == "experts" else {}))
    whole = copy.deepcopy(model).float().merge_and_unload(safe_merge=True)
    merged = merged_once_rounded(model)
    wanted = dict(whole.named_parameters())
    changed = dict(model_of(name, torch.bfloat16).named_parameters())
    for key, weight in merged.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, wanted.pop(key).bfloat16()), key
        changed[key] = bool((changed[key] != weight).any())
    assert not wanted
    assert any(changed.values())


def test_what_is_trained_beside_an_adapter_is_rounded_to_the_bases_dtype():
    """Whole layers and single tokens are trained in float32."""
    tokens = {"trainable_token_indices": {"embed_tokens": [3, 4]}}
    model = adapted("llama", torch.bfloat16, target_modules=["q_proj"], modules_to_save=["lm_head"], **tokens)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float() * 1.01
    whole = dict(copy.deepcopy(model).float().merge_and_unload().named_parameters())
    for key, weight in merged_once_rounded(model).named_parameters():
        assert torch.equal(weight, whole.pop(key).bfloat16()), key
        assert weight.dtype == torch.bfloat16
    assert not whole


def test_a_merge_widens_one_layer_at_a_time(monkeypatch):
    """Bytes of float32 weights of the base, seen whenever a layer is merged."""
    from peft.tuners.lora import layer

    model, most, merge = adapted("llama", torch.bfloat16), [], layer.Linear.merge

    def watching(self: Any, *args: Any, **options: Any) -> None:
        base = [w for key, w in model.named_parameters() if "lora_" not in key]
        most.append([w.numel() for w in base if w.dtype == torch.float32])
        merge(self, *args, **options)

    monkeypatch.setattr(layer.Linear, "merge", watching)
    merged_once_rounded(model)
    assert len(most) == 21
    assert {len(wide) for wide in most} == {1}
