"""In bfloat16 the packed step's gradient is as far from float32's as TRL's padded way is, within a twentieth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rollouts import SMALL, Fed, PackedFed, rollout, run, trainer_of, varlen_by_segment
from torch import Tensor
from torch.nn.attention import varlen
from transformers import LlamaConfig, LlamaForCausalLM

from memhead.integrations import trl as memhead_trl
from recipes.models.load import character_tokenizer
from recipes.training.packed_attention import use_varlen

SEEDS = range(4)
WIDER = SMALL | {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}


def in_float32_inside(query: Tensor, key: Tensor, value: Tensor, *ends: Any, **options: Any) -> Tensor:
    """torch's varlen_attn: it takes and gives 16 bits, and computes in 32."""
    return varlen_by_segment(query.float(), key.float(), value.float(), *ends, **options).to(query.dtype)


def gradient(trainer: Any, fed: dict[str, Any]) -> Tensor:
    """Of one accumulation window, every parameter in one vector."""
    return torch.cat([g.flatten() for g in run(trainer, fed, 1)[0].gradients.values()])


@pytest.mark.parametrize("one_row", [False, True], ids=["a-row-a-group", "one-row"])
def test_the_error_of_the_gradient(tmp_path, monkeypatch, one_row):
    """16 groups of 8, so that the error is a mean over enough roundings to be told from chance."""
    monkeypatch.setattr(varlen, "varlen_attn", in_float32_inside)
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**WIDER))
    tokenizer = character_tokenizer("0123456789+-*=>abcdef")
    with memhead_trl.install():
        in_float32 = trainer_of(Fed, model, tmp_path, tokenizer)
        padded = trainer_of(Fed, model, tmp_path, tokenizer, bf16=True)
        packed = trainer_of(PackedFed, model, tmp_path, tokenizer, bf16=True)
        if one_row:
            packed._varlen = True
            use_varlen(model)
        errors: dict[Any, list[Tensor]] = {padded: [], packed: []}
        for seed in SEEDS:
            fed = rollout("shared", "none", seed=seed, size=8, groups=16)
            fed["advantages"] = fed["advantages"].float()
            exact = gradient(in_float32, fed)
            for trainer, found in errors.items():
                found.append((gradient(trainer, fed) - exact).norm() / exact.norm())
    theirs, ours = (torch.stack(found).mean() for found in errors.values())
    assert 5e-3 < theirs < 0.05  # bfloat16 it is: float32 would be off by 1e-6
    assert 5e-3 < ours <= 1.05 * theirs + 2e-4
