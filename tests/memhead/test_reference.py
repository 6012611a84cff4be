"""The reference itself, compared with torch's own functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical

from memhead import LowRankUpdate
from memhead.reference import full_logits, full_logprobs
from tests.memhead.reference import make_head

HEAD = make_head(12, 31)
EXTRA = ("log_sum_sq_probs", "mean_logits", "is_top1")


def test_every_option_and_output():
    shape = (3, 4)
    update = LowRankUpdate(torch.randn(2, 24), torch.randn(31, 2), 0.5)
    result = full_logprobs(
        HEAD.hidden.view(*shape, -1), HEAD.weight, HEAD.targets.view(shape), bias=HEAD.bias,
        mask=HEAD.mask.view(shape), temperature=HEAD.temperature.view(shape), softcap=5.0, logit_scale=0.35,
        low_rank=update, entropy=True, extra_outputs=EXTRA, dtype=torch.float64,
    )  # fmt: skip
    merged = HEAD.weight.double() + 0.5 * update.b.double() @ update.a.double()
    capped = 5.0 * torch.tanh(0.35 * (HEAD.hidden.double() @ merged.t() + HEAD.bias.double()) / 5.0)
    logits = capped / HEAD.temperature.double()[:, None]
    expected = [
        -F.cross_entropy(logits, HEAD.targets, reduction="none"),
        Categorical(logits=logits).entropy(),
        logits.softmax(-1).square().sum(-1).log(),
        logits.mean(-1),
        logits.argmax(-1) == HEAD.targets,
    ]
    for value, plain in zip(result, expected, strict=True):
        assert value.dtype == plain.dtype
        torch.testing.assert_close(value.flatten(), plain.masked_fill(~HEAD.mask, 0))


def test_what_is_not_asked_for_is_none():
    assert full_logprobs(HEAD.hidden, HEAD.weight, HEAD.targets)[1:] == (None,) * 4


def test_masked_targets_may_be_no_tokens():
    targets = torch.where(HEAD.mask, HEAD.targets, -100)
    assert not full_logprobs(HEAD.hidden, HEAD.weight, targets, mask=HEAD.mask).logprobs[~HEAD.mask].any()


def test_a_forbidden_token_has_no_entropy_and_no_gradient():
    hidden, bias = HEAD.hidden.double().requires_grad_(), HEAD.bias.double()
    bias[3] = float("-inf")
    weight = HEAD.weight.double()
    targets = torch.where(HEAD.targets == 3, 4, HEAD.targets)
    entropy = full_logprobs(hidden, weight, targets, bias=bias, entropy=True).entropy
    allowed = torch.arange(31) != 3
    expected = Categorical(logits=hidden @ weight[allowed].t() + bias[allowed]).entropy()
    torch.testing.assert_close(entropy, expected)
    grads = [torch.autograd.grad((10 * y).sum(), hidden)[0] for y in (entropy, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    hidden, weight = HEAD.hidden.to(dtype), HEAD.weight.to(dtype)
    product = F.linear(hidden, weight)
    assert torch.equal(full_logits(hidden, weight), product.float())
    assert torch.equal(full_logits(hidden, weight, widen=False), product)
    with torch.autocast("cpu", dtype):
        assert torch.equal(full_logits(HEAD.hidden, HEAD.weight), product.float())
    assert torch.equal(
        full_logits(hidden, weight, dtype=torch.float64), hidden.double() @ weight.double().t()
    )
