"""Muon beside AdamW: what each parameter gets, and that the iteration makes matrices orthogonal."""

import pytest
import torch

from recipes import models
from recipes.config_schema import ScratchConfig
from recipes.muon import MuonAdamW, muon_adamw, orthogonalize
from recipes.tasks import countdown


@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 16, 40), (3, 40, 16)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_keeps_the_singular_directions():
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(8, 8))
    v, _ = torch.linalg.qr(torch.randn(8, 8))
    found = orthogonalize((u @ torch.diag(torch.linspace(0.5, 2, 8)) @ v.T)[None])[0]
    inside = u.T @ found @ v
    assert torch.allclose(inside, torch.diag(inside.diagonal()), atol=1e-4)


def test_the_other_group_is_torchs_adamw():
    torch.manual_seed(0)
    ours, theirs = torch.randn(5, requires_grad=True), None
    theirs = ours.detach().clone().requires_grad_()
    first = MuonAdamW([], [ours], matrix_learning_rate=1.0, learning_rate=1e-2, weight_decay=0.1)
    second = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        gradient = torch.randn(5)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        first.step()
        second.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_embeddings_head_and_norms_are_left_to_adamw():
    shape = ScratchConfig(hidden_size=16, layers=1, intermediate_size=16)
    model = models.scratch_llama(shape, models.character_tokenizer(countdown.CHARACTERS), seed=0)
    optimizer = muon_adamw(model, matrix_learning_rate=0.02, learning_rate=1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, others = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert len(matrices) == 7
    assert all("layers.0" in name and "proj" in name for name in matrices)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(others)
    assert len(matrices) + len(others) == len(names)
