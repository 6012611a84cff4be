"""Masked rows where counting them costs a synchronisation, as on a GPU: the first are launched before the count."""

from __future__ import annotations

import pytest
import torch

from memhead import core, linear_cross_entropy, linear_logprobs
from memhead.masking import ALL, KeptRows, known_part
from tests.memhead.reference import double, full_logprobs, make_head
from tests.memhead.test_logprobs import SWEEPS, assert_equals_float64, options_of, run

ROWS = 100
KEPT = {"none": 0, "one": 1, "fewer": 17, "as many": 40, "more": 70, "all": ROWS}
UNASKED = [None, 40, ROWS - 1, ROWS, 1000]


def mask_of(kept: int, seed: int = 0) -> torch.Tensor:
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(ROWS, dtype=torch.bool).index_fill_(0, order[:kept], True)


@pytest.fixture(params=UNASKED)
def unasked(request, monkeypatch):
    """How many rows are launched before the count."""
    monkeypatch.setattr(core, "unasked_rows", lambda *_, **__: request.param)
    return request.param


@pytest.mark.parametrize("first", UNASKED)
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_parts_are_the_kept_rows_in_their_order(kept, first):
    mask = mask_of(kept)
    rows = KeptRows(mask, first)
    values, back, seen = torch.arange(1.0, ROWS + 1), None, []
    for part in rows.parts():
        taken = part.take(values)
        seen += taken[taken > 0].tolist()
        back = part.put(taken.clone(), ROWS, back)
    expected = torch.where(mask, values, 0.0)
    assert seen == values[mask].tolist()
    assert torch.equal(back, expected)
    assert rows.count == (ALL if first is not None and first >= ROWS else kept)
    again = known_part(mask, rows.count)
    assert torch.equal(again.put(again.take(values).clone(), ROWS, None), expected)


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("kept", [k for k in KEPT.values() if k])
def test_equals_full_logits(unasked, kept, sweep):
    head = make_head(ROWS, 131)._replace(mask=mask_of(kept))
    for chunk in (None, (7, 64)):
        assert_equals_float64(head, "all", sweep, chunk)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_what_masked_rows_hold_does_not_matter(unasked, kept, sweep, softcap):
    """NaN in hidden, temperature and upstream, targets of no token, and a bias whose exponential is infinite."""
    head = make_head(ROWS, 131)._replace(mask=mask_of(kept))
    head = head._replace(bias=head.bias + 1000)
    out = ~head.mask
    spoilt = head._replace(
        hidden=head.hidden.masked_fill(out[:, None], torch.nan),
        targets=head.targets.masked_fill(out, -100),
        temperature=head.temperature.masked_fill(out, torch.nan),
        grad_logprobs=head.grad_logprobs.masked_fill(out, torch.nan),
        grad_entropy=head.grad_entropy.masked_fill(out, torch.nan),
    )
    clean, dirty = (
        run(linear_logprobs, h, options_of(h, "all") | {"softcap": softcap}, sweep, entropy=True)
        for h in (head, spoilt)
    )
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[1], clean[1])
    for leaf, grad in clean[2].items():
        assert not grad.isnan().any(), leaf
        assert torch.equal(dirty[2][leaf], grad), leaf


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_every_output(unasked, kept):
    head = make_head(ROWS, 131)._replace(mask=mask_of(kept))
    names = ["log_sum_sq_probs", "mean_logits", "is_top1"]
    arguments = (head.hidden, head.weight, head.targets)
    result = linear_logprobs(*arguments, mask=head.mask, entropy=True, extra_outputs=names)
    plain = linear_logprobs(*arguments, entropy=True, extra_outputs=names)
    for value, whole in zip(result, plain, strict=True):
        assert value.dtype == whole.dtype
        torch.testing.assert_close(value, torch.where(head.mask, whole, torch.zeros_like(whole)))


@pytest.mark.parametrize("kept", [k for k in KEPT.values() if k])
def test_cross_entropy(unasked, kept):
    head = make_head(ROWS, 131)._replace(mask=mask_of(kept))
    labels = head.targets.masked_fill(~head.mask, -100)
    hidden = head.hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, head.weight, labels)
    loss.backward()
    wide = double(head.hidden).requires_grad_()
    logprobs, _ = full_logprobs(wide, double(head.weight), head.targets, mask=head.mask)
    expected = -logprobs.sum() / kept
    expected.backward()
    torch.testing.assert_close(loss.double(), expected)
    torch.testing.assert_close(hidden.grad.double(), wide.grad, atol=1e-6, rtol=1e-5)
