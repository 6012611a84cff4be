"""Cases for test_unsloth.py: our packed row through the layers that Unsloth puts in transformers' place, on the CPU.

TRITON_INTERPRET=1 runs Unsloth's Triton kernels. FlexAttention, to which its attention hands such rows, computes values
on a CPU and no gradients; for those a dense mask by the same rule stands in. Last in its process, because transformers'
classes stay Unsloth's; the cases before it import unsloth.
"""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from trl.trainer.utils import add_fused_lm_head
from unsloth.kernels import rope_embedding
from unsloth.models import llama, mistral, qwen2, qwen3
from unsloth.utils import attention_dispatch, prefix_grouper_kernel

from memhead.integrations import trl as memhead_trl
from recipes.plan.shapes import CacheLayer, sizes
from recipes.training.packed_forward import only_states
from recipes.training.packed_unsloth import ARCHITECTURES, PackedUnsloth
from recipes.training.packing import PaddedBatch, measure, pack

GROUPS, SIZE, PROMPT, COMPLETION, HEAD_SIZE = 2, 3, 7, 6, 8
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 4 * HEAD_SIZE,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # far from uniform, so that a key too many shows
    "attn_implementation": "sdpa",
}
ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
# Config, transformers' module, what Unsloth puts into it.
FAMILIES = {
    "llama": (LlamaConfig(**SHAPE), modeling_llama, llama.FastLlamaModel),
    "mistral": (MistralConfig(**SHAPE, sliding_window=None), modeling_mistral, mistral.FastMistralModel),
    "qwen2": (Qwen2Config(**SHAPE), modeling_qwen2, qwen2.FastQwen2Model),
    "qwen3": (Qwen3Config(**SHAPE, head_dim=HEAD_SIZE), modeling_qwen3, qwen3.FastQwen3Model),
}


def padded_batch():
    ids = torch.zeros(GROUPS * SIZE, PROMPT + COMPLETION, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for group in range(GROUPS):
        begin = int(torch.randint(0, PROMPT - 2, ()))
        ids[group * SIZE : (group + 1) * SIZE, begin:PROMPT] = torch.randint(2, 97, (PROMPT - begin,))
        for row in range(group * SIZE, (group + 1) * SIZE):
            end = PROMPT + int(torch.randint(1, COMPLETION + 1, ()))
            ids[row, PROMPT:end] = torch.randint(2, 97, (end - PROMPT,))
            mask[row, begin:end] = 1
    return PaddedBatch(ids, mask, COMPLETION)


def full_logps(model, batch):
    """(B, K) by transformers' model on padded rows."""
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits
    logps = logits[:, PROMPT - 1 : -1].log_softmax(-1).gather(-1, batch.input_ids[:, PROMPT:, None])[..., 0]
    return logps * batch.attention_mask[:, PROMPT:]


def packed_logps(model, batch, packed, layout):
    """(B, K) by PackedForward's way, but for how attention is told."""
    tokens = batch.input_ids.flatten()
    with only_states(model.base_model, packed.states):
        found = model(
            input_ids=tokens[packed.source],
            position_ids=packed.positions,
            shift_labels=tokens[packed.targets][None],
            fused_lm_head=True,
            prefix_seg_info=layout,
        ).log_probs[0]
    shape = len(batch.input_ids), COMPLETION
    return found.new_zeros(shape[0] * shape[1]).index_copy(0, packed.scores, found).view(shape)


def dense(q, k, v, layout, scale=None):
    """What FlexAttention is asked for, (1, T, heads, D)."""
    rule = prefix_grouper_kernel._make_mask_mod(layout.group_of_kv, layout.is_prefix, layout.suffix_of_kv)
    visible = create_mask(rule, 1, 1, layout.T, layout.T, "cpu")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, enable_gqa=True, scale=scale
    ).transpose(1, 2)


def rotary_table(self, length, device=None):
    """Unsloth's lies on a GPU."""
    frequencies = 10000.0 ** (-torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    angles = torch.outer(torch.arange(SHAPE["max_position_embeddings"]).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def take_unsloths_layers(monkeypatch, modeling, fast):
    """Put Unsloth's code into transformers' classes, less what asks for a GPU."""
    own = sys.modules[fast.__module__]
    fast.pre_patch()
    for module in (llama, own):
        if hasattr(module, "get_current_device"):
            monkeypatch.setattr(module, "get_current_device", lambda: "cpu")
    monkeypatch.setattr(llama.LlamaRotaryEmbedding, "get_cached", rotary_table)
    monkeypatch.setattr(llama.LlamaRotaryEmbedding, "extend_rope_embedding", lambda *_, **__: None)
    monkeypatch.setattr(rope_embedding, "_eviction_hints_ok", lambda device: False)
    (attention,) = (kind for name, kind in vars(modeling).items() if name in ATTENTIONS)
    assert attention.forward.__module__.startswith("unsloth.")


def test_of_every_family_that_is_packed():
    assert set(FAMILIES) == ARCHITECTURES


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_row_through_unsloths_layers(monkeypatch, name):
    """Values by its FlexAttention, and gradients by the stand-in, equal full logits on padded rows."""
    torch.manual_seed(0)
    config, modeling, fast = FAMILIES[name]
    plain, batch = AutoModelForCausalLM.from_config(config), padded_batch()
    expected = full_logps(plain, batch)
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    rows = torch.randperm(GROUPS * SIZE).tolist()  # groups in pieces
    packed = pack(batch, measure(batch), rows, one_row=True)
    layout = PackedUnsloth.attention_arguments(None, packed, None)["prefix_seg_info"]

    take_unsloths_layers(monkeypatch, modeling, fast)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(plain.state_dict())
    for layer in model.model.layers:  # as Unsloth's loader does
        layer.self_attn.rotary_emb = model.model.rotary_emb
    add_fused_lm_head(model)
    flex = functools.partial(prefix_grouper_kernel.flex_shared_prefix_attention, compiled=False)
    with memhead_trl.install() as handle:
        monkeypatch.setattr(attention_dispatch, "_flex_shared_prefix_attention", flex)
        with torch.no_grad():
            found = packed_logps(model, batch, packed, layout)
        torch.testing.assert_close(found, expected.detach(), rtol=0.0, atol=1e-5)
        # What the start-up check compares with.
        with torch.no_grad():
            padded = PackedUnsloth.padded_logps(SimpleNamespace(_causal_model=lambda m: m), model, batch)
        padded *= batch.attention_mask[:, PROMPT:]
        torch.testing.assert_close(padded, expected.detach(), rtol=0.0, atol=1e-5)
        with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
            packed_logps(model, batch, packed, layout)

        monkeypatch.setattr(attention_dispatch, "_flex_shared_prefix_attention", dense)
        (packed_logps(model, batch, packed, layout) * weights).sum().backward()
    assert handle.calls == 2 + GROUPS
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_models_sizes_are_counted_without_unsloths_kernels(monkeypatch, name):
    """After the others, for the classes stay Unsloth's, whose kernels would read a meta tensor at address 0."""
    config, modeling, fast = FAMILIES[name]
    take_unsloths_layers(monkeypatch, modeling, fast)

    def run(*_, **__):
        raise AssertionError("a model on the meta device is run")

    monkeypatch.setattr(torch.nn.Module, "__call__", run)
    shape, _ = sizes(config, None)
    assert shape.cache == (CacheLayer(width=2 * SHAPE["num_key_value_heads"] * HEAD_SIZE),)
    assert shape.layer is not None
