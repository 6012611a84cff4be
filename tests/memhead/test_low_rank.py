"""LoRA on the head: exact log-probabilities and gradients of A, B and hidden, without merging."""

from __future__ import annotations

import pytest
import torch

from memhead import LowRankUpdate, linear_logprobs
from tests.memhead.allocations import allocations
from tests.memhead.reference import double, full_logprobs, make_head, relative_error

OPTIONS = {
    "plain": {},
    "all": {"bias": True, "mask": True, "temperature": True, "softcap": 5.0, "logit_scale": 0.5},
}


def adapter(
    rows_of_weight: int, features: int, rank: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    a = torch.randn(rank, features, generator=random, dtype=torch.float64) / features**0.5
    b = torch.randn(rows_of_weight, rank, generator=random, dtype=torch.float64) / rank**0.5
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("trainable_base", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunk", [None, (13, 17)])
def test_equals_the_merged_weight(name, chunk, trainable_base, entropy_gradient):
    head = make_head(60, 103)
    options = {k: getattr(head, k) if v is True else v for k, v in OPTIONS[name].items()}
    results = []
    for convert in (lambda x: x, double):
        leaves = [
            convert(x).clone().requires_grad_() for x in (head.hidden, *adapter(103, 24, 5, torch.float32))
        ]
        hidden, a, b = leaves
        weight = convert(head.weight).clone().requires_grad_(trainable_base)
        leaves += [weight] if trainable_base else []
        if convert is double:
            values = full_logprobs(
                hidden, weight + 0.7 * b @ a, head.targets, **{k: double(v) for k, v in options.items()}
            )
        else:
            update = LowRankUpdate(a, b, 0.7)
            values = linear_logprobs(
                hidden, weight, head.targets, low_rank=update, entropy=True, chunk=chunk, **options
            )[:2]
        loss = (values[0] * head.grad_logprobs).sum() + entropy_gradient * (
            values[1] * head.grad_entropy
        ).sum()
        results.append((*values, *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(results[0][2:], results[1][2:], strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_closer_than_the_merged_half_precision_weight(dtype):
    head = make_head(100, 211, dtype=dtype)
    a, b = adapter(211, 24, 5, dtype)
    exact = full_logprobs(
        head.hidden.double(), head.weight.double() + 0.7 * b.double() @ a.double(), head.targets
    )[0]
    ours = linear_logprobs(head.hidden, head.weight, head.targets, low_rank=LowRankUpdate(a, b, 0.7)).logprobs
    merged = full_logprobs(head.hidden, head.weight + (0.7 * b @ a).to(dtype), head.targets)[0]
    assert relative_error(ours, exact) < 0.3 * relative_error(merged, exact)


def test_no_gradient_of_the_frozen_base_and_the_same_bits_without_gradient():
    head = make_head(60, 103)
    a, b = (x.requires_grad_() for x in adapter(103, 24, 5, torch.float32))
    weight = head.weight.requires_grad_(False)
    result = linear_logprobs(head.hidden, weight, head.targets, low_rank=LowRankUpdate(a, b))
    result.logprobs.sum().backward()
    assert weight.grad is None
    assert a.grad.any()
    assert b.grad.any()
    with torch.no_grad():
        old = linear_logprobs(head.hidden, weight, head.targets, low_rank=LowRankUpdate(a, b))
    assert torch.equal(old.logprobs, result.logprobs)


def test_dropout_is_on_the_way_into_a():
    head = make_head(60, 103)
    a, b = adapter(103, 24, 5, torch.float32)
    torch.manual_seed(0)
    dropped = linear_logprobs(
        head.hidden, head.weight, head.targets, low_rank=LowRankUpdate(a, b, 1.0, 0.5)
    ).logprobs
    torch.manual_seed(0)
    update = torch.nn.functional.dropout(head.hidden, 0.5) @ a.t() @ b.t()
    logp = (head.hidden @ head.weight.t() + update).log_softmax(-1)
    torch.testing.assert_close(
        dropped, logp.gather(1, head.targets[:, None]).squeeze(1), atol=1e-5, rtol=1e-5
    )


def test_no_tensor_of_the_weights_size():
    rows, vocab, features, rank = 300, 4000, 16, 4
    head = make_head(rows, vocab, features)
    hidden = head.hidden.requires_grad_()
    a, b = (x.requires_grad_() for x in adapter(vocab, features, rank, torch.float32))

    def step():
        values = linear_logprobs(
            hidden, head.weight, head.targets, low_rank=LowRankUpdate(a, b), chunk=(100, 64)
        )
        torch.autograd.grad(values.logprobs.sum(), (hidden, a, b))

    assert max(allocations(step)) <= max(vocab * rank * 4, 400 * 64 * 4) < vocab * features * 4
