"""The operators under torch.compile: one graph, the same numbers, no recompilation for another N."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memhead import chunked_linear, linear_cross_entropy, linear_logprobs
from memhead.ops import logprobs_backward_op, logprobs_op
from tests.memhead.reference import make_head

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def operator_arguments(head, *, direction, masked=False, update=False, half=False):
    weight = head.weight.bfloat16() if half else head.weight
    b = torch.randn(weight.shape[0], 3, dtype=weight.dtype) if update else None
    hidden = torch.cat((head.hidden, head.hidden[:, :3]), 1) if update else head.hidden
    return (
        hidden.bfloat16() if half else hidden,
        weight,
        b,
        head.targets,
        head.bias,
        head.mask if masked else None,
        head.temperature,
        [0.5, 5.0, 1.0],
        [True, True, False, True],
        [7, 13],
        "torch",
        weight.dtype,
        direction,
    )


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("variant", [{}, {"masked": True}, {"update": True}, {"half": True}])
def test_opcheck_forward(variant, trainable):
    arguments = operator_arguments(make_head(20, 31), direction=True, **variant)
    arguments[0].requires_grad_()
    for tensor in (arguments[1], arguments[4], *([arguments[2]] if arguments[2] is not None else [])):
        tensor.requires_grad_(trainable)
    torch.library.opcheck(logprobs_op, arguments, test_utils=TESTS)


@pytest.mark.parametrize(
    "wanted", [[True, True, True, True], [True, False, False, False], [False, True, False, True]]
)
@pytest.mark.parametrize("masked", [True, False])
def test_opcheck_backward(wanted, masked):
    head = make_head(20, 31)
    forward = operator_arguments(head, direction=False, masked=masked, update=True)
    logprobs, entropy, lse_others, _, kept = logprobs_op(*forward)[5:]
    *inputs, _ = forward
    upstream = head.grad_logprobs, head.grad_entropy
    arguments = (*inputs, *upstream, logprobs, entropy, lse_others, kept, wanted)
    torch.library.opcheck(logprobs_backward_op, arguments, test_utils=TESTS)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_fullgraph_gives_the_same_numbers_for_any_number_of_rows(trainable, masked):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    weight = make_head(1, 101).weight.requires_grad_(trainable)

    def loss(hidden, targets, mask):
        # The model around the head is what gets compiled with it.
        result = linear_logprobs(
            torch.tanh(hidden), weight, targets, entropy=True, mask=mask if masked else None, temperature=0.7
        )
        return (result.logprobs.exp() - 0.1 * result.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    counted = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    for rows in (64, 65, 100, 7):
        head = make_head(rows, 101, seed=rows)
        hidden = head.hidden.requires_grad_()
        leaves = (hidden, weight) if trainable else (hidden,)
        values = [function(hidden, head.targets, head.mask) for function in (loss, compiled, counted)]
        eager, ours, _ = (torch.autograd.grad(value, leaves) for value in values)
        assert torch.equal(values[0], values[1])
        for a, b in zip(eager, ours, strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1, "recompiled for another number of rows"


def test_compiled_without_being_told_that_sizes_change():
    """torch.compile first takes N for a constant, recompiles at the second N, and never again."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    weight = make_head(1, 101).weight
    compiled = torch.compile(
        lambda h, t: linear_logprobs(h, weight, t).logprobs.sum(), fullgraph=True, backend=count
    )
    for rows in (64, 65, 100, 7, 333):
        head = make_head(rows, 101)
        compiled(head.hidden.requires_grad_(), head.targets).backward()
    assert len(graphs) == 2


def test_compiled_with_columns_of_hidden():
    """The gradient of half-precision hidden states is contiguous, as the compiler was promised."""
    torch._dynamo.reset()
    head = make_head(40, 97, 16, dtype=torch.bfloat16)
    hidden = head.hidden.t().contiguous().t().requires_grad_()

    def loss(h):
        return linear_logprobs(h, head.weight, head.targets, entropy=True).entropy.sum()

    eager = torch.autograd.grad(loss(hidden), hidden)[0]
    compiled = torch.compile(loss, backend="aot_eager")(hidden)
    assert torch.equal(torch.autograd.grad(compiled, hidden)[0], eager)


class Counter:
    """A compiler's backend that runs the graph unchanged, and counts the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph


def assert_compiles(loss, leaves_of, *, fullgraph, graphs):
    """Equal to eager, forward and backward, for rising and falling numbers of rows, in so many graphs."""
    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(loss, fullgraph=fullgraph, dynamic=True, backend="aot_eager")
    counted = torch.compile(loss, fullgraph=fullgraph, dynamic=True, backend=counter)
    for rows in (64, 65, 700, 7):
        head = make_head(rows, 101, seed=rows)
        hidden = head.hidden.requires_grad_()
        targets = torch.where(head.mask, head.targets, -100)
        leaves = leaves_of(hidden)
        values = [function(hidden, targets) for function in (loss, compiled, counted)]
        eager, *others = (torch.autograd.grad(value.sum(), leaves) for value in values)
        for value, grads in zip(values[1:], others, strict=True):
            assert torch.equal(values[0], value)
            for a, b in zip(eager, grads, strict=True):
                torch.testing.assert_close(a, b)
    assert counter.graphs == graphs


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_in_one_graph(trainable, reduction):
    head = make_head(1, 101)
    weight, bias = head.weight.requires_grad_(trainable), head.bias.requires_grad_(trainable)

    def loss(hidden, targets):
        return linear_cross_entropy(
            torch.tanh(hidden), weight, targets, bias=bias, softcap=5.0, reduction=reduction
        )

    assert_compiles(loss, lambda h: (h, weight, bias) if trainable else (h,), fullgraph=True, graphs=1)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("name", ["chunked", "label smoothing"])
def test_a_transform_is_one_break_of_the_graph(trainable, name):
    weight = make_head(1, 101).weight.requires_grad_(trainable)

    def loss(hidden, targets):
        state = torch.tanh(hidden)
        if name == "label smoothing":
            return 2 * linear_cross_entropy(state, weight, targets, label_smoothing=0.1)
        return 2 * chunked_linear(
            state, weight, lambda z, t: F.cross_entropy(z, t, reduction="none"), targets, chunk=16
        )

    # What is before the break and what is after it, in each function that contains it.
    graphs = {"chunked": 2, "label smoothing": 4}[name]
    assert_compiles(loss, lambda h: (h, weight) if trainable else (h,), fullgraph=False, graphs=graphs)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"memhead\.chunked_linear"):
        torch.compile(loss, fullgraph=True, backend="eager")(torch.ones(3, 24), torch.zeros(3).long())
