"""What cannot be differentiated is refused, rather than silently left out of a gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp

from memhead import (
    chunked_linear,
    linear_cross_entropy,
    linear_logprobs,
    supported_logprobs,
    truncation_support,
)
from memhead.integrations.bitsandbytes import Weight8bit, quantized_logprobs
from tests.memhead.reference import make_head

HEAD = make_head(10, 31)


def chunked(hidden, weight):
    return chunked_linear(hidden, weight, lambda z, t: F.cross_entropy(z, t, reduction="none"), HEAD.targets)


def supported(hidden, weight):
    support = truncation_support(hidden, weight, top_k=3, include=HEAD.targets)
    return supported_logprobs(hidden, weight, HEAD.targets, support).logprobs.sum()


def quantized(hidden, weight):
    codes = Weight8bit(torch.ones_like(weight, dtype=torch.int8), torch.ones(len(weight)))
    return quantized_logprobs(hidden, codes, HEAD.targets).logprobs.sum()


LOSSES = {
    "logprobs": lambda h, w: linear_logprobs(h, w, HEAD.targets).logprobs.sum(),
    "entropy": lambda h, w: linear_logprobs(h, w, HEAD.targets, entropy=True).entropy.sum(),
    "cross entropy": lambda h, w: linear_cross_entropy(h, w, HEAD.targets),
    "label smoothing": lambda h, w: linear_cross_entropy(h, w, HEAD.targets, label_smoothing=0.1),
    "chunked": chunked,
    "supported": supported,
    "quantised": quantized,
}


CASES = [(name, ("hidden",)) for name in LOSSES]
CASES += [(name, (*more, "weight")) for name in LOSSES if name != "quantised" for more in ((), ("hidden",))]


@pytest.mark.parametrize(("name", "trained"), CASES)
def test_a_second_derivative(name, trained):
    leaves = {key: getattr(HEAD, key).clone().requires_grad_(key in trained) for key in ("hidden", "weight")}
    loss = LOSSES[name](leaves["hidden"], leaves["weight"])
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, [leaves[key] for key in trained], create_graph=True)


@pytest.mark.parametrize("name", ["softcap", "logit_scale"])
@pytest.mark.parametrize("function", [linear_logprobs, linear_cross_entropy])
def test_a_trained_scale(function, name):
    trained = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match=f"{name} requires a gradient and would get none"):
        function(HEAD.hidden, HEAD.weight, HEAD.targets, **{name: trained})


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_forward_mode(name):
    head = {key: getattr(HEAD, key) for key in ("hidden", "weight", "bias")}

    def logprobs(value):
        return linear_logprobs(targets=HEAD.targets, **{**head, name: value}).logprobs

    with pytest.raises(ValueError, match=f"{name} carries a tangent"):
        jvp(logprobs, (head[name],), (torch.ones_like(head[name]),))
