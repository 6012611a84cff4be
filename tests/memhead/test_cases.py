"""Shapes, masks, forbidden tokens, outputs, and bits that must not depend on neighbouring rows."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from memhead import linear_logprobs
from memhead.integrations.bitsandbytes import Weight8bit, quantized_logprobs
from memhead.parallel import vocab_parallel_logprobs
from memhead.sweep import row_blocks
from tests.memhead.products import count_products
from tests.memhead.reference import double, full_logits, full_logprobs, make_head, relative_error

INFINITY = float("inf")


def test_leading_dimensions():
    head = make_head(24, 31)
    flat = linear_logprobs(head.hidden, head.weight, head.targets, entropy=True, mask=head.mask)
    shape = (2, 3, 4)
    shaped = linear_logprobs(
        head.hidden.view(*shape, -1),
        head.weight,
        head.targets.view(shape),
        entropy=True,
        mask=head.mask.view(shape),
    )
    assert torch.equal(shaped.logprobs, flat.logprobs.view(shape))
    assert torch.equal(shaped.entropy, flat.entropy.view(shape))
    one = linear_logprobs(head.hidden[0], head.weight, head.targets[0])
    assert one.logprobs.shape == ()
    torch.testing.assert_close(one.logprobs, flat.logprobs[0])


@pytest.mark.parametrize("trainable", [True, False])
def test_no_rows(trainable):
    head = make_head(3, 31)
    hidden, weight = head.hidden[:0].requires_grad_(), head.weight.requires_grad_(trainable)
    result = linear_logprobs(
        hidden,
        weight,
        head.targets[:0],
        entropy=True,
        extra_outputs=("log_sum_sq_probs", "mean_logits", "is_top1"),
    )
    assert all(x.shape == (0,) for x in result)
    (result.logprobs.sum() + result.entropy.sum()).backward()
    assert hidden.grad.shape == hidden.shape
    assert weight.grad is None or not weight.grad.any()


@pytest.mark.parametrize("trainable", [True, False])
def test_all_masked(trainable):
    head = make_head(5, 31)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_(trainable)
    result = linear_logprobs(
        hidden, weight, torch.full((5,), -100), mask=torch.zeros(5, dtype=torch.bool), entropy=True
    )
    assert not result.logprobs.any()
    (result.logprobs.sum() + result.entropy.sum()).backward()
    assert not hidden.grad.any()
    assert weight.grad is None or not weight.grad.any()


def test_masked_rows_are_never_read():
    """NaN in a padded row, or in its upstream gradient, stays there."""
    head = make_head(20, 31)
    hidden = head.hidden.clone()
    hidden[~head.mask] = float("nan")
    hidden, weight = hidden.requires_grad_(), head.weight.requires_grad_()
    result = linear_logprobs(hidden, weight, torch.where(head.mask, head.targets, -100), mask=head.mask)
    upstream = torch.where(head.mask, 1.0, float("nan"))
    grads = torch.autograd.grad(result.logprobs, (hidden, weight), upstream)
    clean = linear_logprobs(head.hidden, weight, head.targets, mask=head.mask)
    assert torch.equal(result.logprobs, clean.logprobs)
    assert not grads[0][~head.mask].any()
    assert all(grad.isfinite().all() for grad in grads)


def test_non_contiguous_inputs():
    head = make_head(20, 31)
    upstream = head.grad_logprobs

    def grads(hidden, weight, targets):
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        values = linear_logprobs(hidden, weight, targets, chunk=(6, 7)).logprobs
        return values, *torch.autograd.grad(values, (hidden, weight), upstream)

    plain = grads(head.hidden, head.weight, head.targets)
    strided = grads(
        head.hidden.t().contiguous().t(),
        torch.stack((head.weight, head.weight), 2)[..., 0],
        torch.stack((head.targets, head.targets), 1)[:, 0],
    )
    for a, b in zip(plain, strided, strict=True):
        torch.testing.assert_close(a, b)
    expanded = head.hidden[:1].expand(20, -1)
    assert (linear_logprobs(expanded, head.weight, head.targets[:1].expand(20)).logprobs == plain[0][0]).all()


def test_expanded_upstream_gradient():
    head = make_head(20, 31)
    hidden = head.hidden.requires_grad_()
    by_sum = torch.autograd.grad(linear_logprobs(hidden, head.weight, head.targets).logprobs.sum(), hidden)[0]
    by_ones = torch.autograd.grad(
        linear_logprobs(hidden, head.weight, head.targets).logprobs, hidden, torch.ones(20)
    )[0]
    assert torch.equal(by_sum, by_ones)


@pytest.mark.parametrize("sizes", [(31, 64), (32, 100), (1, 2)])
def test_padded_vocabulary(sizes):
    """Rows of the weight that no token uses are forbidden by a bias of -inf, as if they did not exist."""
    real, padded = sizes
    head = make_head(9, padded)
    targets = head.targets % real
    bias = torch.where(torch.arange(padded) < real, 0.0, -INFINITY)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()
    for chunk in (None, (4, 5), (4, 33)):
        short = linear_logprobs(hidden, weight[:real], targets, entropy=True, chunk=chunk)
        ours = linear_logprobs(hidden, weight, targets, bias=bias, entropy=True, chunk=chunk)
        torch.testing.assert_close(ours.logprobs, short.logprobs)
        torch.testing.assert_close(ours.entropy, short.entropy)
        for a, b in zip(
            *(
                torch.autograd.grad(r.logprobs.sum() + r.entropy.sum(), (hidden, weight))
                for r in (ours, short)
            ),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_forbidden_tokens_have_no_nan(temperature):
    head = make_head(40, 53)
    bias = head.bias.clone()
    bias[torch.arange(53) % 3 == 0] = -INFINITY
    targets = torch.where(head.targets % 3 == 0, head.targets + 1, head.targets)
    targets[0], targets[1] = 3, 0  # forbidden targets
    leaves = [x.detach().requires_grad_() for x in (head.hidden, head.weight, bias)]
    result = linear_logprobs(
        leaves[0],
        leaves[1],
        targets,
        bias=leaves[2],
        entropy=True,
        temperature=temperature,
        chunk=(16, 7),
        extra_outputs=("log_sum_sq_probs", "mean_logits", "is_top1"),
    )
    assert (result.logprobs[:2] == -INFINITY).all()
    assert result.entropy.isfinite().all()
    assert result.log_sum_sq_probs.isfinite().all()
    assert (result.mean_logits == -INFINITY).all()
    loss = (result.logprobs[2:] * head.grad_logprobs[2:]).sum() + (result.entropy * head.grad_entropy).sum()
    grads = torch.autograd.grad(loss, leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected, entropy = full_logprobs(wide[0], wide[1], targets, bias=wide[2], temperature=temperature)
    torch.testing.assert_close(result.logprobs[2:].double(), expected[2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.entropy.double(), entropy, atol=1e-5, rtol=1e-5)
    allowed = wide[2].isfinite()
    reference = torch.log_softmax(
        full_logits(wide[0], wide[1][allowed], wide[2][allowed], temperature=temperature), -1
    )
    index = (allowed.cumsum(0)[targets] - 1).clamp_min(0)
    loss = (reference.gather(1, index[:, None]).squeeze(1)[2:] * head.grad_logprobs[2:]).sum()
    loss = loss - ((reference.exp() * reference).sum(1) * head.grad_entropy).sum()
    for ours, theirs in zip(grads, torch.autograd.grad(loss, wide), strict=True):
        assert ours.isfinite().all()
        assert relative_error(ours, theirs) < 1e-5


def test_a_softcap_makes_a_forbidden_token_possible_as_in_the_plain_computation():
    """c * tanh(-inf / c) is -c."""
    head = make_head(40, 53)
    bias = torch.where(torch.arange(53) % 3 == 0, -INFINITY, head.bias)
    ours = linear_logprobs(head.hidden, head.weight, head.targets, bias=bias, softcap=5.0, entropy=True)
    plain = full_logprobs(head.hidden, head.weight, head.targets, bias=bias, softcap=5.0)
    torch.testing.assert_close(ours.logprobs, plain[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.entropy, plain[1], atol=1e-5, rtol=1e-5)


def test_every_other_token_is_forbidden():
    head = make_head(6, 11)
    bias = torch.full((11,), -INFINITY)
    bias[4] = 0.0
    hidden = head.hidden.requires_grad_()
    weight = head.weight.requires_grad_()
    result = linear_logprobs(hidden, weight, torch.full((6,), 4), bias=bias, entropy=True, chunk=(4, 3))
    assert not result.logprobs.any()
    assert not result.entropy.any()
    for grad in torch.autograd.grad(result.logprobs.sum() + result.entropy.sum(), (hidden, weight)):
        assert not grad.any()


def test_outputs_that_trl_asks_for():
    head = make_head(200, 97)
    names = ("log_sum_sq_probs", "mean_logits", "is_top1")
    logits = full_logits(*map(double, (head.hidden, head.weight)), temperature=0.8)
    head.targets[:50] = logits[:50].argmax(1)
    logp = logits.log_softmax(-1)
    for chunk in (None, (64, 13)):
        result = linear_logprobs(
            head.hidden.requires_grad_(),
            head.weight,
            head.targets,
            temperature=0.8,
            extra_outputs=names,
            chunk=chunk,
        )
        torch.testing.assert_close(
            result.log_sum_sq_probs.double(), (2 * logp).logsumexp(1), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(result.mean_logits.double(), logits.mean(1), atol=1e-5, rtol=1e-5)
        assert torch.equal(result.is_top1, logits.argmax(1) == head.targets)
        assert not any(getattr(result, name).requires_grad for name in names)
    assert result.entropy is None


@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"temperature": 0.7, "softcap": 5.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_and_without_gradient_the_same_bits(dtype, options):
    """A ratio of new to old probability that should be 1 is exactly 1."""
    head = make_head(300, 1003, dtype=dtype)
    with torch.no_grad():
        old = linear_logprobs(head.hidden, head.weight, head.targets, **options)
    frozen = linear_logprobs(head.hidden.requires_grad_(), head.weight, head.targets, **options)
    trainable = linear_logprobs(head.hidden, head.weight.requires_grad_(), head.targets, **options)
    assert torch.equal(old.logprobs, frozen.logprobs)
    assert torch.equal(old.logprobs, trainable.logprobs)
    metrics = linear_logprobs(
        head.hidden,
        head.weight,
        head.targets,
        entropy=True,
        extra_outputs=("mean_logits",),
        **{k: v for k, v in options.items() if k != "entropy"},
    )
    assert torch.equal(old.logprobs, metrics.logprobs), "asking for more changes nothing"


def test_a_row_does_not_depend_on_its_neighbours_values():
    head = make_head(64, 1003)
    alone = linear_logprobs(head.hidden, head.weight, head.targets).logprobs
    hidden = head.hidden * 30
    hidden[17] = head.hidden[17]
    assert linear_logprobs(hidden, head.weight, head.targets).logprobs[17] == alone[17]


def quantized(hidden, weight, targets, **options):
    codes = Weight8bit((weight * 20).round().to(torch.int8), torch.full((len(weight),), 6.35))
    return quantized_logprobs(hidden, codes, targets, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("function", [linear_logprobs, quantized, vocab_parallel_logprobs])
def test_a_row_does_not_depend_on_how_many_there_are(function, dtype, threads, one_process):
    """Old log-probabilities may have been computed in other batches than the new ones."""
    head = make_head(2100, 1003, dtype=dtype)
    torch.set_num_threads(threads)
    try:
        everything = function(head.hidden, head.weight, head.targets, entropy=True)
        for rows in (
            slice(0, 1),
            slice(5, 7),
            slice(2050, 2053),
            slice(0, 31),
            slice(1, 2050),
            slice(40, 1000),
        ):
            part = function(head.hidden[rows], head.weight, head.targets[rows], entropy=True)
            assert torch.equal(part.logprobs, everything.logprobs[rows])
            assert torch.equal(part.entropy, everything.entropy[rows])
        masked = function(head.hidden, head.weight, head.targets, mask=head.mask)
        assert torch.equal(masked.logprobs[head.mask], everything.logprobs[head.mask])
    finally:
        torch.set_num_threads(1)


def test_row_blocks_cover_every_row_once():
    for total in (0, 1, 31, 100, 2047, 2048, 2049, 4096, 4100, 6145):
        for size in (1, 5, 64, 100, 2048):
            parts = list(row_blocks(total, size))
            assert [i for part in parts for i in range(part.start, part.stop)] == list(range(total))
            assert all(part.stop - part.start <= size for part in parts)
            if size >= 64 and total > size:
                assert all(part.stop - part.start >= 32 for part in parts)


@pytest.mark.parametrize(
    ("total", "stops"),
    [
        (0, []),
        (20, [20]),
        (64, [64]),
        (128, [64, 128]),  # nothing is left over, and nothing taken
        (129, [64, 96, 129]),
        (159, [64, 96, 159]),
        (160, [64, 128, 160]),  # 32 are enough
    ],
)
def test_a_last_block_of_very_few_rows_takes_some_of_the_one_before_it(total, stops):
    assert [part.stop for part in row_blocks(total, 64)] == stops
    assert [part.stop for part in row_blocks(65, 63)] == [63, 65]  # too small to take from


def test_nan_and_infinity_in_hidden_give_the_plain_result():
    head = make_head(6, 31)
    hidden = head.hidden.clone()
    hidden[1, 3], hidden[2, 3], hidden[3, 3] = float("nan"), INFINITY, -INFINITY
    for chunk in (None, (4, 5)):
        for grad in (False, True):
            leaf = hidden.clone().requires_grad_(grad)
            ours = linear_logprobs(leaf, head.weight, head.targets, entropy=True, chunk=chunk)
            plain = full_logprobs(hidden, head.weight, head.targets)[0]
            assert torch.equal(ours.logprobs.isnan(), plain.isnan())
            torch.testing.assert_close(ours.logprobs, plain, equal_nan=True)
            if grad:
                by_hidden = torch.autograd.grad(ours.logprobs.sum(), leaf)[0]
                assert by_hidden[[0, 4, 5]].isfinite().all()
                assert by_hidden[[1, 2, 3]].isnan().any(1).all()


@pytest.mark.parametrize(
    ("trained", "loss", "products"),
    [
        ((), "value", 1),
        (("hidden",), "logprobs", 2),
        (("hidden",), "entropy as a value", 2),
        (("hidden",), "entropy", 4),  # the direction was computed before anybody knew
        (("hidden", "weight"), "logprobs", 4),
        (("hidden", "weight"), "entropy", 5),
        (("hidden", "bias"), "logprobs", 3),
    ],
)
def test_number_of_products(trained, loss, products):
    """Nothing is recomputed unless a gradient arrives that needs it."""
    head = make_head(40, 31)
    for name in trained:
        getattr(head, name).requires_grad_()

    def step():
        result = linear_logprobs(
            head.hidden, head.weight, head.targets, bias=head.bias, entropy=loss != "logprobs", chunk=(16, 7)
        )
        if trained:
            (result.entropy if loss == "entropy" else result.logprobs).sum().backward()

    assert count_products(step, 40, 31, 24) == products


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpoint_and_twice_in_one_graph(trainable, reentrant):
    head = make_head(40, 31)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_(trainable)
    leaves = (hidden, weight) if trainable else (hidden,)

    def loss(state, head_weight):
        first = linear_logprobs(state, head_weight, head.targets, entropy=True)
        second = linear_logprobs(torch.tanh(state), head_weight, head.targets.flip(0), temperature=0.7)
        return (first.logprobs * second.logprobs + first.entropy * head.grad_entropy).sum()

    plain = torch.autograd.grad(loss(hidden, weight), leaves)
    checkpoint(loss, hidden, weight, use_reentrant=reentrant).backward()
    for leaf, expected in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, expected)

    def full(state, head_weight):
        first = full_logprobs(state, head_weight, head.targets)
        second = full_logprobs(torch.tanh(state), head_weight, head.targets.flip(0), temperature=0.7)
        return (first[0] * second[0] + first[1] * double(head.grad_entropy)).sum()

    wide = [double(x).requires_grad_() for x in (hidden, weight)]
    for ours, exact in zip(plain, torch.autograd.grad(full(*wide), wide), strict=False):
        assert relative_error(ours, exact) < 1e-5
