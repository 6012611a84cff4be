"""linear_cross_entropy has the semantics of torch.nn.functional.cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memhead import linear_cross_entropy
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
