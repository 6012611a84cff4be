"""What attention over packed rows is made of, apart from a model."""

from __future__ import annotations

import functools

import pytest
import torch
from rollouts import rollout
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.models.decoding_attention import use_for_decoding
from recipes.training.packed_attention import gather, masks, use_varlen
from recipes.training.packing import VarlenKeys, measure, pack
from recipes.training.rollout import padded


def layout() -> tuple[int, VarlenKeys]:
    """Tokens of a packed row, and its keys: each prompt is seen by itself and by six completions or more."""
    batch = padded(rollout("shared", "none", size=8))
    lengths = measure(batch)
    found = pack(batch, lengths, lengths.completion.nonzero()[:, 0].tolist(), one_row=True)
    assert found.varlen is not None
    return found.tokens, found.varlen


def gradient_of_gather(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of random upstream gradients; the same summed token by token in float64, and in `dtype`."""
    count, keys = layout()
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, count, 8, generator=draw).to(dtype).transpose(0, 1).requires_grad_()
    upstream = torch.randn(len(keys.keys), 2, 8, generator=draw).to(dtype)
    found = gather(tokens, keys)
    assert torch.equal(found, tokens[keys.keys])
    (gradient,) = torch.autograd.grad(found, tokens, upstream)
    copies = [upstream[keys.keys == token] for token in range(count)]
    one_by_one = [functools.reduce(torch.add, copy) for copy in copies]
    return gradient, torch.stack([copy.double().sum(0) for copy in copies]), torch.stack(one_by_one)


def test_gathered_keys_have_the_sum_of_their_copies_gradients():
    gradient, expected, _ = gradient_of_gather(torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=1e-14)


def test_their_gradient_is_rounded_once():
    """It is off by half a unit in the last place of bfloat16 at most; added up in bfloat16 it would be by more."""
    count, keys = layout()
    assert keys.keys.bincount(minlength=count).max() >= 7
    gradient, expected, in_sixteen = gradient_of_gather(torch.bfloat16)

    def off(found: torch.Tensor) -> float:
        return float(((found.double() - expected).abs() / expected.abs()).max())

    assert gradient.dtype == torch.bfloat16
    assert off(gradient) <= 2**-8 < off(in_sixteen)


@pytest.mark.parametrize(("own", "dtype"), [("eager", torch.float32), ("sdpa", torch.bool)])
def test_a_mask_is_the_kind_that_the_models_own_attention_takes_whatever_is_put_before_it(own, dtype):
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = LlamaForCausalLM._from_config(LlamaConfig(vocab_size=9, **shape), attn_implementation=own)
    batch = padded(rollout("shared", "none", size=8))
    lengths = measure(batch)
    packed = pack(batch, lengths, lengths.completion.nonzero()[:, 0].tolist(), one_row=False)
    expected = masks(packed, model.config, torch.float32)
    assert expected.dtype == dtype
    for put_before in (use_varlen, use_for_decoding):
        put_before(model)
        assert torch.equal(masks(packed, model.config, torch.float32), expected)
    assert model.config._attn_implementation == f"decoding_packed_{own}"
