"""Nothing larger than the planned chunk is ever allocated, except the gradients that must exist."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.measure import peak_bytes
from memhead import (
    chunked_linear,
    linear_cross_entropy,
    linear_logprobs,
    products,
    supported_logprobs,
    truncation_support,
)
from memhead.planning import plan_rows
from tests.memhead.allocations import allocations
from tests.memhead.reference import full_logprobs, make_head

ROWS, VOCAB, FEATURES = 600, 900, 16
CHUNK = (100, 90)
OPTIONS = {
    "plain": {},
    "entropy and metrics": {"entropy": True, "extra_outputs": ("log_sum_sq_probs", "mean_logits", "is_top1")},
    "mask": {"mask": True},
    "bias, softcap, scale": {"bias": True, "softcap": 5.0, "logit_scale": 0.5},
}


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """oneDNN's own block of a product scaled down as the chunks are here."""
    monkeypatch.setattr(products, "ONEDNN_BYTES", 10 * VOCAB * 4)


def step(head, loss_of, *, frozen: bool, backward: bool = True):
    """A forward and a backward pass as a function without arguments."""
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_(not frozen)

    def run():
        with torch.set_grad_enabled(backward):
            loss = loss_of(hidden, weight)
        if backward:
            torch.autograd.grad(loss, (hidden,) if frozen else (hidden, weight))

    run()  # what is allocated once and kept (the mask's type promotion tables, the profiler's own) is not counted
    return allocations(run)


def assert_within(
    sizes: list[int], chunk_bytes: int, hidden_sized: int, weight_sized: int, itemsize: int = 4
) -> None:
    """Beyond the chunk's bytes there are at most the given numbers of tensors of hidden's and of weight's size."""
    large = [size for size in sizes if size > chunk_bytes]
    of_hidden, of_weight = ROWS * FEATURES * itemsize, VOCAB * FEATURES * itemsize
    assert set(large) <= {of_hidden, of_weight}, f"{large} bytes, but a chunk holds {chunk_bytes}"
    assert large.count(of_hidden) <= hidden_sized
    assert large.count(of_weight) <= weight_sized


def test_the_watcher_sees_full_logits():
    head = make_head(ROWS, VOCAB, FEATURES)
    sizes = step(head, lambda h, w: full_logprobs(h, w, head.targets)[0].sum(), frozen=True)
    assert ROWS * VOCAB * 4 in sizes
    with pytest.raises(AssertionError, match="a chunk holds"):
        assert_within(sizes, CHUNK[0] * CHUNK[1] * 4, 2, 0)


def test_the_watcher_sees_inside_the_operator():
    head = make_head(ROWS, VOCAB, FEATURES)
    sizes = step(
        head, lambda h, w: linear_logprobs(h, w, head.targets, chunk=(ROWS, VOCAB))[0].sum(), frozen=True
    )
    assert ROWS * VOCAB * 4 in sizes


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", ["no gradient", "frozen", "trainable", "entropy gradient"])
def test_linear_logprobs(name, way):
    head = make_head(ROWS, VOCAB, FEATURES)
    options = {k: getattr(head, k) if v is True and k != "entropy" else v for k, v in OPTIONS[name].items()}
    if way == "entropy gradient":
        options["entropy"] = True

    def loss(hidden, weight):
        result = linear_logprobs(hidden, weight, head.targets, chunk=CHUNK, **options)
        return result.logprobs.sum() + (result.entropy.sum() if way == "entropy gradient" else 0.0)

    frozen = way != "trainable"
    sizes = step(head, loss, frozen=frozen, backward=way != "no gradient")
    # The direction and the gradient; where the backward pass adds the gradient up, it is what it added up.
    hidden_sized = 0 if way == "no gradient" else 2
    assert_within(sizes, CHUNK[0] * CHUNK[1] * 4, hidden_sized, 0 if frozen else 1)


@pytest.mark.parametrize("frozen", [True, False])
def test_half_precision_makes_no_wide_copy_of_the_weight(frozen):
    head = make_head(ROWS, VOCAB, FEATURES, torch.bfloat16)
    sizes = step(head, lambda h, w: linear_logprobs(h, w, head.targets, chunk=CHUNK)[0].sum(), frozen=frozen)
    wide_accumulator = ROWS * FEATURES * 4
    assert_within(
        [s for s in sizes if s != wide_accumulator],
        CHUNK[0] * CHUNK[1] * 4,
        3,
        0 if frozen else 1,
        itemsize=2,
    )
    # On a CPU torch multiplies a half by a float32 through two wide copies of hidden's size.
    assert sizes.count(wide_accumulator) <= 2


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_linear_cross_entropy(frozen, options):
    head = make_head(ROWS, VOCAB, FEATURES)
    chunk = 10 if options else CHUNK
    chunk_bytes = 10 * VOCAB * 4 if options else CHUNK[0] * CHUNK[1] * 4
    sizes = step(
        head, lambda h, w: linear_cross_entropy(h, w, head.targets, chunk=chunk, **options), frozen=frozen
    )
    assert_within(sizes, chunk_bytes, 4, 0 if frozen else 2)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunked_linear(frozen, reduction):
    head = make_head(ROWS, VOCAB, FEATURES)

    def loss(hidden, weight):
        return chunked_linear(
            hidden, weight, lambda z: torch.relu(z).square().mean(-1), reduction=reduction, chunk=10
        ).sum()

    # A trainable weight's gradient is added up in the forward pass and scaled in the backward.
    assert_within(step(head, loss, frozen=frozen), 10 * VOCAB * 4, 3, 0 if frozen else 2)


@pytest.mark.parametrize("rows", [1, 10, 100])
def test_a_samplers_support(rows):
    """Logits of as many rows as the chunk says, or as there are; then as many rows' own rows of the weight."""
    head, held = make_head(60, VOCAB * 10, 8), min(rows, 60)
    options = {"top_k": 5, "max_size": 8, "chunk": rows}
    assert (
        allocations(lambda: truncation_support(head.hidden, head.weight, **options))[0]
        == held * VOCAB * 10 * 4
    )
    head = make_head(60, 50, VOCAB)
    support = torch.arange(7).expand(60, 7)

    def score():
        with torch.no_grad():
            supported_logprobs(head.hidden, head.weight, head.targets, support, chunk=rows)

    assert allocations(score)[0] == held * 7 * VOCAB * 4


def test_planned_chunk_keeps_to_the_plan():
    """Without a chunk argument, on a head whose full logits would take 512 MiB."""
    head = make_head(4096, 32768, 8)
    hidden = head.hidden.requires_grad_()
    sizes = allocations(
        lambda: linear_logprobs(hidden, head.weight, head.targets, entropy=True)[0].sum().backward()
    )
    assert sizes[0] <= 16 << 20
    sizes = allocations(lambda: chunked_linear(hidden, head.weight, lambda z: z.square().mean(-1)).backward())
    assert sizes[0] <= 16 << 20


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("function", ["chunked_linear", "linear_cross_entropy"])
def test_everything_together_stays_under_128_mib(function, frozen):
    """All that is held at the peak, gradients included, which are small here."""
    head = make_head(1024, 32768, 8)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_(not frozen)

    def step():
        if function == "linear_cross_entropy":
            linear_cross_entropy(hidden, weight, head.targets).backward()
        else:
            chunked_linear(
                hidden, weight, lambda z, t: cross_entropy(z, t, reduction="none"), head.targets
            ).backward()

    assert peak_bytes(step, torch.device("cpu")) < 128 << 20


def test_a_trained_heads_larger_chunks_do_not_raise_its_peak():
    """The backward pass holds the weight's gradient twice, so the forward pass may hold as much."""
    rows = plan_rows(10**6, 128256, trained=True)
    assert rows == 128 > plan_rows(10**6, 128256) == 32
    assert 4 * rows * 128256 <= 128256 * 512
