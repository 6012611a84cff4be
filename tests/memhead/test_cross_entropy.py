"""linear_cross_entropy has the semantics of torch.nn.functional.cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memhead import chunked_linear, linear_cross_entropy
from tests.memhead.reference import double, full_logits, make_head, relative_error

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap and scale": {"softcap": 4.0, "logit_scale": 0.5},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "all": {"bias": True, "softcap": 4.0, "logit_scale": 0.5, "label_smoothing": 0.2, "z_loss": 1e-2},
}


def expected_loss(
    hidden, weight, targets, reduction, *, label_smoothing=0.0, z_loss=0.0, ignore_index=-100, **logits
):
    z = full_logits(hidden, weight, **logits)
    counted = targets != ignore_index
    loss = F.cross_entropy(
        z, targets, label_smoothing=label_smoothing, reduction="none", ignore_index=ignore_index
    )
    loss = loss + torch.where(counted, z_loss * z.logsumexp(-1).square(), 0.0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / counted.sum()}[reduction]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_equals_torch(name, reduction, frozen, ignore_index):
    head = make_head(57, 211)
    targets = torch.where(head.mask, head.targets, ignore_index)
    upstream = head.grad_logprobs if reduction == "none" else torch.tensor(0.7)
    results = []
    for convert, function in ((lambda x: x, linear_cross_entropy), (double, expected_loss)):
        leaves = [convert(head.hidden).clone().requires_grad_()]
        leaves += [convert(x).clone().requires_grad_(not frozen) for x in (head.weight, head.bias)]
        options = {k: leaves[2] if k == "bias" else v for k, v in OPTIONS[name].items()}
        loss = function(
            leaves[0], leaves[1], targets, reduction=reduction, ignore_index=ignore_index, **options
        )
        (loss * upstream).sum().backward()
        results.append((loss, *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(results[0][0].double(), results[1][0], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(results[0][1:], results[1][1:], strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}])
def test_nothing_counts(options):
    head = make_head(5, 11)
    hidden = head.hidden.requires_grad_()
    targets = torch.full((5,), -100)
    leaves = hidden, head.weight.requires_grad_(), head.bias.requires_grad_()
    mean = linear_cross_entropy(hidden, head.weight, targets, bias=head.bias, **options)
    assert mean.isnan()  # as torch has it
    assert not any(grad.any() for grad in torch.autograd.grad(mean, leaves))  # zeros, and no NaN
    total = linear_cross_entropy(hidden, head.weight, targets, reduction="sum", **options)
    assert total == 0
    assert not torch.autograd.grad(total, hidden)[0].any()
    each = linear_cross_entropy(hidden, head.weight, targets, reduction="none", **options)
    assert torch.equal(each, torch.zeros(5))


def test_bytes_as_targets():
    """In uint8 the token 156 equals -100."""
    head = make_head(3, 256)
    targets = torch.tensor([156, 7, 156])
    losses = [
        linear_cross_entropy(head.hidden, head.weight, t, reduction="none") for t in (targets, targets.byte())
    ]
    assert torch.equal(*losses)
    assert losses[0].all()


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-4}])
def test_leading_dimensions(options):
    head = make_head(12, 31)
    flat = linear_cross_entropy(head.hidden, head.weight, head.targets, reduction="none", **options)
    shaped = linear_cross_entropy(
        head.hidden.view(3, 4, -1), head.weight, head.targets.view(3, 4), reduction="none", **options
    )
    assert torch.equal(shaped, flat.view(3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "median"}, "reduction='median'"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"targets": torch.tensor([0, 11])}, "targets contains 11"),
        ({"targets": torch.tensor([0, 11]), "z_loss": 0.1}, "targets contains 11"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_refuses(change, message):
    head = make_head(2, 11)
    arguments = {"targets": head.targets} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(head.hidden, head.weight, **arguments)


def both(function, head, targets, upstream=None, **options):
    """The results and gradients of hidden, weight and bias: ours in float32, the expected in float64."""
    found = []
    for convert, compute in ((lambda x: x, linear_cross_entropy), (double, function)):
        leaves = [convert(x).clone().requires_grad_() for x in (head.hidden, head.weight, head.bias)]
        given = {k: convert(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        loss = compute(leaves[0], leaves[1], targets, bias=leaves[2], **given)
        (loss if upstream is None else loss * upstream).sum().backward()
        found.append((loss, *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def torchs(hidden, weight, targets, *, bias, class_weights=None, **options):
    targets = targets if targets.dtype == torch.int64 else targets.to(hidden.dtype)
    return F.cross_entropy(hidden @ weight.T + bias, targets, weight=class_weights, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_class_weights_and_soft_targets_equal_torchs(reduction, label_smoothing, soft, weighted):
    head = make_head(57, 211)
    targets = torch.where(head.mask, head.targets, -100)
    if soft:
        targets = torch.rand(57, 211).softmax(-1)
    weights = torch.rand(211) + 0.1 if weighted else None
    upstream = head.grad_logprobs if reduction == "none" else None
    both(
        torchs, head, targets, upstream,
        class_weights=weights, label_smoothing=label_smoothing, reduction=reduction,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_probabilities_of_no_rows(reduction):
    head = make_head(1, 7)
    hidden = head.hidden[:0].clone().requires_grad_()
    loss = linear_cross_entropy(hidden, head.weight, torch.rand(0, 7), reduction=reduction)
    expected = F.cross_entropy(hidden @ head.weight.T, torch.rand(0, 7), reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_class_weights_of_another_dtype(dtype, label_smoothing):
    """They neither round the sum that a mean is divided by, nor widen the loss."""
    head = make_head(57, 211)
    weights = (torch.rand(211) + 0.1).to(dtype)
    arguments = head.hidden, head.weight, head.targets
    ours, same = (
        linear_cross_entropy(*arguments, class_weights=x, label_smoothing=label_smoothing)
        for x in (weights, weights.float())
    )
    torch.testing.assert_close(ours, same, rtol=1e-6, atol=0)


def test_class_weights_leave_the_z_loss_alone():
    head = make_head(57, 211)
    targets, weights = torch.where(head.mask, head.targets, -100), torch.rand(211) + 0.1

    def expected(hidden, weight, targets, *, bias, class_weights, z_loss):
        z = hidden @ weight.T + bias
        counted = z.logsumexp(-1)[targets != -100].square()
        return F.cross_entropy(z, targets, weight=class_weights) + z_loss * counted.mean()

    both(expected, head, targets, class_weights=weights, z_loss=0.01)


def test_the_z_loss_of_probabilities_in_float64():
    head = make_head(8, 11, dtype=torch.float64)
    targets, weights = torch.rand(8, 11, dtype=torch.float64), torch.rand(11)
    z = head.hidden @ head.weight.T
    expected = F.cross_entropy(z, targets, weight=weights.double()) + 0.1 * z.logsumexp(-1).square().mean()
    loss = linear_cross_entropy(head.hidden, head.weight, targets, class_weights=weights, z_loss=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("z_loss", [0.0, 0.02])
def test_what_is_logged_beside_the_loss(reduction, z_loss):
    head = make_head(57, 211)
    targets = torch.where(head.mask, head.targets, -100)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()
    options = {"reduction": reduction, "z_loss": z_loss, "softcap": 4.0, "bias": head.bias}
    found = linear_cross_entropy(
        hidden, weight, targets, extra_outputs=("lse", "z_loss", "predicted"), chunk=10, **options
    )
    z = full_logits(double(hidden), double(weight), bias=double(head.bias), softcap=4.0).detach()
    lse = torch.where(head.mask, z.logsumexp(-1), 0.0)
    assert relative_error(found.lse, lse) < 1e-6
    assert torch.equal(found.predicted[head.mask], z.argmax(-1)[head.mask])
    assert not found.predicted[~head.mask].any()
    each = z_loss * lse.square()
    wanted = {"none": each, "sum": each.sum(), "mean": each.sum() / head.mask.sum()}[reduction]
    torch.testing.assert_close(found.z_loss.double(), wanted, rtol=1e-5, atol=1e-7)
    assert not any(x.requires_grad for x in found[1:])
    plain = linear_cross_entropy(hidden, weight, targets, chunk=10, **options)
    torch.testing.assert_close(found.loss, plain, rtol=1e-5, atol=1e-5)
    grads = [
        torch.autograd.grad(loss.sum(), (hidden, weight), retain_graph=True) for loss in (found.loss, plain)
    ]
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) < 1e-5
    alone = linear_cross_entropy(hidden, weight, targets, extra_outputs=["lse"], **options)
    assert alone.z_loss is None
    assert alone.predicted is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"targets": torch.zeros(4, 10)},
            r"targets has shape \(4, 10\).*integers \(4,\) or probabilities \(4, 11\)",
        ),
        ({"class_weights": [1.0] * 11}, "class_weights is a list; pass a tensor"),
        ({"extra_outputs": "lse"}, "extra_outputs='lse' is a text"),
        ({"class_weights": torch.ones(10)}, r"class_weights has shape \(10,\); it must be \(11,\)"),
        (
            {"extra_outputs": ("entropy",)},
            r"extra_outputs contains \['entropy'\]; known are lse, z_loss, predicted",
        ),
        ({"targets": torch.tensor([0, 11, 0, 0]), "class_weights": torch.ones(11)}, "targets contains 11"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    head = make_head(4, 11)
    arguments = {"hidden": head.hidden, "weight": head.weight, "targets": head.targets} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize(("chunk", "rows"), [(None, None), (5, 5), ((6, 7), 6)])
def test_what_runs_in_torch_holds_as_many_rows_as_are_asked_for(monkeypatch, chunk, rows):
    held = []

    def recorded(hidden, weight, transform, *row_args, **options):
        def seen(logits, *given):
            held.append(len(logits))
            return transform(logits, *given)

        return chunked_linear(hidden, weight, seen, *row_args, **options)

    monkeypatch.setattr("memhead.cross_entropy.chunked_linear", recorded)
    head = make_head(12, 20, 4)
    linear_cross_entropy(head.hidden, head.weight, head.targets, label_smoothing=0.1, chunk=chunk)
    assert held == ([12] if rows is None else [min(rows, 12 - start) for start in range(0, 12, rows)])
