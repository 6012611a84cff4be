"""Where one sum gives way to another: references that move, float16 operands, ties between tokens."""

from __future__ import annotations

import itertools

import pytest
import torch

from memhead import linear_cross_entropy, linear_logprobs
from memhead.statistics import LOWEST, UNSET, FoldSpec, finish, headroom, new_statistics, restore_infinity
from tests.memhead.reference import double, full_logits, full_logprobs, make_head, relative_error

EXTRA = ("log_sum_sq_probs", "mean_logits", "is_top1")
COLUMNS = 6  # of a tile


# References that move


def staircase(heights, seed=0):
    """Logits (6, V): a tile of COLUMNS for each height, all within 2 of it; and the targets, in the tiles by turns.

    The first token of a tile is always its highest, so that a rise between two tiles is what the heights say.
    """
    random = torch.Generator().manual_seed(seed)
    below = 2 * torch.rand(6, len(heights), COLUMNS, generator=random, dtype=torch.float64)
    below[:, :, 0] = 0.0
    logits = torch.tensor(heights, dtype=torch.float64)[None, :, None] - below
    # Never a tile's highest: the others' reference is what moves.
    targets = torch.arange(6) % len(heights) * COLUMNS + 3
    return logits.flatten(1), targets


RISES = (0.5, 3.9, 4.1, 7.0, 11.5, 19.0, 19.9, 20.1, 21.0, 25.0, 30.0, 45.0)
STAIRS = {
    **{f"a rise of {rise}": (0.0, rise) for rise in RISES},
    **{f"a fall of {rise}": (rise, 0.0) for rise in (3.0, 21.0, 45.0)},
    "many small rises": tuple(19.0 * step for step in range(6)),
    "many great rises": tuple(21.0 * step for step in range(6)),
    "up and down": (0.0, 20.5, 1.0, 41.5, 41.0, 63.0),
    "from far below": (-300.0, -299.0, -270.0),
    "from far above": (300.0, 321.0, 310.0),
}


def everything(hidden, weight, targets, chunk, upstream):
    result = linear_logprobs(hidden, weight, targets, entropy=True, extra_outputs=EXTRA, chunk=chunk)
    loss = (result.logprobs * upstream[0] + result.entropy * upstream[1]).sum()
    return result, torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("stairs", STAIRS)
def test_sums_survive_a_reference_that_moves(stairs):
    """In float64, where a term of e^-30 is seen. Hidden states are an identity, so that the weight is the logits."""
    logits, targets = staircase(STAIRS[stairs])
    hidden = torch.eye(6, dtype=torch.float64).requires_grad_()
    weight = logits.t().contiguous().requires_grad_()
    random = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, 6, generator=random, dtype=torch.float64)
    result, grads = everything(hidden, weight, targets, (4, COLUMNS), upstream)

    leaves = [double(hidden).requires_grad_(), double(weight).requires_grad_()]
    logp = (leaves[0] @ leaves[1].t()).log_softmax(1)
    logprobs = logp.gather(1, targets[:, None]).squeeze(1)
    entropy = -(logp.exp() * logp).sum(1)
    expected = torch.autograd.grad((logprobs * upstream[0] + entropy * upstream[1]).sum(), leaves)
    exact = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(result.logprobs, logprobs, **exact)
    torch.testing.assert_close(result.entropy, entropy, **exact)
    torch.testing.assert_close(result.log_sum_sq_probs, (2 * logp).logsumexp(1), **exact)
    torch.testing.assert_close(result.mean_logits, logits.mean(1), **exact)
    assert not result.is_top1.any()
    for ours, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rise", RISES)
def test_a_summed_loss_survives_it_too(rise):
    """Its exponentials are kept against the reference of their own tile."""
    logits, targets = staircase((0.0, rise, rise / 2))
    leaves = [torch.eye(6, dtype=torch.float64), logits.t().contiguous(), logits.new_zeros(logits.shape[1])]
    results = []
    for ours in (True, False):
        hidden, weight, bias = (leaf.clone().requires_grad_() for leaf in leaves)
        if ours:
            loss = linear_cross_entropy(
                hidden, weight, targets, bias=bias, reduction="sum", chunk=(4, COLUMNS)
            )
        else:
            loss = torch.nn.functional.cross_entropy(hidden @ weight.t() + bias, targets, reduction="sum")
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


# Halves as operands, as on a GPU


@pytest.fixture
def half_operands(monkeypatch):
    """Halves enter the products as they do on a GPU, with float32 results; torch has no such product on a CPU.

    Yields the dtypes that products were added to.
    """
    from memhead import core, products, sweep
    from memhead.backends import torch as backend

    added_to = []

    def tile_product(a, b, buffer):
        out = buffer[: a.shape[0] * b.shape[1]].view(a.shape[0], b.shape[1])
        return out.copy_(a.float() @ b.float())

    def add_product(acc, a, b, *, first):
        added_to.append(acc.dtype)
        assert a.dtype == b.dtype != torch.float32
        assert a.isfinite().all(), "more than float16 holds"
        # A single product may be rounded by itself, and float16's is scaled before.
        assert acc.dtype == torch.float32 or (first and a.dtype == torch.bfloat16)
        return acc.copy_(a.float() @ b.float()) if first else acc.add_(a.float() @ b.float())

    for module in (products, core, sweep):
        monkeypatch.setattr(module, "operand_dtype", lambda compute, device: compute)
    monkeypatch.setattr(sweep, "add_product", add_product)
    monkeypatch.setattr(backend, "tile_product", tile_product)
    monkeypatch.setattr(backend, "brings_memory", lambda *_: False)
    return added_to


def in_half(head, upstream, entropy_upstream, *, chunk=(16, 23), **options):
    """Values and gradients (hidden, weight, bias) by memhead in halves, and by full logits in float64."""
    found = []
    for function, wide in ((linear_logprobs, False), (full_logprobs, True)):
        leaves = [
            (double(x) if wide else x.clone()).requires_grad_() for x in (head.hidden, head.weight, head.bias)
        ]
        given = {"entropy": True, "chunk": chunk} if not wide else {}
        logprobs, entropy = function(leaves[0], leaves[1], head.targets, bias=leaves[2], **given, **options)[
            :2
        ]
        loss = (logprobs * head.grad_logprobs * upstream).sum()
        if entropy_upstream:
            loss = loss + (entropy * head.grad_entropy * entropy_upstream).sum()
        found.append((logprobs, entropy, *torch.autograd.grad(loss, leaves)))
    return found


@pytest.mark.usefixtures("half_operands")
@pytest.mark.parametrize(
    ("upstream", "entropy_upstream"), [(1.0, 0.0), (1e-3, 0.0), (200.0, 0.0), (1e-3, 1e-2), (1e-2, 1e-3)]
)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "logit_scale": 1.5, "softcap": 8.0}], ids=str)
def test_float16_operands_through_both_sweeps(options, upstream, entropy_upstream):
    """Whatever the size of what arrives: the largest is brought to 1 before the products, and back after them."""
    head = make_head(50, 101, 24, torch.float16)
    ours, exact = in_half(head, upstream, entropy_upstream, **options)
    assert ours[0].dtype == torch.float32
    assert relative_error(ours[0], exact[0]) < 1e-5
    assert relative_error(ours[1], exact[1]) < 1e-5
    for name, grad, wanted in zip(("hidden", "weight", "bias"), ours[2:], exact[2:], strict=True):
        assert grad.dtype == torch.float16
        assert relative_error(grad, wanted) < 3e-3, name


@pytest.mark.usefixtures("half_operands")
def test_an_upstream_gradient_too_small_for_float16_reaches_the_weight():
    """Times probabilities it is as small as float16's steps, of 6e-8; times large states it is a sum that fits."""
    head = make_head(50, 101, 24, torch.float16)
    head = head._replace(hidden=head.hidden * 64, weight=head.weight / 64)
    ours, exact = in_half(head, 1e-6, 0.0)
    assert relative_error(ours[3], exact[3]) < 1e-2


@pytest.mark.parametrize(("rows", "single"), [(16, 15), (4, 0)])
def test_a_bfloat16_gradient_is_summed_wide_where_it_is_a_sum(half_operands, rows, single):
    """The backward pass takes four times a tile's rows: all 50, of 7 columns each of 15 times, or 16 of them."""
    head = make_head(50, 101, 24, torch.bfloat16)
    ours, exact = in_half(head, 1.0, 0.5, chunk=(rows, 23))
    for name, grad, wanted in zip(("hidden", "weight", "bias"), ours[2:], exact[2:], strict=True):
        assert relative_error(grad, wanted) < 1e-2, name
    assert half_operands.count(torch.bfloat16) == single


@pytest.mark.usefixtures("half_operands")
def test_float16_gradients_of_nothing_are_nothing():
    head = make_head(20, 31, 24, torch.float16)
    ours, _ = in_half(head, 0.0, 0.0)
    assert not any(grad.any() for grad in ours[2:])


@pytest.mark.usefixtures("half_operands")
@pytest.mark.parametrize("rise", [2.0, 3.9, 4.1, 6.0, 11.0, 30.0])
def test_float16_exponentials_are_renewed_before_they_overflow(rise):
    """Four above the reference at most, which lies seven below the highest: e^11 = 59874, of 65504."""
    logits, targets = staircase((0.0, rise, 0.0))
    # float16 would round a logit: a sum of four parts, each with few digits, says it better.
    coarse = (logits * 8).round() / 8
    hidden = torch.eye(6).half().requires_grad_()
    weight = coarse.t().half().requires_grad_()
    result = linear_logprobs(hidden, weight, targets, entropy=True, chunk=(4, COLUMNS))
    loss = result.logprobs.sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    wide = [double(hidden).requires_grad_(), double(weight).requires_grad_()]
    logprobs, entropy = full_logprobs(*wide, targets)
    torch.testing.assert_close(result.logprobs.double(), logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    for ours, wanted in zip(grads, torch.autograd.grad(logprobs.sum(), wide), strict=True):
        assert relative_error(ours, wanted) < 3e-3


def test_a_reference_never_lets_an_exponential_leave_its_dtype():
    """By the numbers of each dtype: the highest exponential before a reference is renewed, and the lowest kept."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        shift, lazy, depth = headroom(dtype)
        assert torch.tensor(shift + lazy).exp().item() < torch.finfo(dtype).max
        assert torch.tensor(shift - depth).double().exp().item() > torch.finfo(dtype).tiny
    assert headroom(torch.float16) == (7.0, 4.0, 4.0)
    assert headroom(torch.bfloat16) == headroom(torch.float32) == (0.0, 20.0, 50.0)


def test_what_is_forbidden_lies_below_every_real_logit():
    values = torch.tensor([LOWEST, LOWEST / 100, -1e24, -1e20, 0.0], dtype=torch.float64)
    assert restore_infinity(values).tolist() == [-torch.inf, -torch.inf, -1e24, -1e20, 0.0]
    assert LOWEST < UNSET < -1e24


def test_what_is_not_wanted_has_no_elements():
    assert FoldSpec(1.0, 0.0, 1.0).wanted == [False] * 4
    stats = new_statistics(3, torch.empty(0), torch.float32)
    assert stats.shape == (9, 3)
    rows = finish(stats, 5, FoldSpec(1.0, 0.0, 1.0))
    assert [len(values) for values in rows] == [3, 0, 0, 0, 0, 3]
    assert rows.is_top1.dtype == torch.bool
    every = finish(stats, 5, FoldSpec(1.0, 0.0, 1.0, True, True, True, True))
    assert [len(values) for values in every] == [3] * 6


# Ties


@pytest.mark.parametrize("chunk", [None, (4, 3), (4, 5), (4, 100)])
def test_the_first_of_equals_is_the_most_likely_as_argmax_has_it(chunk):
    """Every pair of places, within a tile and in two."""
    places = list(itertools.combinations(range(9), 2))
    logits = torch.zeros(len(places), 9)
    for row, pair in enumerate(places):
        logits[row, list(pair)] = 2.0
    hidden, weight = torch.eye(len(places)), logits.t().contiguous()
    for which in (0, 1):
        targets = torch.tensor([pair[which] for pair in places])
        found = linear_logprobs(hidden, weight, targets, extra_outputs=("is_top1",), chunk=chunk).is_top1
        assert torch.equal(found, logits.argmax(1) == targets)
        assert bool(found.all()) == (which == 0)
    neither = torch.tensor([next(v for v in range(9) if v not in pair) for pair in places])
    found = linear_logprobs(hidden, weight, neither, extra_outputs=("is_top1",), chunk=chunk).is_top1
    assert not found.any()


def test_all_equal_is_a_uniform_distribution():
    for vocab in (1, 2, 7):
        result = linear_logprobs(
            torch.zeros(vocab, 3),
            torch.ones(vocab, 3),
            torch.arange(vocab),
            entropy=True,
            extra_outputs=EXTRA,
            chunk=(2, 3),
        )
        log = torch.tensor(float(vocab)).log()
        torch.testing.assert_close(result.logprobs, -log.expand(vocab))
        torch.testing.assert_close(result.entropy, log.expand(vocab))
        torch.testing.assert_close(result.log_sum_sq_probs, -log.expand(vocab))
        assert result.is_top1.tolist() == [True] + [False] * (vocab - 1)


def test_logits_are_scaled_capped_and_tempered_in_that_order():
    head = make_head(20, 31, 24, torch.float64)
    options = {"logit_scale": 0.7, "softcap": 3.0, "temperature": 1.7}
    expected = full_logits(head.hidden, head.weight, head.bias, **options)
    by_hand = 3.0 * torch.tanh(0.7 * (head.hidden @ head.weight.t() + head.bias) / 3.0) / 1.7
    torch.testing.assert_close(expected, by_hand)
    ours = linear_logprobs(head.hidden, head.weight, head.targets, bias=head.bias, **options).logprobs
    torch.testing.assert_close(ours, by_hand.log_softmax(1).gather(1, head.targets[:, None]).squeeze(1))


def test_a_product_that_keeps_nothing_takes_the_whole_vocabulary_and_one_that_keeps_it_a_tile(monkeypatch):
    """Where a kernel folds a tile without writing it, as on some GPUs; here it is said so of torch's product."""
    from memhead import sweep
    from memhead.backends import torch as backend

    widths, fold_product = [], backend.fold_product

    def watched(x, w, buffer, *rest):
        widths.append(len(w))
        return fold_product(x, w, x.new_empty(len(x) * len(w)), *rest)

    monkeypatch.setattr(backend, "fold_product", watched)
    head = make_head(4, 11, 8)
    for whole, grad, expected in (
        (True, False, [11]),
        (True, True, [5, 5, 1]),
        (False, False, [5, 5, 1]),
        (False, True, [5, 5, 1]),
    ):
        monkeypatch.setattr(sweep.Work, "whole_at_once", property(lambda self, whole=whole: whole))
        linear_logprobs(head.hidden.requires_grad_(grad), head.weight, head.targets, chunk=(4, 5))
        assert widths == expected
        widths.clear()


@pytest.mark.parametrize("entropy", [False, True])
def test_the_gradient_of_transposed_rows_is_contiguous_as_a_compiler_is_told(entropy):
    head = make_head(40, 31)
    hidden = head.hidden.t().contiguous().t().requires_grad_()
    assert not hidden.is_contiguous()
    found = linear_logprobs(hidden, head.weight, head.targets, entropy=entropy)
    (grad,) = torch.autograd.grad(found.logprobs.sum() + (found.entropy.sum() if entropy else 0), hidden)
    assert grad.is_contiguous()
