"""The vocabulary split over real processes equals the unsplit head."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from memhead import linear_cross_entropy, linear_logprobs, planning
from memhead.own_rows import even_sizes, own_cross_entropy, own_logprobs, part_of
from memhead.parallel import vocab_parallel_cross_entropy, vocab_parallel_logprobs
from tests.memhead.reference import Head, make_head, relative_error

OPTIONS = {
    "plain": {},
    "everything": {
        "bias": True,
        "mask": True,
        "temperature": True,
        "softcap": 5.0,
        "logit_scale": 0.5,
        "entropy": True,
    },
    "metrics": {
        "entropy": True,
        "temperature": 0.7,
        "extra_outputs": ("log_sum_sq_probs", "mean_logits", "is_top1"),
    },
    "forbidden": {"bias": True, "entropy": True},
}
SPLITS = {2: [(40, 63), (1, 102)], 3: [(40, 13, 50), (101, 1, 1)]}
VOCAB = 103


def evaluate(
    function, head: Head, options: dict, *, trainable: bool, entropy_gradient: bool, **further
) -> dict:
    leaves = {
        "hidden": head.hidden.clone().requires_grad_(),
        "weight": head.weight.clone().requires_grad_(trainable),
    }
    options = {k: getattr(head, k) if v is True and k != "entropy" else v for k, v in options.items()}
    if "bias" in options:
        leaves["bias"] = options["bias"] = options["bias"].clone().requires_grad_(trainable)
    chunk = (16 if len(head.hidden) < 100 else 64, 9)  # a tile costs messages, which take longest here
    result = function(leaves["hidden"], leaves["weight"], head.targets, chunk=chunk, **options, **further)
    loss = (result.logprobs * head.grad_logprobs)[result.logprobs.isfinite()].sum()
    if entropy_gradient:
        loss = loss + (result.entropy * head.grad_entropy).sum()
    loss.backward()
    values = {name: value.detach() for name, value in result._asdict().items() if value is not None}
    return values | {f"gradient by {name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def head_of(name: str, dtype: torch.dtype, rows: int) -> Head:
    head = make_head(rows, VOCAB, dtype=dtype)
    if name == "forbidden":  # a whole process's part among them, and some targets
        bias = head.bias.clone()
        bias[38:60] = float("-inf")
        head = head._replace(bias=bias)
    return head


def work(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for split in SPLITS[world]:
        start = sum(split[:rank])
        mine = slice(start, start + split[rank])
        for name in OPTIONS:
            for trainable in (False, True):
                for dtype in (torch.float32, torch.bfloat16):
                    compare(name, mine, trainable, dtype)
                    if name == "everything":
                        # As on a GPU, which is given rows before it is asked how many a mask keeps: 256 for
                        # a weight of 40 rows, 128 for larger ones.
                        with pytest.MonkeyPatch.context() as patch:
                            patch.setitem(planning.UNASKED, "cpu", 256 * 40 * 24)
                            for rows in (50, 300):
                                compare(name, mine, trainable, dtype, rows)
    compare_own(rank, world)
    head = make_head(4, 11)
    with pytest.raises(ValueError, match=f"targets contains {11 * world}, outside the vocabulary"):
        vocab_parallel_logprobs(head.hidden, head.weight, torch.full((4,), 11 * world))
    for sizes in ([7, 11, 11, 11], [7, 12, 13][:world]):  # too many; rows that are not there
        with pytest.raises(ValueError, match=rf"sizes=\[7, 1.*11 at place {rank}; leave it out"):
            vocab_parallel_logprobs(head.hidden, head.weight, head.targets, sizes=sizes)
    compare_told_sizes(rank, world)
    gradients_add_up_wide()
    dist.destroy_process_group()


def compare_told_sizes(rank: int, world: int) -> None:
    """The same to the bit where the sizes are known, without a message about them."""
    head = make_head(20, VOCAB)
    mine = part_of(VOCAB)
    asked = vocab_parallel_logprobs(head.hidden, head.weight[mine], head.targets)
    z_loss = {"z_loss": 0.1}
    asked_loss = vocab_parallel_cross_entropy(head.hidden, head.weight[mine], head.targets, **z_loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memhead.parallel._sizes", None)
        told = {"sizes": even_sizes(VOCAB)}
        found = vocab_parallel_logprobs(head.hidden, head.weight[mine], head.targets, **told)
        loss = vocab_parallel_cross_entropy(head.hidden, head.weight[mine], head.targets, **z_loss, **told)
    assert sum(told["sizes"]) == VOCAB
    assert torch.equal(found.logprobs, asked.logprobs)
    assert torch.equal(loss, asked_loss)


def gradients_add_up_wide() -> None:
    """Those of hidden states in half precision are rounded once, after the sum over the processes."""
    head, reduced, all_reduce = make_head(20, VOCAB, dtype=torch.bfloat16), [], dist.all_reduce
    hidden = head.hidden.clone().requires_grad_()

    def recorded(x, *given, **options):
        reduced.append((x.shape, x.dtype))
        return all_reduce(x, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", recorded)
        vocab_parallel_logprobs(hidden, head.weight[part_of(VOCAB)], head.targets).logprobs.sum().backward()
    assert (hidden.shape, torch.float32) in reduced
    assert hidden.grad.dtype == torch.bfloat16


def compare(name: str, mine: slice, trainable: bool, dtype: torch.dtype, rows: int = 50) -> None:
    head = head_of(name, dtype, rows)
    options = OPTIONS[name]
    how = {"trainable": trainable, "entropy_gradient": bool(options.get("entropy")) and trainable}
    whole = evaluate(linear_logprobs, head, options, **how)
    part = evaluate(
        vocab_parallel_logprobs, head._replace(weight=head.weight[mine], bias=head.bias[mine]), options, **how
    )
    assert part.keys() == whole.keys()
    for key, value in part.items():
        expected = whole[key][mine] if key in ("gradient by weight", "gradient by bias") else whole[key]
        assert value.dtype == expected.dtype, key
        if key == "is_top1":
            assert torch.equal(value, expected), key
            continue
        finite = expected.isfinite()
        assert torch.equal(value[~finite], expected[~finite]), key
        bound = 1e-5 if value.dtype == torch.float32 else 3 * torch.finfo(value.dtype).eps
        error = relative_error(value[finite], expected[finite])
        assert error < bound, (key, name, mine, trainable, dtype, error)


def compare_own(rank: int, world: int) -> None:
    """Rows of its own for every process, for one none: log-probabilities, entropy, cross entropy with z-loss."""
    ends = (0, 7, 19, 19)[: world + 1]
    head = make_head(ends[-1], VOCAB)
    mine, part = slice(ends[rank], ends[rank + 1]), part_of(VOCAB)
    assert gathered_sizes(part) == ([52, 51] if world == 2 else [35, 34, 34])
    targets = head.targets.clone()
    targets[3] = -100

    def logprobs(function, h, w, b, labels, g, e):
        found = function(h, w, labels.clamp(min=0), bias=b, entropy=True, temperature=0.7)
        return found.logprobs, (found.logprobs * g).sum() + (found.entropy * e).sum()

    def losses(function, h, w, b, labels, g, e):
        found = function(h, w, labels, bias=b, z_loss=0.1, softcap=9.0, logit_scale=0.5)
        return found, (found * g).sum()

    whole_losses = functools.partial(linear_cross_entropy, reduction="none")
    for what, own, whole in (
        (logprobs, own_logprobs, linear_logprobs),
        (losses, own_cross_entropy, whole_losses),
    ):
        found, expected = [], []
        for function, rows, columns, into in (
            (own, mine, part, found),
            (whole, slice(None), slice(None), expected),
        ):
            leaves = [
                x.clone().requires_grad_()
                for x in (head.hidden[rows], head.weight[columns], head.bias[columns])
            ]
            values, loss = what(
                function, *leaves, targets[rows], head.grad_logprobs[rows], head.grad_entropy[rows]
            )
            loss.backward()
            into += [values.detach(), *(leaf.grad for leaf in leaves)]
        for value, reference, cut in zip(found, expected, (mine, mine, part, part), strict=True):
            if value.numel():
                assert relative_error(value, reference[cut]) < 1e-5, (what.__name__, rank, world)


def gathered_sizes(part: slice) -> list[int]:
    sizes = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, part.stop - part.start)
    return sizes


@pytest.mark.parametrize(
    ("vocabulary", "sizes"), [(103, [35, 34, 34]), (104, [35, 35, 34]), (105, [35] * 3), (2, [1, 1, 0])]
)
def test_parts_are_as_even_as_they_can_be(monkeypatch, vocabulary, sizes):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    assert even_sizes(vocabulary) == sizes
    parts = []
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        parts += range(vocabulary)[part_of(vocabulary)]
    assert parts == list(range(vocabulary))


@pytest.mark.parametrize("world", [2, 3])
def test_equals_the_unsplit_head(world, tmp_path):
    mp.set_forkserver_preload(["memhead.own_rows", "pytest"])  # each process is a fork of one that has these
    how = "forkserver" if sys.platform == "linux" else "spawn"
    mp.start_processes(work, args=(world, str(tmp_path / "store")), nprocs=world, start_method=how)


def test_z_loss_of_ignored_rows_and_under_autocast(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        head = make_head(5, 40)
        targets = torch.where(torch.arange(5) == 2, -100, head.targets)
        head.hidden[2] = float("nan")
        found = []
        for function in (
            vocab_parallel_cross_entropy,
            functools.partial(linear_cross_entropy, reduction="none"),
        ):
            leaves = [head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()]
            with torch.autocast("cpu", torch.bfloat16):
                losses = function(*leaves, targets, z_loss=0.1)
            found.append((losses, *torch.autograd.grad(losses.sum(), leaves)))
        for ours, plain in zip(*found, strict=True):
            assert relative_error(ours, plain) < (1e-6 if ours is found[0][0] else 1e-2)
    finally:
        dist.destroy_process_group()


def test_bytes_and_probabilities_as_targets(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        head = make_head(3, 200)
        targets = torch.tensor([156, 7, 199])  # 156 is -100 as a byte
        losses = vocab_parallel_cross_entropy(head.hidden, head.weight, targets.byte())
        expected = linear_cross_entropy(head.hidden, head.weight, targets, reduction="none")
        torch.testing.assert_close(losses, expected)
        with pytest.raises(ValueError, match=r"targets has dtype torch\.float32"):
            vocab_parallel_cross_entropy(head.hidden, head.weight, targets.float())
    finally:
        dist.destroy_process_group()


class Operators(TorchDispatchMode):
    """The names of all operators that are called within."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.names.append(operator.overloadpacket.__name__)
        return operator(*arguments, **(options or {}))


def test_nothing_is_copied_from_python_while_processes_merge(tmp_path):
    """On a GPU each list of numbers is a copy for which Python waits, and the GPU then for Python: 0.5 ms each."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        head = make_head(40, VOCAB, dtype=torch.float32)
        hidden = head.hidden.clone().requires_grad_()

        def both_ways():
            options = {"sizes": [VOCAB], "chunk": (16, 9)}
            vocab_parallel_logprobs(hidden, head.weight, head.targets, **options).logprobs.sum().backward()

        both_ways()  # what is kept from the first call on is made
        with Operators() as seen:
            both_ways()
        assert seen.names.count("allreduce_") == 2 * 3 + 1  # two for each block of rows, one for the gradient
        assert "lift_fresh" not in seen.names
    finally:
        dist.destroy_process_group()
