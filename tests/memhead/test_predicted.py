"""predicted_tokens is the argmax of full logits, and agrees with is_top1."""

import pytest
import torch

from memhead import linear_logprobs, planning, predicted, predicted_tokens
from tests.memhead.reference import double, make_head


@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_argmax_over_many_tiles(monkeypatch, scale, biased):
    monkeypatch.setattr(predicted, "default_tile", lambda *_: planning.Chunk(64, 50))
    head = make_head(157, 211)
    bias = head.bias.clone() if biased else None
    if biased:
        bias[7] = float("-inf")
    hidden, weight = double(head.hidden), double(head.weight)
    logits = scale * (hidden @ weight.T + (0 if bias is None else double(bias)))
    found = predicted_tokens(hidden, weight, bias=None if bias is None else double(bias), logit_scale=scale)
    assert torch.equal(found, logits.argmax(-1))


def test_agrees_with_is_top1_and_keeps_the_shape():
    head = make_head(60, 211)
    hidden = head.hidden.view(3, 20, -1).requires_grad_()
    tokens = predicted_tokens(hidden, head.weight)
    assert tokens.shape == (3, 20)
    assert not tokens.requires_grad
    assert linear_logprobs(hidden, head.weight, tokens, extra_outputs=["is_top1"]).is_top1.all()
    others = (tokens + 1) % 211
    assert not linear_logprobs(hidden, head.weight, others, extra_outputs=["is_top1"]).is_top1.any()


def test_the_first_of_equals_and_no_rows(monkeypatch):
    monkeypatch.setattr(predicted, "default_tile", lambda *_: planning.Chunk(64, 50))  # equals in ten tiles
    weight = torch.ones(500, 8)
    assert not predicted_tokens(torch.ones(5, 8), weight).any()
    assert predicted_tokens(torch.ones(0, 8), weight).shape == (0,)
