"""Results may be changed in place, like those of full logits, without changing anything else."""

from __future__ import annotations

import pytest
import torch

from memhead import linear_cross_entropy, linear_logprobs, supported_logprobs, truncation_support
from memhead.integrations.bitsandbytes import Weight8bit, quantized_logprobs
from memhead.parallel import vocab_parallel_logprobs
from memhead.reference import full_logprobs
from tests.memhead.reference import make_head

HEAD = make_head(40, 53, dtype=torch.float64)
CODES = (HEAD.weight * 20).round().to(torch.int8)
SUPPORT = truncation_support(HEAD.hidden, HEAD.weight, top_k=5, include=HEAD.targets)


def quantized(hidden, weight, targets, **options):
    return quantized_logprobs(hidden, Weight8bit(CODES, torch.full((53,), 127.0)), targets, **options)


def supported(hidden, weight, targets, **options):
    return supported_logprobs(hidden, weight, targets, SUPPORT, **options)


HEADS = {
    "plain": linear_logprobs,
    "quantised": quantized,
    "supported": supported,
    "split": vocab_parallel_logprobs,
}
# Each in place, and what it is out of place.
CHANGES = {
    "[~mask] = 0": (lambda y: y.__setitem__(~HEAD.mask, 0.0), lambda y: torch.where(HEAD.mask, y, 0.0)),
    "-=": (lambda y: y.sub_(HEAD.grad_entropy), lambda y: y - HEAD.grad_entropy),
    "mul_": (lambda y: y.mul_(HEAD.grad_entropy), lambda y: y * HEAD.grad_entropy),
    "detach().mul_": (lambda y: y.detach().mul_(3.0), lambda y: y + 2 * y.detach()),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", HEADS)
def test_changed_results(name, change, trainable, masked, one_process):
    weight = HEAD.weight.clone().requires_grad_(trainable and name != "quantised")
    hidden = HEAD.hidden.clone().requires_grad_()
    leaves = [x for x in (hidden, weight) if x.requires_grad]

    def gradients(place):
        options = {"mask": HEAD.mask} if masked else {}
        result = HEADS[name](hidden, weight, HEAD.targets, entropy=True, **options)
        changed = [result.logprobs, result.entropy]
        if place == "in":
            for y in changed:
                CHANGES[change][0](y)
        else:
            changed = [CHANGES[change][1](y) for y in changed]
        loss = sum((y * y).sum() for y in changed)  # its gradient needs the changed values
        return [*changed, *torch.autograd.grad(loss, leaves)]

    for ours, expected in zip(gradients("in"), gradients("out"), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_losses(change):
    leaves = [HEAD.hidden.clone().requires_grad_(), HEAD.weight.clone().requires_grad_()]
    results = []
    for function in (0, 1):
        losses = linear_cross_entropy(*leaves, HEAD.targets, reduction="none")
        changed = CHANGES[change][function](losses) if function else losses
        if not function:
            CHANGES[change][0](losses)
        results.append([changed.detach().clone(), *torch.autograd.grad((changed * changed).sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_few_rows():
    """A CPU pads few rows, and computes more than there are."""
    hidden = HEAD.hidden[:3].clone().requires_grad_()
    logprobs = linear_logprobs(hidden, HEAD.weight, HEAD.targets[:3]).logprobs
    logprobs[1] = 0.0
    logprobs.sum().backward()
    assert hidden.grad.any(1).tolist() == [True, False, True]


def test_full_logits_may_be_changed_likewise():
    hidden = HEAD.hidden.clone().requires_grad_()
    logprobs = full_logprobs(hidden, HEAD.weight, HEAD.targets).logprobs
    logprobs[~HEAD.mask] = 0.0
    logprobs.sum().backward()
    assert not hidden.grad[~HEAD.mask].any()
