"""Supports of many rows, each as long as it is, against the rectangle of memhead.support."""

from __future__ import annotations

import pytest
import torch

from memhead import ragged_support as ragged
from memhead import supported_logprobs, truncation_support
from memhead.integrations.handle import Truncated
from memhead.ragged_support import Support, Truncation
from tests.memhead.reference import make_head

OPTIONS = {"temperature": 0.3, "softcap": 30.0, "logit_scale": 1.3}


def peaked(rows=60, vocab=211):
    """Rows from nearly certain to nearly flat."""
    head = make_head(rows, vocab)
    return head._replace(hidden=head.hidden * torch.linspace(0.01, 6.0, rows)[:, None])


def test_a_row_is_looked_for_with_little_room_first(monkeypatch):
    """A rectangle over the whole vocabulary is made for those alone that need it."""
    head, rooms, search = peaked(rows=3), [], ragged.truncation_support

    def recorded(*given, max_size, **options):
        rooms.append(max_size)
        return search(*given, max_size=max_size, **options)

    monkeypatch.setattr(ragged, "truncation_support", recorded)
    Support.find(head.hidden, head.weight, head.targets, Truncation(top_k=3))
    assert rooms == [1024]


def test_calls_of_the_head_take_their_rows_in_turn():
    head, truncation = peaked(), Truncation(top_k=5)
    whole = Support.find(head.hidden, head.weight, head.targets, truncation)
    expected = whole.logprobs(head.hidden, head.weight, head.targets)
    parts = [slice(0, 7), slice(7, 19), slice(19, 60)]
    finding, given = Truncated(truncation), Truncated(truncation, whole)
    for calls in (finding, given):
        found = [
            calls.score(head.hidden[p], head.weight, head.targets[p], entropy=False).logprobs for p in parts
        ]
        torch.testing.assert_close(torch.cat(found), expected.logprobs)
    assert [len(support.size) for support in finding.found] == [7, 12, 41]
    assert not given.found


def test_found_in_parts_and_with_more_room(monkeypatch):
    head = peaked()
    monkeypatch.setattr(ragged, "_ROWS", 7)
    monkeypatch.setattr(ragged, "_USUAL", 4)  # some rows keep more, and are looked for again
    found = Support.find(
        head.hidden, head.weight, head.targets, Truncation(top_p=0.8), bias=head.bias, **OPTIONS
    )
    whole = truncation_support(
        head.hidden, head.weight, top_p=0.8, bias=head.bias, include=head.targets, **OPTIONS
    )
    for ids, expected in zip(found.padded(), whole, strict=True):
        assert set(ids[ids >= 0].tolist()) == set(expected[expected >= 0].tolist())
    assert found.size.min() <= 2  # the likeliest, and the one drawn
    assert found.size.max() > 6


def test_joined_and_scattered_by_hand():
    def of(*rows):
        size = torch.tensor([len(row) for row in rows])
        tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        return Support(tokens, size.cumsum(0) - size, size)

    whole = Support.joined([of([5], [7, 8]), of([1, 2, 3]), of([9], [4, 6])])
    assert whole.padded().tolist() == [[5, -1, -1], [7, 8, -1], [1, 2, 3], [9, -1, -1], [4, 6, -1]]
    assert whole.rows(slice(1, 3)).padded().tolist() == [[7, 8, -1], [1, 2, 3]]
    placed = of([5], [7, 8]).scattered(torch.tensor([2, 0]), 4)
    assert placed.padded().tolist() == [[7, 8], [-1, -1], [5, -1], [-1, -1]]


@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients_are_those_of_the_rectangle(entropy):
    head = peaked()
    found = Support.find(head.hidden, head.weight, head.targets, Truncation(top_p=0.8), **OPTIONS)
    results = []
    for ours in (True, False):
        hidden, weight = (x.clone().requires_grad_() for x in (head.hidden + 0.01, head.weight))
        if ours:
            out = found.logprobs(hidden, weight, head.targets, entropy=entropy, **OPTIONS)
        else:
            out = supported_logprobs(hidden, weight, head.targets, found.padded(), entropy=entropy, **OPTIONS)
        loss = (out.logprobs * torch.arange(60)).sum() + (out.entropy.sum() if entropy else 0.0)
        results.append(
            (out.logprobs, *([out.entropy] if entropy else []), *torch.autograd.grad(loss, (hidden, weight)))
        )
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=2e-3)


def test_rows_and_joined():
    head = peaked()
    every = Support.find(head.hidden, head.weight, head.targets, Truncation(top_k=5))
    parts = [
        Support.find(head.hidden[rows], head.weight, head.targets[rows], Truncation(top_k=5))
        for rows in (slice(0, 20), slice(20, 60))
    ]
    order = torch.randperm(60)
    torch.testing.assert_close(Support.joined(parts).rows(order).padded(), every.rows(order).padded())
    assert len(every.rows(slice(3, 9))) == 6


def test_no_rows_at_all():
    head = peaked()
    none = slice(0, 0)
    found = Support.find(head.hidden[none], head.weight, head.targets[none], Truncation(top_p=0.5))
    out = found.logprobs(head.hidden[none], head.weight, head.targets[none], entropy=True)
    assert out.logprobs.shape == out.entropy.shape == (0,)


def test_another_number_of_rows():
    head = peaked()
    found = Support.find(head.hidden, head.weight, head.targets, Truncation(top_p=0.5))
    with pytest.raises(ValueError, match="hidden has 5 rows, the support 60"):
        found.logprobs(head.hidden[:5], head.weight, head.targets[:5])


def test_the_mean_ratio_of_a_later_policy_is_one():
    """Over draws from the truncated old policy; with probabilities of the whole vocabulary it is not."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 16), torch.randn(300, 16)
    later = hidden + 0.3 * torch.randn(1, 16)
    n = 20_000
    old = (hidden @ weight.T).log_softmax(-1)
    support = Support.find(hidden, weight, old.argmax(-1), Truncation(top_p=0.8))
    inside = torch.full_like(old, float("-inf")).index_fill(1, support.tokens.long(), 0.0)
    drawn = torch.multinomial((old + inside).softmax(-1), n, replacement=True)[0]
    rows = Support(support.tokens, support.begin.repeat(n), support.size.repeat(n))
    scores = [rows.logprobs(h.expand(n, -1), weight, drawn).logprobs for h in (hidden, later)]
    ratio = (scores[1] - scores[0]).exp()
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / n**0.5
    plain = ((later @ weight.T).log_softmax(-1) - old)[0, drawn].exp()
    assert abs(plain.mean() - 1) > 10 * plain.std() / n**0.5


def test_rows_that_were_not_looked_at():
    head = peaked()
    found = Support.find(head.hidden, head.weight, head.targets, Truncation(top_p=0.8))
    place = torch.arange(60).flip(0) * 2
    spread = found.scattered(place, 120)
    hidden, targets = head.hidden.repeat_interleave(2, 0).flip(0), head.targets.repeat_interleave(2).flip(0)
    out = spread.logprobs(hidden, head.weight, targets).logprobs
    assert (out[1::2] == 0).all()
    expected = found.logprobs(hidden[place], head.weight, targets[place]).logprobs
    torch.testing.assert_close(out[place], expected)
