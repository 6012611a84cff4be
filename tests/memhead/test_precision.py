"""Half precision, mixed dtypes, autocast, and tokens that the model is certain of.

The rule: at most twice the error of plain half-precision full logits against float64, plus an
epsilon; for log-probabilities, whose logits are never rounded, at most a tenth of it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memhead import (
    chunked_linear,
    linear_cross_entropy,
    linear_logprobs,
    supported_logprobs,
    truncation_support,
)
from memhead.integrations.bitsandbytes import Weight8bit, quantized_logprobs
from tests.memhead.reference import double, full_logprobs, make_head, relative_error

HALF = [torch.bfloat16, torch.float16]


def evaluate(function, hidden, weight, targets, grad_logprobs, grad_entropy=None, **options):
    """Log-probabilities, entropies, gradients by hidden and weight."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logprobs, entropy = function(hidden, weight, targets, **options)[:2]
    loss = (logprobs * grad_logprobs).sum()
    if grad_entropy is not None:
        loss = loss + (entropy * grad_entropy).sum()
    return logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_against_plain_half_precision(dtype, entropy_gradient):
    head = make_head(200, 777, 48, dtype)
    arguments = (head.hidden, head.weight, head.targets, head.grad_logprobs)
    arguments += (head.grad_entropy,) if entropy_gradient else ()
    ours = evaluate(linear_logprobs, *arguments, entropy=True, chunk=(64, 100))
    plain = evaluate(full_logprobs, *arguments)
    exact = evaluate(full_logprobs, *map(double, arguments))
    errors = [[relative_error(x, y) for x, y in zip(result, exact, strict=True)] for result in (ours, plain)]
    assert errors[0][0] <= 0.1 * errors[1][0], "log-probabilities"
    for name, our_error, plain_error in zip(
        ("entropy", "hidden", "weight"), *(e[1:] for e in errors), strict=True
    ):
        assert our_error <= 2 * plain_error + 1e-6, name


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_are_rounded_once(dtype):
    """Far better than required: the result is the exact gradient, rounded to its dtype."""
    head = make_head(200, 777, 48, dtype)
    arguments = (head.hidden, head.weight, head.targets, head.grad_logprobs, head.grad_entropy)
    ours = evaluate(linear_logprobs, *arguments, entropy=True, chunk=(64, 100))
    exact = evaluate(full_logprobs, *map(double, arguments))
    for our_grad, grad in zip(ours[2:], exact[2:], strict=True):
        assert our_grad.dtype == dtype
        assert relative_error(our_grad, grad) < torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
)
def test_mixed_dtypes(hidden_dtype, weight_dtype):
    head = make_head(50, 101)
    arguments = (head.hidden.to(hidden_dtype), head.weight.to(weight_dtype), head.targets, head.grad_logprobs)
    ours = evaluate(linear_logprobs, *arguments, entropy=True, chunk=(16, 33))
    exact = evaluate(full_logprobs, *map(double, arguments))
    assert ours[0].dtype == (torch.float64 if weight_dtype == torch.float64 else torch.float32)
    assert (ours[2].dtype, ours[3].dtype) == (hidden_dtype, weight_dtype)
    for value, reference in zip(ours, exact, strict=True):
        assert relative_error(value, reference) < max(1e-5, 1.5 * torch.finfo(value.dtype).eps)


def test_float64_is_float64():
    head = make_head(50, 101, dtype=torch.float64)
    arguments = (
        head.hidden,
        head.weight,
        head.targets,
        head.grad_logprobs.double(),
        head.grad_entropy.double(),
    )
    ours = evaluate(
        linear_logprobs, *arguments, entropy=True, chunk=(16, 33), temperature=head.temperature.double()
    )
    exact = evaluate(full_logprobs, *arguments, temperature=head.temperature.double())
    for value, reference in zip(ours, exact, strict=True):
        assert relative_error(value, reference) < 1e-13


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_with_the_backward_outside(dtype):
    head = make_head(50, 101)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        result = linear_logprobs(hidden, weight, head.targets, entropy=True)
    assert result.logprobs.dtype == torch.float32
    loss = (result.logprobs * head.grad_logprobs + result.entropy * head.grad_entropy).sum()
    ours = torch.autograd.grad(loss, (hidden, weight))
    rounded = [x.to(dtype) for x in (hidden, weight)]
    exact = evaluate(
        full_logprobs, *map(double, (*rounded, head.targets, head.grad_logprobs, head.grad_entropy))
    )
    for our_grad, grad in zip(ours, exact[2:], strict=True):
        assert our_grad.dtype == torch.float32
        assert relative_error(our_grad, grad) < torch.finfo(dtype).eps


def of_chunks(hidden, weight, targets):
    return -chunked_linear(hidden, weight, lambda z, t: F.cross_entropy(z, t, reduction="none"), targets)


def of_losses(hidden, weight, targets):
    return -linear_cross_entropy(hidden, weight, targets)


def of_support(hidden, weight, targets):
    support = truncation_support(hidden, weight, top_k=9, include=targets)
    return supported_logprobs(hidden, weight, targets, support).logprobs.sum() + support.sum()


def of_values(hidden, weight, targets):
    return linear_logprobs(hidden, weight, targets, chunk=(16, 33)).logprobs.sum()


@pytest.mark.parametrize("function", [of_values, of_losses, of_chunks, of_support])
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_rounds_the_operands(function, dtype):
    """As on a GPU, where nothing wider enters a product: the same bits as with hidden and weight in half precision."""
    head = make_head(50, 1101)
    leaves = [x.requires_grad_() for x in (head.hidden, head.weight)]
    with torch.autocast("cpu", dtype):
        ours = function(*leaves, head.targets)
    halves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    plain = function(*halves, head.targets)
    assert torch.equal(ours, plain)
    for grad, half in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, halves), strict=True):
        assert grad.dtype == torch.float32
        assert relative_error(half, grad) < torch.finfo(dtype).eps


@pytest.mark.parametrize("function", [of_chunks, of_losses, of_support, of_values])
def test_autocast_leaves_float64_alone(function):
    """As it does in torch's own products."""
    head = make_head(5, 11)
    leaves = [head.hidden.requires_grad_(), head.weight.double().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        ours = function(*leaves, head.targets)
    plain = function(*leaves, head.targets)
    assert ours.dtype == torch.float64
    assert torch.equal(ours, plain)
    assert torch.equal(*(torch.autograd.grad(loss, leaves[1])[0] for loss in (ours, plain)))


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_rounds_a_quantised_head(dtype):
    head = make_head(50, 101)
    weight = Weight8bit((head.weight * 20).round().to(torch.int8), torch.linspace(1, 9, 101))
    with torch.autocast("cpu", dtype):
        ours = quantized_logprobs(head.hidden, weight, head.targets).logprobs
    assert torch.equal(ours, quantized_logprobs(head.hidden.to(dtype), weight, head.targets).logprobs)
    whole = weight.tile(0, 101, dtype)
    assert torch.equal(ours, linear_logprobs(head.hidden.to(dtype), whole, head.targets).logprobs)


@pytest.mark.parametrize("upstream", [1e-6, 6e4])
def test_float16_gradients_do_not_flush_to_zero_nor_overflow_on_the_way(upstream):
    """Means over long batches make upstream gradients of 1e-6; a gradient scaler makes them large."""
    head = make_head(50, 101, dtype=torch.float16)
    weight = head.weight if upstream < 1 else head.weight * 1e-3
    arguments = (head.hidden, weight, head.targets, head.grad_logprobs.abs() * upstream)
    ours = evaluate(linear_logprobs, *arguments, entropy=True)
    exact = evaluate(full_logprobs, *map(double, arguments))
    by_hidden = ours[2].double()
    assert by_hidden.isfinite().all()
    # float16's last bit is 6e-8
    assert (by_hidden - exact[2]).abs().max() <= 1e-3 * exact[2].abs().max() + 6e-8


def confident_head(dtype: torch.dtype):
    """Rows whose targets have p = 1 - 1e-3 ... 1 - 1e-12, as exactly as ``dtype`` can hold the logits.

    Hidden states are rows of an identity, so that a weight's column is a row of logits.
    """
    exponents = torch.arange(3, 13)
    vocab, rows = 64, len(exponents)
    random = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(vocab, rows, generator=random, dtype=torch.float64)
    weight[7] = weight[torch.arange(vocab) != 7].logsumexp(0) + exponents * 2.302585092994046
    # Zero rows in the identity's place would make every gradient zero; scatter some more features.
    features = torch.cat((weight, torch.randn(vocab, 8, generator=random, dtype=torch.float64)), 1)
    hidden = torch.cat((torch.eye(rows, dtype=torch.float64), torch.zeros(rows, 8, dtype=torch.float64)), 1)
    return hidden.to(dtype), features.to(dtype), torch.full((rows,), 7)


def exact_confident(hidden, weight, targets, grad):
    """float64 with the others' log-sum-exp kept apart, so that the reference itself does not cancel."""
    hidden = hidden.double().requires_grad_()
    weight = weight.double().requires_grad_()
    logits = hidden @ weight.t()
    target = logits.gather(1, targets[:, None])
    others = logits.masked_fill(torch.nn.functional.one_hot(targets, logits.shape[1]).bool(), float("-inf"))
    logprobs = -torch.nn.functional.softplus(others.logsumexp(1) - target.squeeze(1), threshold=1e9)
    return logprobs.detach(), *torch.autograd.grad((logprobs * grad).sum(), (hidden, weight))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_confident_tokens_keep_value_and_gradient(dtype, tolerance):
    hidden, weight, targets = confident_head(dtype)
    uncertain = []
    for row in range(len(targets)):  # one at a time: each has its own scale
        x, t, g = hidden[row : row + 1], targets[:1], torch.ones(1)
        exact = exact_confident(x, weight, t, g.double())
        ours = evaluate(linear_logprobs, x, weight, t, g, entropy=True)
        for value, reference in zip((ours[0], *ours[2:]), exact, strict=True):
            assert relative_error(value, reference) < tolerance
        uncertain.append(-exact[0].item())
    assert uncertain[0] > 5e-4
    assert uncertain[-1] < 2e-12


def test_plain_bfloat16_loses_confident_tokens():
    hidden, weight, targets = confident_head(torch.bfloat16)
    grad = torch.ones(len(targets))
    exact = exact_confident(hidden, weight, targets, grad.double())
    plain = evaluate(full_logprobs, hidden, weight, targets, grad.bfloat16())
    for value, reference in zip((plain[0][:, None], plain[2]), (exact[0][:, None], exact[1]), strict=True):
        errors = [relative_error(a, b) for a, b in zip(value, reference, strict=True)]
        assert min(errors) > 0.5, errors
