"""The plan's formulas against bytes counted on small real models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recipes.plan import formulas as memory
from recipes.plan.formulas import Batch, Group, Precision
from recipes.plan.shapes import ModelShape

SIZES = {
    "vocab_size": 103,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
}
MODELS = {
    "llama, grouped keys": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
    "llama, tied, wide heads": {
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "qwen2, biases": {
        "model_type": "qwen2",
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "qwen3, norms of heads": {
        "model_type": "qwen3",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "mistral": {"model_type": "mistral", "num_attention_heads": 4, "num_key_value_heads": 2},
    "granite": {"model_type": "granite", "num_attention_heads": 4, "num_key_value_heads": 2},
    "smollm3": {"model_type": "smollm3", "num_attention_heads": 4, "num_key_value_heads": 2},
}
WITHOUT_LAYERS = {  # whose layers no formula covers, all else does
    "gpt2": {"model_type": "gpt2", "num_attention_heads": 4},
    "gemma3, windows": {
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3, experts": {
        "model_type": "qwen3_moe",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}
ANY = {**MODELS, **WITHOUT_LAYERS}
B, T = 3, 20


def build(name, dtype, rank=0):
    config = AutoConfig.for_model(**SIZES, **ANY[name], bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    shape = ModelShape.of(model)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    return model, shape


def size_of(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("name", ANY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 8])
def test_parameters_gradients_and_optimizer(name, dtype, rank):
    model, shape = build(name, dtype, rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    element = 4 if rank else dtype.itemsize
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert size_of(frozen or trained) == memory.weight_bytes(shape, Precision(dtype.itemsize, dtype.itemsize))
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert size_of([p.grad for p in trained]) == count * element
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert size_of(states) == memory.optimizer_bytes(count, element, "adamw_torch_fused")[0]


def count(tensors):
    """Bytes of the elements: a window is a view of a little more."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@pytest.mark.parametrize("name", ANY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kv_cache(name, dtype):
    model, shape = build(name, dtype)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for token in torch.zeros(B, T, 1, dtype=torch.long).unbind(1):
            model(token, past_key_values=cache)
    held = count([t for layer in cache.layers for t in (layer.keys, layer.values)])
    assert held == memory.kv_cache_bytes(shape, B, T, dtype.itemsize)


def test_a_cache_that_grows_keeps_float32_under_autocast():
    """Seen on a GPU: 13.0 GiB of sampling where 9.5 were planned."""
    model, shape = build("mistral", torch.float32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(B, T, dtype=torch.long), past_key_values=cache)
    held = count([t for layer in cache.layers for t in (layer.keys, layer.values)])
    assert held == memory.kv_cache_bytes(shape, B, T, 4)


def saved_bytes(model, padded):
    """What autograd keeps of the transformer of a padded batch."""
    ids, mask = torch.randint(0, 100, (B, T)), torch.ones(B, T, dtype=torch.long)
    mask[0, : 5 if padded else 0] = 0
    return saved_in(model, input_ids=ids, attention_mask=mask)


def saved_in(model, **inputs):
    """What autograd keeps of the transformer without the head, parameters and `seen` aside."""
    indices = [inputs["seen"]] if "seen" in inputs else []
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *indices)}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor)
        return tensor

    backbone = model.get_base_model().model if hasattr(model, "peft_config") else model.model
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone(**inputs, use_cache=False)
    return size_of(kept)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_activations(name, dtype, rank, padded):
    model, shape = build(name, dtype, rank)
    planned = planned_bytes(shape, dtype, Batch.padded(B, T - 4, 4, mask=padded), rank)
    assert saved_bytes(model, padded) == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_keeps_the_layers_inputs(name):
    model, shape = build(name, torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    precision = Precision(4, 4)
    inputs = shape.layers * B * T * 4 * shape.hidden
    ends = memory.ends_bytes(shape.hidden, shape.layer, precision, Batch.padded(B, T - 4, 4), trained=True)
    assert saved_bytes(model, padded=True) == pytest.approx(inputs + ends, rel=0.1)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_inputs_of_layers_under_autocast(name, dtype, rank):
    """As checkpoints keep them: the difference that a layer makes, so that nothing beside the layers is in it."""

    def kept(layers):
        sizes = {**SIZES, "num_hidden_layers": layers}
        config = AutoConfig.for_model(**sizes, **MODELS[name], bos_token_id=1, eos_token_id=2)
        model = AutoModelForCausalLM.from_config(config).to(dtype).train()
        shape = ModelShape.of(model)
        if rank:
            model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
            model.enable_input_require_grads()  # as TRL does
        model.gradient_checkpointing_enable({"use_reentrant": False})
        precision = Precision(dtype.itemsize, 2, autocast=True)
        planned = memory.activation_bytes(
            shape, precision, Batch.padded(B, T - 4, 4, mask=False), r=rank, checkpointing=True
        )
        with torch.autocast("cpu", torch.bfloat16):
            return saved_bytes(model, padded=False), planned

    (few, planned_few), (many, planned_many) = kept(2), kept(5)
    assert many - few == planned_many - planned_few == 3 * B * T * 48 * dtype.itemsize


@pytest.mark.parametrize("name", WITHOUT_LAYERS)
def test_layers_without_a_formula_count_their_inputs_alone(name):
    _, shape = build(name, torch.float32)
    assert shape.layer is None
    for way in (True, False):
        found = memory.activation_bytes(
            shape, Precision(4, 4), Batch.padded(B, T - 4, 4), r=0, checkpointing=way
        )
        assert found == 3 * B * T * 48 * 4


class Varlen(torch.autograd.Function):
    """What torch's varlen_attn keeps for its backward pass, with its keys gathered before; it computes nothing."""

    @staticmethod
    def forward(ctx, query, key, value):
        out, log_sum_exp = query.clone(), torch.zeros(query.shape[:2])
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        return out


def gathered(module, query, key, value, attention_mask, **options):
    keys, values = (x[0].transpose(0, 1).index_select(0, options["seen"]) for x in (key, value))
    return Varlen.apply(query[0].transpose(0, 1).contiguous(), keys, values)[None], None


PROMPT, COMPLETION, GENERATIONS, GROUPS = 7, 4, 3, 2  # (7 + 3 · 3) tokens a row, 7 + 3 · (7 + 3) keys


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_activations_of_packed_groups_in_one_row(name, dtype, rank, monkeypatch):
    model, shape = build(name, dtype, rank)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "gathered", gathered)
    model.config._attn_implementation = "gathered"
    tokens, keys = GROUPS * 16, GROUPS * 37
    inputs = {
        "input_ids": torch.zeros(1, tokens, dtype=torch.long),
        "position_ids": torch.arange(tokens)[None],
    }
    seen = torch.arange(keys) % tokens
    found = saved_in(model, **inputs, attention_mask=torch.zeros(1, 1, 1, 1), seen=seen)
    batch = Group(PROMPT, COMPLETION, GENERATIONS).varlen(tokens)
    assert (batch.tokens, batch.keys, batch.scored) == (32, 74, 24)
    assert found == pytest.approx(planned_bytes(shape, dtype, batch, rank), rel=0.01)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_activations_of_packed_groups_a_row_each(name, dtype, rank):
    model, shape = build(name, dtype, rank)
    ids = torch.zeros(GROUPS, 16, dtype=torch.long)
    mask = torch.ones(16, 16, dtype=torch.bool).tril().expand(GROUPS, 1, 16, 16).clone()
    found = saved_in(model, input_ids=ids, position_ids=torch.arange(32).view(2, 16), attention_mask=mask)
    batch = Group(PROMPT, COMPLETION, GENERATIONS).dense(40)
    assert (batch.tokens, batch.mask, batch.scored) == (32, 2 * 16 * 16, 24)
    assert found == pytest.approx(planned_bytes(shape, dtype, batch, rank), rel=0.01)


def test_a_bin_smaller_than_a_group_is_a_part_of_it():
    group = Group(prompt=7, completion=4, generations=3)
    assert group.dense(8) == Batch(8, 6, 8, repeated=True, mask=64, angles=8)
    assert group.varlen(8) == Batch(8, 6, 19, repeated=False, mask=0, angles=8)


@pytest.mark.parametrize("varlen", [True, False])
@pytest.mark.parametrize("prompt", [2, 40])
@pytest.mark.parametrize("tokens", [30, 100, 1000])
def test_no_bin_takes_more_than_the_most(varlen, prompt, tokens):
    most = Group(prompt, 20, 8).most(tokens, varlen=varlen)
    for completion in range(1, 21):
        group = Group(prompt, completion, 8)
        batch = group.varlen(tokens) if varlen else group.dense(tokens)
        for field in ("tokens", "scored", "keys", "mask", "angles"):
            assert getattr(batch, field) <= getattr(most, field)


def planned_bytes(shape, dtype, batch, rank):
    precision = Precision(dtype.itemsize, dtype.itemsize)
    one = memory.layer_bytes(shape.hidden, shape.layer, precision, batch, r=rank)
    ends = memory.ends_bytes(shape.hidden, shape.layer, precision, batch, trained=not rank)
    return shape.layers * one + ends
