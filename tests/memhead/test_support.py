"""Log-probabilities renormalised over the support of a truncating sampler."""

from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from memhead import linear_logprobs, supported_logprobs, truncation_support
from tests.memhead.reference import double, full_logits, make_head, relative_error

FILTERS = [
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.2},
]
WARPERS = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
OPTIONS = {"temperature": 0.8, "softcap": 9.0, "logit_scale": 1.3}


def warped(logits, filters, temperature=1.0):
    """The logits as transformers' generate filters them: -inf outside the support."""
    scores = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1.0 else logits
    for name, value in filters.items():
        scores = WARPERS[name](value)(None, scores)
    return scores


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("chunk", [None, 7])
def test_support_is_that_of_generate(filters, chunk):
    head = make_head(40, 211)
    support = truncation_support(head.hidden, head.weight, bias=head.bias, chunk=chunk, **OPTIONS, **filters)
    without = OPTIONS | {"temperature": 1.0}
    scores = warped(
        full_logits(head.hidden, head.weight, head.bias, **without), filters, OPTIONS["temperature"]
    )
    for ids, row in zip(support, scores, strict=True):
        assert set(ids[ids >= 0].tolist()) == set(row.isfinite().nonzero().flatten().tolist())


def test_tokens_as_likely_as_the_kth_are_kept():
    weight = torch.tensor([[3.0], [2.0], [2.0], [2.0], [1.0]])
    support = truncation_support(torch.ones(1, 1), weight, top_k=2)
    assert sorted(support.flatten().tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "options",
    [{}, OPTIONS, {"temperature": True, "mask": True, "bias": True}],
    ids=["plain", "numbers", "tensors"],
)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
def test_values_and_gradients(options, entropy, chunk):
    head = make_head(30, 97)
    options = {k: getattr(head, k) if v is True else v for k, v in options.items()}
    scoring = {k: v for k, v in options.items() if k != "mask"}
    support = truncation_support(head.hidden, head.weight, top_p=0.8, **scoring)
    targets = support[:, 0].clone()
    targets[3:9] = support[3:9, 1].clamp_min(0)
    results = []
    for wide in (False, True):
        leaves = [
            (double(x) if wide else x.clone()).requires_grad_() for x in (head.hidden, head.weight, head.bias)
        ]
        tensors = options | ({"bias": leaves[2]} if "bias" in options else {})
        if wide:
            mask = tensors.pop("mask", torch.ones(30, dtype=torch.bool))
            logits = full_logits(
                leaves[0],
                leaves[1],
                **{k: double(v) if k == "temperature" else v for k, v in tensors.items()},
            )
            inside = torch.zeros(30, 98, dtype=torch.bool).scatter_(1, support % 98, True)[:, :97]
            logp = logits.masked_fill(~inside, float("-inf")).log_softmax(1)
            logprobs = torch.where(mask, logp.gather(1, targets[:, None]).squeeze(1), 0.0)
            safe = logp.masked_fill(~inside, 0.0)
            entropies = torch.where(mask, -(safe.exp() * safe * inside).sum(1), 0.0)
        else:
            logprobs, entropies, *_ = supported_logprobs(
                leaves[0], leaves[1], targets, support, entropy=True, chunk=chunk, **tensors
            )
        counted = logprobs.isfinite()
        loss = (logprobs * head.grad_logprobs)[counted].sum() + entropy * (
            entropies * head.grad_entropy
        ).sum()
        used = leaves if "bias" in options else leaves[:2]
        results.append((logprobs, entropies, *torch.autograd.grad(loss, used)))
    torch.testing.assert_close(results[0][0].double(), results[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[0][1].double(), results[1][1], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(results[0][2:], results[1][2:], strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_ratio_is_unbiased(filters):
    """Its expectation under the sampler is 1; that of the ratio over the whole vocabulary is not."""
    old, new = make_head(20, 97), make_head(20, 97, seed=1)
    new_hidden = old.hidden + 0.2 * new.hidden  # the policy after some steps
    support = truncation_support(old.hidden, old.weight, **filters)
    expectation, naive = torch.zeros(20), torch.zeros(20)
    for column in support.t():
        inside, token = column >= 0, column.clamp_min(0)
        log_old = supported_logprobs(old.hidden, old.weight, token, support).logprobs
        log_new = supported_logprobs(new_hidden, old.weight, token, support).logprobs
        expectation += torch.where(inside, log_old.exp() * (log_new - log_old).exp(), 0.0)
        whole = [linear_logprobs(h, old.weight, token).logprobs for h in (new_hidden, old.hidden)]
        naive += torch.where(inside, log_old.exp() * (whole[0] - whole[1]).exp(), 0.0)
    torch.testing.assert_close(expectation, torch.ones(20))
    assert (naive - 1).abs().max() > 0.05


def test_sampled_ratio_averages_to_one():
    """The same by sampling: 200,000 tokens from transformers' own truncation."""
    old, new = make_head(1, 53), make_head(1, 53, seed=1)
    hidden = old.hidden + 0.3 * new.hidden
    probabilities = warped(full_logits(old.hidden, old.weight), {"top_k": 8}).softmax(-1)
    drawn = torch.multinomial(
        probabilities, 200_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )[0]
    support = truncation_support(old.hidden, old.weight, top_k=8)
    by_token = [
        supported_logprobs(h.expand(53, -1), old.weight, torch.arange(53), support.expand(53, -1)).logprobs
        for h in (hidden, old.hidden)
    ]
    ratio = (by_token[0] - by_token[1]).exp()[drawn]
    assert abs(ratio.mean().item() - 1) < 4 * ratio.std().item() / 200_000**0.5


def test_a_target_outside_the_support():
    head = make_head(4, 31)
    support = truncation_support(head.hidden, head.weight, top_k=3)
    outside = torch.tensor([next(v for v in range(31) if v not in row) for row in support.tolist()])
    hidden = head.hidden.requires_grad_()
    result = supported_logprobs(hidden, head.weight, outside, support, entropy=True)
    assert (result.logprobs == float("-inf")).all()
    gradient = torch.autograd.grad(result.logprobs, hidden, torch.ones(4), retain_graph=True)[0]
    assert not gradient.any()
    widened = truncation_support(head.hidden, head.weight, top_k=3, include=outside)
    assert supported_logprobs(hidden, head.weight, outside, widened).logprobs.isfinite().all()


def test_one_row_without_leading_dimensions():
    head = make_head(1, 30)
    one, rows = (
        supported_logprobs(hidden, head.weight, drawn, support, entropy=True)
        for hidden, drawn, support in (
            (head.hidden[0], head.targets[0], torch.arange(30)),
            (head.hidden, head.targets, torch.arange(30)[None]),
        )
    )
    assert one.logprobs.shape == ()
    assert torch.equal(one.logprobs, rows.logprobs[0])
    assert torch.equal(one.entropy, rows.entropy[0])


def test_nan_in_hidden_is_not_an_impossible_token():
    head = make_head(3, 30)
    head.hidden[1] = float("nan")
    logprobs = supported_logprobs(
        head.hidden, head.weight, head.targets, torch.arange(30).expand(3, 30)
    ).logprobs
    assert logprobs.isnan().tolist() == [False, True, False]


def test_bytes_as_drawn_tokens():
    head = make_head(3, 256)
    drawn = torch.tensor([7, 156, 200])
    supports = [
        truncation_support(head.hidden, head.weight, top_k=2, include=t) for t in (drawn, drawn.byte())
    ]
    assert torch.equal(*supports)


@pytest.mark.parametrize("supported", [True, False])
def test_a_temperature_is_no_parameter(supported):
    """It has no gradient, and by itself makes nothing of a graph."""
    head = make_head(7, 30, 5)
    temperature = torch.full((7,), 0.8, requires_grad=True)
    support = torch.arange(30).expand(7, 30)
    score, rest = (supported_logprobs, (support,)) if supported else (linear_logprobs, ())
    for hidden in (head.hidden.detach(), head.hidden.detach().requires_grad_()):
        found = score(hidden, head.weight.detach(), head.targets, *rest, temperature=temperature).logprobs
        assert found.requires_grad == hidden.requires_grad
    found.sum().backward()
    assert temperature.grad is None


def test_temperatures_of_rows_are_positive():
    head = make_head(3, 31)
    support = truncation_support(head.hidden, head.weight, top_k=2, include=head.targets)
    zero = torch.tensor([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="temperature contains 0"):
        truncation_support(head.hidden, head.weight, top_k=2, temperature=zero)
    with pytest.raises(ValueError, match="temperature contains 0"):
        supported_logprobs(head.hidden, head.weight, head.targets, support, temperature=zero)


def test_a_support_of_one():
    head = make_head(4, 31)
    support = truncation_support(head.hidden, head.weight, top_k=1)
    hidden = head.hidden.requires_grad_()
    result = supported_logprobs(hidden, head.weight, support[:, 0], support, entropy=True)
    assert not result.logprobs.any()
    assert not result.entropy.any()
    assert not torch.autograd.grad(result.logprobs.sum() + result.entropy.sum(), hidden)[0].any()


def test_forbidden_tokens_and_leading_dimensions_and_no_rows():
    head = make_head(6, 31)
    bias = torch.where(torch.arange(31) % 2 == 0, 0.0, float("-inf"))
    support = truncation_support(head.hidden.view(2, 3, -1), head.weight, top_k=20, bias=bias)
    assert support.shape == (2, 3, 16)
    assert (support % 2 == 0).all()
    result = supported_logprobs(head.hidden.view(2, 3, -1), head.weight, support[..., 0], support, bias=bias)
    assert result.logprobs.shape == (2, 3)
    empty = truncation_support(head.hidden[:0], head.weight, top_k=3)
    assert supported_logprobs(head.hidden[:0], head.weight, head.targets[:0], empty).logprobs.shape == (0,)


def test_half_precision():
    head = make_head(50, 211, dtype=torch.bfloat16)
    support = truncation_support(head.hidden, head.weight, top_p=0.9)
    targets = support[:, 0]
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()
    logprobs = supported_logprobs(hidden, weight, targets, support).logprobs
    wide = [double(x).requires_grad_() for x in (hidden, weight)]
    expected = supported_logprobs(*wide, targets, support).logprobs
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)
    upstream = head.grad_logprobs
    ours = torch.autograd.grad(logprobs, (hidden, weight), upstream)
    theirs = torch.autograd.grad(expected, wide, upstream.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        assert relative_error(a, b) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "none of top_k, top_p and min_p is given"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"top_k": 9, "max_size": 4}, "max_size=4 is too small.*top_k=9"),
        ({"top_k": 9, "temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_refuses(change, message):
    head = make_head(4, 31)
    with pytest.raises(ValueError, match=message):
        truncation_support(head.hidden, head.weight, **change)


# The limits of every truncation, by logits that can be read: an identity of hidden states, a column of weight a row.


def support_of(logits, **filters):
    rows = torch.tensor(logits, dtype=torch.float64)
    hidden = torch.eye(len(rows), dtype=torch.float64)
    found = truncation_support(hidden, rows.t().contiguous(), **filters)
    return [sorted(token for token in row if token >= 0) for row in found.tolist()]


DISTINCT, TIED = [3.0, 1.0, 2.0, 0.0], [2.0, 1.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("filters", "distinct", "tied"),
    [
        ({"min_p": 1.0}, [0], [0, 2]),
        ({"min_p": 1e-9}, [0, 1, 2, 3], [0, 1, 2, 3]),
        ({"min_p": 0.3}, [0, 2], [0, 1, 2]),  # e^-1 = 0.37
        ({"top_p": 1.0}, [0, 1, 2, 3], [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [0], [0]),
        ({"top_p": 0.64}, [0], [0, 2]),  # 0.644, 0.237, 0.087, 0.032; and 0.40, 0.40, 0.147, 0.054
        ({"top_p": 0.65}, [0, 2], [0, 2]),
        ({"top_k": 1}, [0], [0, 2]),
        ({"top_k": 2}, [0, 2], [0, 2]),
        ({"top_k": 4}, [0, 1, 2, 3], [0, 1, 2, 3]),
        ({"top_k": 100}, [0, 1, 2, 3], [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.72}, [0], [0, 2]),  # of what top-k left: 0.731, 0.269; 0.5, 0.5
        ({"top_k": 2, "top_p": 0.74}, [0, 2], [0, 2]),
    ],
    ids=str,
)
def test_limits_of_every_truncation(filters, distinct, tied):
    found = support_of([DISTINCT, TIED], **filters)
    found_tied = found[1]
    if filters == {"top_p": 1e-9}:  # of two equals either is the most likely
        assert found_tied in ([0], [2])
        found_tied = tied
    assert (found[0], found_tied) == (distinct, tied)


def test_a_support_may_be_as_large_as_max_size_and_no_larger():
    assert support_of([DISTINCT], top_k=3, max_size=3) == [[0, 1, 2]]
    with pytest.raises(ValueError, match="max_size=2 is too small"):
        support_of([DISTINCT], top_k=3, max_size=2)
    assert support_of([DISTINCT], top_k=4, max_size=4) == [[0, 1, 2, 3]]  # the whole vocabulary


def test_a_token_is_left_out_where_the_more_likely_ones_hold_top_p_to_the_bit():
    """As vLLM's sampler has it. Of two equally likely tokens either holds exactly a half."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [0.0], [-1e4]])
    assert truncation_support(hidden, weight, top_p=0.5).shape == (1, 1)
    assert truncation_support(hidden, weight, top_p=0.5000001).shape == (1, 2)


def test_there_is_room_for_1024_tokens_unless_told_otherwise():
    hidden, weight = torch.ones(1, 1), torch.zeros(1025, 1)
    assert truncation_support(hidden, weight[:1024], top_k=1024).shape == (1, 1024)
    with pytest.raises(ValueError, match="max_size=1024 is too small"):
        truncation_support(hidden, weight, top_k=1025)


def test_the_support_of_no_rows_has_no_tokens():
    assert truncation_support(torch.empty(0, 4), torch.zeros(7, 4), top_k=2).shape == (0, 0)
    assert truncation_support(torch.empty(3, 0, 4), torch.zeros(7, 4), top_k=2).shape == (3, 0, 0)


def test_the_drawn_token_is_added_where_it_is_missing_and_only_there():
    hidden = torch.eye(2, dtype=torch.float64)
    weight = torch.tensor([DISTINCT, TIED], dtype=torch.float64).t().contiguous()
    found = truncation_support(hidden, weight, top_p=0.65, include=torch.tensor([3, 0]))
    assert [sorted(token for token in row if token >= 0) for row in found.tolist()] == [[0, 2, 3], [0, 2]]
    assert found[:, 0].tolist()[0] == 0  # the most likely first
    same = truncation_support(hidden, weight, top_p=0.65, include=torch.tensor([2, 0]))
    assert same.shape == (2, 2)


def test_a_token_outside_the_support_is_impossible_and_moves_nothing():
    head = make_head(3, 11, dtype=torch.float64)
    support = truncation_support(head.hidden, head.weight, top_k=2)
    outside = torch.tensor([next(v for v in range(11) if v not in row) for row in support.tolist()])
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()
    result = supported_logprobs(hidden, weight, outside, support, entropy=True)
    assert (result.logprobs == -torch.inf).all()
    grads = torch.autograd.grad(result.logprobs[result.logprobs.isfinite()].sum(), (hidden, weight))
    assert not any(grad.any() for grad in grads)
    both = (
        supported_logprobs(hidden, weight, support[:, 0], support).logprobs.exp()
        + supported_logprobs(hidden, weight, support[:, 1], support).logprobs.exp()
    )
    torch.testing.assert_close(both, torch.ones(3, dtype=torch.float64))


def test_a_support_is_found_without_a_graph():
    """Of the policy that trains, too: which tokens could have been drawn has no gradient."""
    head = make_head(6, 31)
    plain = truncation_support(head.hidden, head.weight, top_p=0.8)
    leaves, kept = (head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        assert torch.equal(truncation_support(*leaves, top_p=0.8), plain)
    assert not kept
