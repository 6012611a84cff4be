"""What a compiled layer keeps for the backward pass, by PyTorch's own partitioner, against the formula."""

from __future__ import annotations

import pytest
import torch
from test_formulas import build, size_of
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recipes.models.compiled import compile_layers
from recipes.plan import formulas as memory
from recipes.plan.formulas import Group, Precision

TOKENS, KEYS, RANK = 32, 74, 8  # two groups of a prompt of 7 tokens and three completions of 4


@torch.library.custom_op("test_compiled_formula::varlen", mutates_args=())
def varlen(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(T, heads, D) and the log-sum-exp (heads, T), as torch's varlen_attn; it computes nothing."""
    return torch.zeros_like(query), torch.zeros(query.shape[1], query.shape[0])


@torch.library.custom_op("test_compiled_formula::varlen_backward", mutates_args=())
def varlen_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward pass reads."""
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


varlen.register_fake(
    lambda query, key, value: (torch.empty_like(query), query.new_empty(query.shape[1::-1]).float())
)
varlen_backward.register_fake(lambda gradient, q, k, v, *rest: tuple(torch.empty_like(x) for x in (q, k, v)))
varlen.register_autograd(
    lambda ctx, gradient, of_sum: varlen_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def gathered(module, query, key, value, attention_mask, **options):
    query, key, value = (x.bfloat16() for x in (query, key, value))
    keys, values = (x[0].transpose(0, 1).index_select(0, options["seen"]) for x in (key, value))
    return varlen(query[0].transpose(0, 1).contiguous(), keys, values)[0][None], None


@pytest.mark.parametrize(
    ("name", "dtype", "rank"),
    [("llama, grouped keys", torch.float32, 0), ("qwen3, norms of heads", torch.bfloat16, RANK)],
    ids=["full", "LoRA"],
)
def test_what_a_compiled_layer_keeps(name, dtype, rank, monkeypatch):
    torch._dynamo.reset()
    model, shape = build(name, dtype, rank)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "gathered", gathered)
    model.config._attn_implementation = "gathered"
    backbone = model.get_base_model().model if rank else model.model
    seen = torch.arange(KEYS) % TOKENS
    hidden = torch.zeros(1, TOKENS, shape.hidden, dtype=dtype)
    positions = torch.arange(TOKENS)[None]
    angles = backbone.rotary_emb(hidden, positions)
    compile_layers(backbone, "aot_eager_decomp_partition")
    layer, kept = backbone.layers[1], []

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return layer(
                hidden, position_embeddings=angles, attention_mask=torch.zeros(1, 1, 1, 1), seen=seen
            )

    run().float().sum().backward()  # which compiles
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run()
    weights = {tuple(p.shape)[::way] for p in layer.parameters() for way in (1, -1)}  # and their casts
    aside = {x.untyped_storage().data_ptr() for x in (seen, *angles)}
    own = [t for t in kept if tuple(t.shape) not in weights and t.untyped_storage().data_ptr() not in aside]
    precision = Precision(dtype.itemsize, 2, autocast=True)
    planned = memory.compiled_layer_bytes(
        shape.hidden, shape.layer, precision, Group(7, 4, 3).varlen(TOKENS), r=rank
    )
    assert size_of(own) == pytest.approx(planned, rel=0.01)
