"""The sum of a trainable head's cross entropy: three products, exact, no logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import peak_bytes
from memhead import linear_cross_entropy, linear_logprobs
from memhead.summed_op import summed_logprobs_op
from tests.memhead.allocations import allocations
from tests.memhead.products import count_products
from tests.memhead.reference import double, full_logits, make_head, relative_error

INFINITY = float("inf")
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "scale": {"logit_scale": 0.35},
    "all": {"bias": True, "softcap": 4.0, "logit_scale": 0.35},
}


def loss_and_gradients(
    function, head, targets, *, trained=("hidden", "weight", "bias"), scale=0.7, **options
):
    """The loss, and its gradients by the tensors named in ``trained``, of a copy of the head."""
    leaves = {name: getattr(head, name).detach().clone() for name in ("hidden", "weight", "bias")}
    if options.get("bias") is True:
        options["bias"] = leaves["bias"]
    else:
        trained = tuple(name for name in trained if name != "bias")
    for name in trained:
        leaves[name].requires_grad_()
    loss = function(leaves["hidden"], leaves["weight"], targets, **options)
    return loss.detach(), torch.autograd.grad(loss * scale, [leaves[name] for name in trained])


def plain_cross_entropy(hidden, weight, targets, *, reduction="mean", **options):
    return F.cross_entropy(full_logits(hidden, weight, **options), targets, reduction=reduction)


def assert_equals_float64(head, targets, tolerance=1e-5, chunk=None, **options):
    ours = loss_and_gradients(linear_cross_entropy, head, targets, chunk=chunk, **options)
    wide = type(head)(*map(double, head))
    exact = loss_and_gradients(plain_cross_entropy, wide, targets, **options)
    assert relative_error(ours[0], exact[0]) < tolerance
    for grad, expected in zip(ours[1], exact[1], strict=True):
        assert relative_error(grad, expected) < max(tolerance, 1.5 * torch.finfo(grad.dtype).eps)


@pytest.mark.parametrize(
    ("chunk", "reduction", "products"),
    [(None, "mean", 3), (7, "sum", 3), ((7, 5), "mean", 4), (7, "none", 4)],
)
def test_number_of_products(chunk, reduction, products):
    head = make_head(40, 31)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()

    def step():
        linear_cross_entropy(hidden, weight, head.targets, chunk=chunk, reduction=reduction).sum().backward()

    assert count_products(step, 40, 31, 24) == products


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunk", [None, 1, 40])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 11), (7, 1003), (123, 252), (300, 1003)])
def test_equals_full_logits(rows, vocab, chunk, name):
    head = make_head(rows, vocab)
    targets = torch.where(head.mask, head.targets, -100)
    if rows * (chunk or rows) <= 10_000 or chunk != 1:
        assert_equals_float64(head, targets, chunk=chunk, **OPTIONS[name])


def test_a_vocabulary_of_many_tiles():
    head = make_head(600, 4099, 16)
    assert_equals_float64(head, head.targets, **OPTIONS["all"])


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(hidden_dtype, weight_dtype):
    head = make_head(50, 101)
    head = head._replace(
        hidden=head.hidden.to(hidden_dtype),
        weight=head.weight.to(weight_dtype),
        bias=head.bias.to(weight_dtype),
    )
    both_wide = hidden_dtype == weight_dtype == torch.float64
    assert_equals_float64(head, head.targets, 1e-12 if both_wide else 1e-5, bias=True, chunk=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_the_backward_outside(dtype):
    head = make_head(50, 101)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(hidden, weight, head.targets)
    ours = torch.autograd.grad(loss, (hidden, weight))
    exact = loss_and_gradients(plain_cross_entropy, type(head)(*map(double, head)), head.targets, scale=1.0)
    assert loss.dtype == torch.float32
    for grad, expected in zip(ours, exact[1], strict=True):
        assert grad.dtype == torch.float32
        assert relative_error(grad, expected) < torch.finfo(dtype).eps


@pytest.mark.parametrize("trained", [("weight",), ("weight", "bias"), ("hidden", "weight")])
def test_only_what_is_trained_gets_a_gradient(trained):
    head = make_head(50, 101)
    ours = loss_and_gradients(linear_cross_entropy, head, head.targets, trained=trained, bias=True)[1]
    exact = loss_and_gradients(plain_cross_entropy, head, head.targets, trained=trained, bias=True)[1]
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_same_value_as_without_gradient():
    head = make_head(600, 1003)
    trained = linear_cross_entropy(head.hidden, head.weight.clone().requires_grad_(), head.targets)
    logprobs = linear_logprobs(head.hidden, head.weight, head.targets).logprobs
    assert trained == -logprobs.sum() / 600


def test_confident_tokens_keep_their_gradients():
    """p = 1 - 1e-3 ... 1 - 1e-12, each alone, where onehot - p would round to nothing."""
    for exponent in range(3, 13):
        hidden = torch.tensor([[1.0, 0.5]])
        weight = torch.randn(40, 2, generator=torch.Generator().manual_seed(exponent)) * 0.1
        wide = weight.double()
        others = torch.cat((wide[:7], wide[8:])) @ hidden.double()[0]
        weight[7, 0] = float(others.logsumexp(0) + exponent * 2.302585092994046 - 0.5 * wide[7, 1])
        leaves = [x.double().requires_grad_() for x in (hidden, weight)]
        logits = leaves[0] @ leaves[1].t()
        gap = torch.cat((logits[:, :7], logits[:, 8:]), 1).logsumexp(1) - logits[:, 7]
        exact = F.softplus(gap, threshold=1e9).sum()
        assert 0.5 < exact.item() * 10**exponent < 2
        expected = torch.autograd.grad(exact, leaves)
        ours = [x.requires_grad_() for x in (hidden, weight)]
        loss = linear_cross_entropy(*ours, torch.tensor([7]))
        assert relative_error(loss.detach(), exact.detach()) < 1e-4
        for grad, reference in zip(torch.autograd.grad(loss, ours), expected, strict=True):
            assert relative_error(grad, reference) < 1e-4


def test_logits_that_rise_by_hundreds_from_tile_to_tile():
    """The reference of the exponentials moves, and what was kept before it moved must follow."""
    head = make_head(64, 2500, 16)
    weight = head.weight * torch.where(torch.arange(2500) < 1024, 0.1, 40.0)[:, None]
    assert_equals_float64(head._replace(weight=weight), head.targets % 1024, chunk=40)


def test_forbidden_tokens_have_no_nan():
    head = make_head(40, 53)
    bias = torch.where(torch.arange(53) % 3 == 0, -INFINITY, head.bias)
    targets = torch.where(head.targets % 3 == 0, head.targets + 1, head.targets)
    allowed = bias.isfinite()
    _, (by_hidden, by_weight, by_bias) = loss_and_gradients(
        linear_cross_entropy, head._replace(bias=bias), targets, bias=True, chunk=16
    )
    short = head._replace(weight=head.weight[allowed], bias=bias[allowed])
    _, exact = loss_and_gradients(plain_cross_entropy, short, allowed.cumsum(0)[targets] - 1, bias=True)
    for a, b in zip((by_hidden, by_weight[allowed], by_bias[allowed]), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not by_weight[~allowed].any()
    assert not by_bias[~allowed].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_counts(reduction, rows):
    head = make_head(5, 11)
    hidden, weight = head.hidden[:rows].requires_grad_(), head.weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full((rows,), -100), reduction=reduction)
    assert loss.isnan() if reduction == "mean" else loss == 0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert not grad.any()


def test_ignored_rows_are_never_read():
    head = make_head(20, 31)
    hidden = head.hidden.clone()
    hidden[~head.mask] = float("nan")
    targets = torch.where(head.mask, head.targets, -100)
    ours = loss_and_gradients(linear_cross_entropy, head._replace(hidden=hidden), targets)
    clean = loss_and_gradients(linear_cross_entropy, head, targets)
    assert ours[0] == clean[0]
    for a, b in zip(ours[1], clean[1], strict=True):
        assert torch.equal(a, b)


def test_backward_twice_through_a_retained_graph():
    head = make_head(50, 101)
    hidden, weight, bias = (x.requires_grad_() for x in (head.hidden, head.weight, head.bias))
    loss = linear_cross_entropy(hidden, weight, head.targets, bias=bias, chunk=16)
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()  # the caller's own by now
    second = torch.autograd.grad(loss, (hidden, weight, bias), torch.tensor(2.0))
    for a, b in zip(kept, second, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_gradients_accumulate_as_elsewhere():
    head = make_head(50, 101)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, head.targets), weight)[0]
    for _ in range(2):
        linear_cross_entropy(hidden, weight, head.targets).backward()
    loss = linear_cross_entropy(hidden, weight, head.targets)
    (loss + linear_cross_entropy(hidden * 1.0, weight, head.targets)).backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 4 * once)


@pytest.mark.parametrize("trained", [("weight",), ("hidden", "weight")])
def test_a_second_derivative_is_refused(trained):
    head = make_head(10, 11)
    leaves = [getattr(head, name).requires_grad_() for name in trained]
    loss = linear_cross_entropy(head.hidden, head.weight, head.targets)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_nan_in_hidden_gives_the_plain_result():
    head = make_head(10, 31)
    head.hidden[3, 2] = float("nan")
    loss, (by_hidden, by_weight) = loss_and_gradients(linear_cross_entropy, head, head.targets, chunk=4)
    assert loss.isnan()
    assert by_weight.isnan().all()
    assert torch.equal(by_hidden.isnan().any(1), torch.arange(10) == 3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpoint(reentrant):
    head = make_head(50, 101)
    leaves = [x.requires_grad_() for x in (head.hidden, head.weight, head.bias)]

    def function(hidden, weight, bias):
        return linear_cross_entropy(torch.tanh(hidden), weight, head.targets, bias=bias, chunk=16)

    plain = torch.autograd.grad(function(*leaves), leaves)
    checkpoint(function, *leaves, use_reentrant=reentrant).backward()
    for leaf, expected in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, expected)


def test_only_the_gradient_has_the_weights_size(monkeypatch):
    monkeypatch.setattr("memhead.products.ONEDNN_BYTES", 1 << 10)  # of which oneDNN makes new memory
    rows, vocab, features, chunk = 600, 900, 16, 10
    head = make_head(rows, vocab, features)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()

    def step():
        torch.autograd.grad(linear_cross_entropy(hidden, weight, head.targets, chunk=chunk), (hidden, weight))

    step()
    large = [size for size in allocations(step) if size > chunk * vocab * 4]
    assert large.count(vocab * features * 4) == 1
    assert large.count(rows * features * 4) <= 2  # the direction and the gradient
    assert len(large) <= 3


def test_planned_block_keeps_to_the_plan():
    head = make_head(1024, 32768, 8)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()
    peak = peak_bytes(
        lambda: linear_cross_entropy(hidden, weight, head.targets).backward(), torch.device("cpu")
    )
    assert 64 << 20 <= peak < 80 << 20


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("bias_grad", [True, False])
def test_opcheck(masked, bias_grad):
    head = make_head(20, 31)
    mask = head.mask if masked else torch.ones_like(head.mask)
    arguments = (
        head.hidden.requires_grad_(),
        head.weight.requires_grad_(),
        head.targets,
        head.bias.requires_grad_(bias_grad),
        mask,
        [0.5, 5.0],
        [True, bias_grad],
        7,
        "torch",
        torch.float32,
    )
    torch.library.opcheck(
        summed_logprobs_op,
        arguments,
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_dynamic",
        ),
    )


def test_no_rows_leave_the_gradient_of_the_weight_at_zero():
    """Whatever was in its memory before: torch fills it with NaN here."""
    weight = torch.ones(7, 4, requires_grad=True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        loss = linear_cross_entropy(
            torch.ones(0, 4), weight, torch.zeros(0, dtype=torch.long), reduction="sum"
        )
        (grad,) = torch.autograd.grad(loss, weight)
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(grad, torch.zeros(7, 4))
