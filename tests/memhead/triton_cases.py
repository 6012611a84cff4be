"""Cases for test_triton.py; on a GPU: ``python -m pytest tests/memhead/triton_cases.py``."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from memhead import linear_logprobs
from memhead.backends import hopper_tile
from memhead.backends import torch as torch_backend
from memhead.backends import triton as triton_backend
from memhead.reference import full_logprobs
from memhead.statistics import FoldSpec, Stat, Tile, Upstream, new_statistics
from memhead.summed_op import summed_logprobs_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What the kernels of memhead.backends.hopper_* take; on a CPU, a half is widened before a product.
FUSED = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# Several blocks of a kernel and several tiles of a sweep on both devices. The interpreter runs
# each program of a launch in Python.
VOCABULARY = 900 if DEVICE == "cuda" else 360
ROWS, COLUMNS = (40, 900) if DEVICE == "cuda" else (9, 200)
WHOLE = (19, 403) if DEVICE == "cuda" else (11, 303)
# One unit in the last place: the interpreter truncates to half precision where a GPU rounds. In
# float32, exp(z) of |z| <= 80 magnifies the last place of z to 80 of its own.
ULP = {torch.float32: 80 * 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def _tile(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # A strided tile, as the last one of a vocabulary is, with neighbours that must survive.
    return (torch.randn(rows, columns, generator=generator) * 4).to(DEVICE)


def _spec(**kwargs: float) -> FoldSpec:
    plain = {"logit_scale": 1.0, "softcap": 0.0, "temperature": 1.0}
    return FoldSpec(**{**plain, **kwargs})  # type: ignore[arg-type]


SPECS = [
    _spec(),
    _spec(entropy=True, temperature=0.7),
    _spec(entropy=True, squares=True, total=True, top1=True, softcap=5.0, logit_scale=0.5),
]


@pytest.mark.parametrize("operand", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 37), (7, 1500)])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("extras", [False, True])
def test_fold_tile_is_its_twin(
    operand: torch.dtype, rows: int, columns: int, spec: FoldSpec, extras: bool
) -> None:
    targets = torch.arange(rows, device=DEVICE) * 31 % (2 * columns)  # in the first tile or in the second
    bias = temperature = None
    if extras:
        bias = torch.linspace(-3, 3, columns, device=DEVICE)
        bias[columns // 2] = float("-inf")
        temperature = torch.linspace(0.5, 2, rows, device=DEVICE)
    stats, accs, exps = [], [], []
    for backend in (torch_backend, triton_backend):
        s = new_statistics(rows, torch.empty(0, device=DEVICE), torch.float32)
        acc = torch.ones(rows, 19, device=DEVICE)
        for start, jump in ((0, 0.0), (columns, 30.0), (2 * columns, 0.0)):  # the jump moves the reference
            logits = _tile(rows, columns, start) + jump
            exps.append(
                backend.fold_tile(
                    logits,
                    s,
                    Tile(targets, start, bias, temperature, spec),
                    acc if start else None,
                    operand,
                    True,
                ).float()
            )
        stats.append(s)
        accs.append(acc)
    torch.testing.assert_close(stats[1], stats[0], rtol=1e-5, atol=1e-6 * columns + 1e-5)
    torch.testing.assert_close(accs[1], accs[0], rtol=1e-5, atol=0)
    for ours, twin in zip(exps[3:], exps[:3], strict=True):
        torch.testing.assert_close(ours, twin, rtol=ULP[operand], atol=1e-6)
    assert bool((stats[0][Stat.OTHERS] > 0).all()) or columns == 1


@pytest.mark.parametrize("operand", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 37), (5, 1000)])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_logit_gradient_is_its_twin(
    operand: torch.dtype, rows: int, columns: int, spec: FoldSpec, with_entropy: bool
) -> None:
    logprobs = -torch.logspace(-9, 1, rows, device=DEVICE)
    upstream = Upstream(
        grad_logprobs=torch.linspace(-1, 1, rows, device=DEVICE),
        grad_entropy=torch.linspace(1, 2, rows, device=DEVICE) if with_entropy else None,
        logprobs=logprobs,
        entropy=torch.linspace(0.1, 3, rows, device=DEVICE) if with_entropy else None,
        lse_others=torch.linspace(6, 9, rows, device=DEVICE),
    )
    targets = torch.arange(rows, device=DEVICE) * 31 % (2 * columns)
    results = [
        backend.logit_gradient(
            _tile(rows, columns, 1), Tile(targets, columns, None, None, spec), upstream, operand
        ).float()
        for backend in (torch_backend, triton_backend)
    ]
    torch.testing.assert_close(results[1], results[0], rtol=ULP[operand], atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_size", [1, 33, 1500])
def test_finish_direction_is_its_twin(dtype: torch.dtype, hidden_size: int) -> None:
    stats = new_statistics(4, torch.empty(0, device=DEVICE), torch.float32)
    stats[Stat.OTHERS] = torch.tensor([0.0, 1.0, 5.0, 1e5], device=DEVICE)  # 0: nothing else is possible
    stats[Stat.SLOPE] = torch.tensor([1.0, 0.5, 1.0, 0.1], device=DEVICE)
    rows = _tile(4, hidden_size, 2).to(dtype)
    results = []
    for backend in (torch_backend, triton_backend):
        out = torch.full((4, hidden_size), torch.nan, device=DEVICE, dtype=dtype)
        backend.finish_direction(_tile(4, hidden_size, 3), stats, rows, out)
        results.append(out)
    torch.testing.assert_close(results[1], results[0], rtol=ULP[dtype], atol=1e-7)


@pytest.fixture(params=["tiles", "one kernel"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels on tiles of products, and those of memhead.backends.hopper_*, which a CPU never gets."""
    if request.param == "tiles":
        return
    if DEVICE == "cuda" and not hopper_tile.multiprocessors(torch.device(DEVICE)):
        pytest.skip("not a GPU that they are for")
    if DEVICE == "cpu":
        monkeypatch.setattr(hopper_tile, "available", lambda *_: True)
        # Blocks that the interpreter is through with sooner, and of which these cases fill several.
        monkeypatch.setattr(hopper_tile, "BLOCK_ROWS", 8)
        monkeypatch.setattr(hopper_tile, "BLOCK_COLUMNS", 64)
        monkeypatch.setattr(hopper_tile, "BLOCK_K", 16)
        small = {"BLOCK_M": 8, "BLOCK_N": 64, "BLOCK_K": 16}
        monkeypatch.setattr(hopper_tile, "BLOCKS", {**hopper_tile.BLOCKS, **small})


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 1), (7, 11), WHOLE, (0, 11)])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_whole_op_against_float64(
    num_rows: int, vocab: int, softcap: float | None, trainable: bool, entropy_gradient: bool
) -> None:
    generator = torch.Generator().manual_seed(num_rows + vocab)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    hidden, weight, bias = draw(num_rows, 24), draw(vocab, 24), draw(vocab)
    if vocab > 5 and softcap is None:
        bias[3] = float("-inf")
    targets = (torch.arange(num_rows, device=DEVICE) * 7) % max(1, min(vocab, 3))
    temperature = torch.linspace(0.5, 1.5, num_rows, device=DEVICE)
    mask = torch.arange(num_rows, device=DEVICE) % 5 != 4
    grads = draw(num_rows), draw(num_rows) * entropy_gradient
    gradients = []
    values = []
    for exact in (False, True):
        leaves = [x.double() if exact else x for x in (hidden, weight, bias)]
        leaves = [x.detach().clone().requires_grad_(i == 0 or trainable) for i, x in enumerate(leaves)]
        if exact:
            out = full_logprobs(
                *leaves[:2], targets, bias=leaves[2], mask=mask, temperature=temperature, softcap=softcap,
                entropy=True,
            )  # fmt: skip
        else:
            out = linear_logprobs(
                *leaves[:2], targets, bias=leaves[2], mask=mask, temperature=temperature, softcap=softcap,
                entropy=True, chunk=(5, 150), backend="triton",
            )  # fmt: skip
        logprobs, entropy = out.logprobs, out.entropy
        values.append((logprobs, entropy))
        loss = (logprobs * grads[0]).sum()
        if entropy_gradient:
            loss = loss + (entropy * grads[1]).sum()
        loss.backward()
        gradients.append([x.grad for x in leaves if x.requires_grad])
    for ours, exact in zip(*values, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    for ours, exact in zip(*gradients, strict=True):
        assert (ours - exact).norm() <= 1e-5 * exact.norm() + 1e-9


@pytest.mark.usefixtures("kernels")
def test_gradient_wanted_or_not_gives_the_same_bits() -> None:
    hidden, weight = _tile(9, 16, 4) / 4, _tile(300, 16, 5) / 4
    targets = torch.arange(9, device=DEVICE)
    kwargs = {"chunk": (4, 130), "backend": "triton"}
    with_gradient = linear_logprobs(hidden.clone().requires_grad_(), weight, targets, **kwargs).logprobs
    without = linear_logprobs(hidden, weight, targets, **kwargs).logprobs
    assert torch.equal(with_gradient, without)


@pytest.mark.parametrize("kernels", ["one kernel"], indirect=True)
@pytest.mark.parametrize("entropy", [False, True])
def test_a_row_does_not_depend_on_its_tile(kernels: None, entropy: bool) -> None:
    """Where a row's blocks are merged at the end: other rows, other columns, a gradient or not, the same bits.

    (Rows stay where they are: at another place in a block the interpreter's own product has other bits.)
    """
    hidden, weight = (_tile(ROWS, 16, 4) / 2).to(FUSED), (_tile(COLUMNS, 16, 5) / 2).to(FUSED)
    targets = torch.arange(ROWS, device=DEVICE) * 20

    def run(rows: int, chunk: tuple[int, int] | None, gradient: bool) -> tuple[Tensor, ...]:
        x = hidden[:rows].clone().requires_grad_(gradient)
        out = linear_logprobs(x, weight, targets[:rows], entropy=entropy, chunk=chunk, backend="triton")
        return (out.logprobs, *([] if out.entropy is None else [out.entropy]))

    whole = run(ROWS, None, False)
    for rows, columns, gradient in itertools.product(
        sorted({1, 9, ROWS}), (COLUMNS, 64, COLUMNS * 2 // 3), (False, True)
    ):
        chunk = ROWS, columns
        for ours, first in zip(run(rows, chunk, gradient), whole, strict=True):
            assert torch.equal(ours, first[:rows]), (rows, chunk, gradient)


@pytest.mark.parametrize("kernels", ["one kernel"], indirect=True)
@pytest.mark.parametrize(("gradient", "folds"), [(False, 2), (True, 8)])
def test_without_gradient_the_vocabulary_is_one_tile(
    kernels: None, gradient: bool, folds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a tile is kept in that case, so a block of rows is one launch."""
    from memhead.backends import hopper_fold

    calls = []
    original = hopper_fold.fold_product
    monkeypatch.setattr(hopper_fold, "fold_product", lambda *args: calls.append(1) or original(*args))
    rows, vocabulary, chunk = (40, 900, (20, 256)) if DEVICE == "cuda" else (8, 200, (4, 64))
    hidden, weight = _tile(rows, 16, 4).to(FUSED).requires_grad_(gradient), _tile(vocabulary, 16, 5).to(FUSED)
    targets = torch.arange(rows, device=DEVICE)
    linear_logprobs(hidden, weight, targets, chunk=chunk, backend="triton")
    assert len(calls) == folds


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("level", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("jump", [-60.0, 60.0])
def test_logits_of_any_level(level: float, jump: float) -> None:
    """The reference starts from a guess and follows the maximum from tile to tile, up and down."""
    tile, middle = VOCABULARY // 3, VOCABULARY * 4 // 9
    hidden, weight = _tile(6, 16, 4) / 8, _tile(VOCABULARY, 16, 5) / 8
    bias = torch.where(torch.arange(VOCABULARY, device=DEVICE) < middle, level, level + jump)
    bias[:tile:7] = float("-inf")
    targets = torch.tensor([3, 1, middle - 1, middle, VOCABULARY - 1, middle + tile // 3], device=DEVICE)
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    ours = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    out = linear_logprobs(*ours[:2], targets, bias=ours[2], entropy=True, chunk=(4, tile), backend="triton")
    expected, entropy, *_ = full_logprobs(*exact[:2], targets, bias=exact[2], entropy=True)
    torch.testing.assert_close(out.logprobs.double(), expected, rtol=1e-5, atol=1e-5 * (1 + abs(level)))
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=1e-4, atol=1e-3)
    out.logprobs.sum().backward()
    expected.sum().backward()
    for x, y in zip(ours, exact, strict=True):
        assert (x.grad - y.grad).norm() <= 1e-4 * y.grad.norm()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("logit_scale", [0.0, -0.5, 3.0])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_logit_scales(logit_scale: float, softcap: float | None) -> None:
    hidden, weight = _tile(6, 16, 4) / 4, _tile(300, 16, 5) / 4
    targets = torch.tensor([0, 1, 63, 64, 299, 150], device=DEVICE)
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    out = linear_logprobs(
        ours, weight, targets, entropy=True, softcap=softcap, logit_scale=logit_scale, chunk=(4, 130),
        backend="triton",
    )  # fmt: skip
    expected = full_logprobs(
        exact, weight.double(), targets, entropy=True, softcap=softcap, logit_scale=logit_scale
    )
    for value, plain in zip(out[:2], expected[:2], strict=True):
        torch.testing.assert_close(value.double(), plain, rtol=1e-5, atol=1e-5)
    out.logprobs.sum().backward()
    expected.logprobs.sum().backward()
    assert (ours.grad - exact.grad).norm() <= 1e-5 * exact.grad.norm() + 1e-9


@pytest.mark.usefixtures("kernels")
def test_all_optional_outputs() -> None:
    hidden, weight = _tile(17, 16, 4) / 2, _tile(300, 16, 5) / 4
    targets = (hidden @ weight.t()).argmax(1)
    targets[::4], targets[1::4] = 0, 299  # all of the vocabulary comes after the one, and before the other
    out = linear_logprobs(
        hidden, weight, targets, entropy=True, chunk=(13, 130), backend="triton",
        extra_outputs=("log_sum_sq_probs", "mean_logits", "is_top1"),
    )  # fmt: skip
    exact = full_logprobs(
        hidden, weight, targets, entropy=True, extra_outputs=out._fields[2:], dtype=torch.float64
    )
    for value, expected in zip(out[:4], exact[:4], strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.is_top1, exact.is_top1)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("bad", "where"), itertools.product([float("nan"), float("inf")], [0, 8]))
def test_a_bad_row_spoils_itself_alone(bad: float, where: int) -> None:
    hidden, weight = _tile(9, 16, 4), _tile(300, 16, 5)
    targets = torch.arange(9, device=DEVICE)
    hidden[where, 3] = bad
    logprobs = linear_logprobs(hidden, weight, targets, chunk=(4, 130), backend="triton").logprobs
    plain = full_logprobs(hidden, weight, targets).logprobs
    assert torch.equal(logprobs.isnan(), plain.isnan())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_summed_cross_entropy_of_a_trainable_head(softcap: float) -> None:
    """Three products: the tiles of a block of rows are kept, and their references move in between."""
    hidden, weight = _tile(12, 16, 4) / 8, _tile(VOCABULARY, 16, 5) / 8
    bias = torch.where(torch.arange(VOCABULARY, device=DEVICE) < VOCABULARY * 4 // 9, 0.0, 60.0)
    targets = torch.arange(12, device=DEVICE) * (VOCABULARY // 12)
    mask = torch.arange(12, device=DEVICE) != 4
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    arguments = (targets, leaves[2], mask, [0.5, softcap], [True, True], 5, "triton", torch.float32)
    total, *_ = summed_logprobs_op(*leaves[:2], *arguments)
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    plain = full_logprobs(
        *exact[:2], targets, bias=exact[2], mask=mask, logit_scale=0.5, softcap=softcap or None
    )
    expected = plain.logprobs.sum()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    total.backward()
    expected.backward()
    for x, y in zip(leaves, exact, strict=True):
        assert (x.grad - y.grad).norm() <= 1e-5 * y.grad.norm()
