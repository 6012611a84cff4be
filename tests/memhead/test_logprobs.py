"""linear_logprobs against full logits in float64: values and every gradient, on sizes that divide nothing."""

from __future__ import annotations

import pytest
import torch

from memhead import linear_logprobs
from tests.memhead.reference import Head, double, full_logprobs, make_head, relative_error

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "mask": {"mask": True},
    "temperature": {"temperature": 0.7},
    "temperature-per-row": {"temperature": True},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.35},
    "all": {"bias": True, "mask": True, "temperature": True, "softcap": 5.0, "logit_scale": 0.35},
}
SIZES = [(rows, vocab) for rows in (1, 7, 1000) for vocab in (11, 1003)] + [(1, 32771), (7, 32771)]
CHUNKS = [None, (3, 5), (7, 64), (257, 300)]
SWEEPS = ["frozen", "trainable", "entropy-gradient"]


def options_of(head: Head, name: str) -> dict:
    """The options of that name, with the head's own tensor in place of True."""
    return {key: getattr(head, key) if value is True else value for key, value in OPTIONS[name].items()}


def run(function, head: Head, options: dict, sweep: str, **further):
    """Log-probabilities, entropies and gradients by name, for one way of training."""
    leaves = (
        ["hidden"]
        if sweep == "frozen"
        else [k for k in ("hidden", "weight", "bias") if k != "bias" or "bias" in options]
    )
    head = head._replace(**{name: getattr(head, name).detach().clone().requires_grad_() for name in leaves})
    if "bias" in options:
        options = options | {"bias": head.bias}
    logprobs, entropy = function(head.hidden, head.weight, head.targets, **options, **further)[:2]
    loss = (logprobs * head.grad_logprobs).sum()
    if sweep == "entropy-gradient":
        loss = loss + (entropy * head.grad_entropy).sum()
    grads = torch.autograd.grad(loss, [getattr(head, name) for name in leaves])
    return logprobs.detach(), entropy.detach(), dict(zip(leaves, grads))


def assert_equals_float64(head: Head, name: str, sweep: str, chunk) -> None:
    options = options_of(head, name)
    wide = Head(*map(double, head))
    expected = run(full_logprobs, wide, {k: double(v) for k, v in options.items()}, sweep)
    actual = run(linear_logprobs, head, options, sweep, entropy=True, chunk=chunk)
    for value, reference in zip(actual[:2], expected[:2]):
        torch.testing.assert_close(value.double(), reference, atol=1e-5, rtol=1e-5)
    for leaf, grad in expected[2].items():
        assert relative_error(actual[2][leaf], grad) < 1e-5, f"gradient by {leaf}"


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("rows", "vocab"), SIZES)
def test_equals_full_logits(rows, vocab, name, sweep):
    head = make_head(rows, vocab)
    chunks = [chunk for chunk in CHUNKS if chunk is None or rows * vocab <= 400 * chunk[0] * chunk[1]]
    for chunk in chunks:
        assert_equals_float64(head, name, sweep, chunk)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_equals_full_logits_on_a_large_head(sweep):
    assert_equals_float64(make_head(400, 32771), "all", sweep, (133, 4099))


def test_plain_large_head_with_planned_chunk():
    assert_equals_float64(make_head(400, 32771), "plain", "frozen", None)
