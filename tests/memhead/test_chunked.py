"""chunked_linear: any row-wise transform equals autograd through full logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from memhead import chunked_linear
from memhead.chunked import _fold_gradient
from tests.memhead.products import count_products
from tests.memhead.reference import make_head, relative_error

TEACHER = make_head(1, 53, 12, seed=9).weight  # (V, H'), frozen


def cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none")


def label_smoothing(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)


def z_loss(logits, targets):
    return cross_entropy(logits, targets) + 1e-2 * logits.logsumexp(-1).square()


def focal(logits, targets):
    logp = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    return -((1 - logp.exp()) ** 2) * logp


def relu_mse(logits, targets):
    return (torch.relu(logits) - F.one_hot(targets, logits.shape[1]).to(logits.dtype)).square().mean(-1)


def hinge(logits, targets):
    return F.multi_margin_loss(logits, targets, reduction="none")


def jensen_shannon(logits, teacher_hidden):
    """The divergence from a teacher of which only the hidden states are kept."""
    p = logits.log_softmax(-1)
    q = (teacher_hidden @ TEACHER.to(teacher_hidden.dtype).t()).log_softmax(-1)
    middle = torch.logaddexp(p, q) - 0.6931471805599453
    return 0.5 * ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1))


class Calibrated(nn.Module):
    """A transform with its own parameters: a temperature, and a bias that the loss may not use."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.7, dtype=dtype))
        self.shift = nn.Parameter(torch.linspace(-1, 1, 53, dtype=dtype))
        self.unused = nn.Parameter(torch.zeros(3, dtype=dtype))

    def forward(self, logits, targets, row_weight):
        return row_weight * cross_entropy(logits / self.temperature + self.shift, targets)


TRANSFORMS = [cross_entropy, label_smoothing, z_loss, focal, relu_mse, hinge, jensen_shannon]


def reduced(losses, reduction):
    return {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}[reduction]()


def inputs(dtype, transform=cross_entropy, rows=29, seed=0):
    """Leaves by name (hidden, weight, bias, first row argument), the row argument being the teacher's or targets."""
    head = make_head(rows, 53, 12, dtype, seed=seed)
    row_arg = head.targets
    if transform is jensen_shannon:
        row_arg = make_head(rows, 53, 12, dtype, seed=8).hidden.requires_grad_()
    return (
        head.hidden.requires_grad_(),
        head.weight.requires_grad_(),
        head.bias.requires_grad_(),
        row_arg,
        head,
    )


def gradients(result, upstream, leaves):
    return torch.autograd.grad((result * upstream).sum(), [x for x in leaves if x.requires_grad])


@pytest.mark.parametrize(("chunk", "rows"), [(1, 1), (4, 4), (1000, 61)])
def test_no_more_rows_than_asked_for(chunk, rows):
    seen = []

    def transform(logits, targets):
        seen.append(len(logits))
        return F.cross_entropy(logits, targets, reduction="none")

    head = make_head(61, 32)
    chunked_linear(head.hidden, head.weight, transform, head.targets, chunk=chunk)
    assert max(seen) == rows
    assert sum(seen) >= 61


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("chunk", [None, 1, 8])
def test_equals_full_logits(transform, reduction, chunk):
    hidden, weight, bias, arg, head = inputs(torch.float32, transform)
    upstream = head.grad_logprobs if reduction == "none" else torch.tensor(0.37)
    actual = chunked_linear(hidden, weight, transform, arg, bias=bias, reduction=reduction, chunk=chunk)
    wide = [
        x.detach().double().requires_grad_() if x.is_floating_point() else x
        for x in (hidden, weight, bias, arg)
    ]
    expected = reduced(transform(F.linear(*wide[:3]), wide[3]), reduction)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        gradients(actual, upstream, (hidden, weight, bias, arg)),
        gradients(expected, upstream.double(), wide),
        strict=True,
    ):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [True, False])
def test_module_and_row_weights_get_their_gradients(reduction, frozen):
    results = []
    for dtype in (torch.float32, torch.float64):
        hidden, weight, bias, targets, head = inputs(dtype)
        weight.requires_grad_(not frozen)
        row_weight = head.temperature.to(dtype).requires_grad_()
        module = Calibrated(dtype)
        if dtype == torch.float32:
            loss = chunked_linear(
                hidden, weight, module, targets, row_weight, bias=bias, reduction=reduction, chunk=6
            )
        else:
            loss = reduced(module(F.linear(hidden, weight, bias), targets, row_weight), reduction)
        upstream = head.grad_logprobs.to(dtype) if reduction == "none" else 0.7
        (loss * upstream).sum().backward()
        leaves = (hidden, weight, bias, row_weight, module.temperature, module.shift, module.unused)
        results.append([leaf.grad for leaf in leaves])
    assert (results[0][1] is None) == frozen
    for ours, theirs in zip(*results, strict=True):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("reduction", "frozen", "no_grad", "products"),
    [
        ("mean", True, False, 2),
        ("sum", False, False, 3),
        ("none", True, False, 2),
        ("none", False, False, 4),
        ("sum", False, True, 1),
    ],
)
def test_number_of_products(reduction, frozen, no_grad, products):
    hidden, weight, _, targets, head = inputs(torch.float32)
    weight.requires_grad_(not frozen)

    def step():
        with torch.set_grad_enabled(not no_grad):
            loss = chunked_linear(hidden, weight, cross_entropy, targets, reduction=reduction, chunk=6)
        if not no_grad:
            (loss * head.grad_logprobs).sum().backward()

    assert count_products(step, 29, 53, 12) == products


def test_twice_in_one_graph():
    hidden, weight, bias, targets, _ = inputs(torch.float64)

    def total(function):
        state = hidden * 1.5
        return function(state, weight, targets) + 3 * function(state.square(), weight, targets)

    ours = total(lambda h, w, t: chunked_linear(h, w, cross_entropy, t, bias=bias, chunk=5))
    plain = total(lambda h, w, t: cross_entropy(F.linear(h, w, bias), t).mean())
    for a, b in zip(
        gradients(ours, 1.0, (hidden, weight, bias)),
        gradients(plain, 1.0, (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_backward_twice_through_a_retained_graph():
    hidden, weight, _, targets, _ = inputs(torch.float32)
    loss = chunked_linear(hidden, weight, cross_entropy, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_checkpoint(reentrant, reduction):
    hidden, weight, bias, targets, head = inputs(torch.float32)
    upstream = head.grad_logprobs if reduction == "none" else 1.0

    def function(h, w, b):
        return chunked_linear(torch.tanh(h), w, cross_entropy, targets, bias=b, reduction=reduction, chunk=6)

    plain = gradients(function(hidden, weight, bias), upstream, (hidden, weight, bias))
    (checkpoint(function, hidden, weight, bias, use_reentrant=reentrant) * upstream).sum().backward()
    for leaf, expected in zip((hidden, weight, bias), plain, strict=True):
        assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_rounds_only_at_the_end(dtype, reduction):
    hidden, weight, bias, targets, head = inputs(dtype)
    upstream = head.grad_logprobs if reduction == "none" else 1.0
    loss = chunked_linear(hidden, weight, z_loss, targets, bias=bias, reduction=reduction, chunk=6)
    assert loss.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = reduced(z_loss(F.linear(*wide), targets), reduction)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(
        gradients(loss, upstream, (hidden, weight, bias)), gradients(expected, upstream, wide), strict=True
    ):
        assert a.dtype == dtype
        assert relative_error(a, b) < 1.5 * torch.finfo(dtype).eps


def test_float16_gradient_above_its_range_in_the_making():
    """A gradient scaler multiplies the loss by 65536, more than float16 holds."""
    hidden, weight, _, targets, _ = inputs(torch.float16)
    by_hidden, by_weight = torch.autograd.grad(
        chunked_linear(hidden, weight, cross_entropy, targets) * 65536.0 * 1e-3, (hidden, weight)
    )
    assert by_hidden.isfinite().all()
    assert by_weight.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_with_the_backward_outside(reduction):
    hidden, weight, _, targets, head = inputs(torch.float32)
    upstream = head.grad_logprobs if reduction == "none" else 1.0
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_linear(hidden, weight, cross_entropy, targets, reduction=reduction, chunk=6)
    rounded = [x.detach().bfloat16().float().requires_grad_() for x in (hidden, weight)]
    expected = reduced(cross_entropy(F.linear(*rounded), targets), reduction)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    for a, b in zip(
        gradients(loss, upstream, (hidden, weight)), gradients(expected, upstream, rounded), strict=True
    ):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 1e-4


def test_leading_dimensions_and_no_rows():
    hidden, weight, _, targets, _ = inputs(torch.float32, rows=24)
    flat = chunked_linear(hidden, weight, cross_entropy, targets, reduction="none")
    shaped = chunked_linear(
        hidden.view(2, 3, 4, 12), weight, cross_entropy, targets.view(2, 3, 4), reduction="none"
    )
    assert torch.equal(shaped, flat.view(2, 3, 4))
    nothing = chunked_linear(hidden[:0], weight, cross_entropy, targets[:0], reduction="sum")
    by_hidden, by_weight = torch.autograd.grad(nothing, (hidden, weight))
    assert nothing == 0
    assert not by_hidden.any()
    assert not by_weight.any()
    assert chunked_linear(hidden[:0], weight, cross_entropy, targets[:0]).isnan()


def test_a_captured_tensor_that_would_lose_its_gradient_is_refused():
    hidden, weight, _, targets, _ = inputs(torch.float32)
    temperature = torch.tensor(2.0, requires_grad=True)
    for captured in (temperature, temperature.exp()):
        with pytest.raises(ValueError, match=r"captures a tensor of shape .* row_args"):
            chunked_linear(hidden, weight, lambda z, t, c=captured: cross_entropy(z / c, t), targets)
    chunked_linear(hidden, weight, lambda z, t: cross_entropy(z / temperature.detach(), t), targets)
    with torch.no_grad():
        chunked_linear(hidden, weight, lambda z, t: cross_entropy(z / temperature, t), targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform": lambda z, t: F.cross_entropy(z, t)}, r"transform returned \(\).*one value per row"),
        ({"transform": lambda z, t: None}, "transform returned NoneType"),
        ({"reduction": "median"}, "reduction='median'"),
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": (4, 4)}, r"chunk=\(4, 4\)"),
        ({"row_arg": torch.zeros(28)}, r"row_args\[0\] has shape \(28,\)"),
        ({"row_arg": 3}, r"row_args\[0\] has type int"),
    ],
)
def test_refuses(change, message):
    hidden, weight, _, targets, _ = inputs(torch.float32)
    transform = change.pop("transform", cross_entropy)
    row_arg = change.pop("row_arg", targets)
    with pytest.raises(ValueError, match=message):
        chunked_linear(hidden, weight, transform, row_arg, **change)


@pytest.mark.parametrize("upstream", [1.0, 1e-7])
def test_float16_products_of_a_gpu_do_not_flush_small_gradients(monkeypatch, upstream):
    """The scaling around float16 operands, with a GPU's wide-result product stood in for."""

    def product(a, b, out):
        return out.copy_(a.float() @ b.float())

    def add_product(acc, a, b, *, first):
        return product(a, b, acc) if first else acc.add_(a.float() @ b.float())

    monkeypatch.setattr("memhead.chunked.product", product)
    monkeypatch.setattr("memhead.chunked.add_product", add_product)
    head = make_head(9, 53, 12, torch.float16)
    by_logits = torch.randn(9, 53) * upstream * torch.logspace(0, -3, 9)[:, None]
    weight_grad, bias_grad = torch.zeros(53, 12), torch.zeros(53)
    by_hidden = _fold_gradient(
        by_logits, head.hidden, head.weight, torch.float16, weight_grad, bias_grad, torch.empty(9, 12)
    )
    for row, expected in zip(by_hidden, by_logits @ head.weight.float(), strict=True):
        assert relative_error(row, expected) < 2e-3
    assert relative_error(weight_grad, by_logits.t() @ head.hidden.float()) < 2e-3
    assert relative_error(bias_grad, by_logits.sum(0)) < 1e-5


def test_no_rows_have_no_gradient_where_the_caller_divides_by_their_number():
    """A mean over none of them: infinite times nothing is NaN."""
    weight = torch.ones(7, 4, requires_grad=True)
    loss = chunked_linear(torch.ones(0, 4), weight, lambda z: z.sum(-1), reduction="sum")
    (loss / torch.tensor(0.0)).backward()
    assert torch.equal(weight.grad, torch.zeros(7, 4))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_transform_runs_under_the_autocast_around_the_call(enabled):
    seen = []

    def transform(logits):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return logits.sum(-1)

    hidden = torch.ones(3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        chunked_linear(hidden, torch.ones(7, 4), transform)
    assert {found[0] for found in seen} == {enabled}
    assert not enabled or {found[1] for found in seen} == {torch.bfloat16}


@pytest.mark.parametrize(("trained", "chunks"), [(True, 2), (False, 8)])
def test_a_trained_weights_gradient_is_not_read_for_every_few_rows(trained, chunks):
    """16 MiB of logits are 32 rows here; of a trained weight a chunk has 128."""
    seen = []

    def transform(logits):
        seen.append(len(logits))
        return logits[:, 0]

    weight = torch.ones(131_072, 2, requires_grad=trained)
    chunked_linear(torch.ones(256, 2, requires_grad=True), weight, transform)
    assert seen == [256 // chunks] * chunks
