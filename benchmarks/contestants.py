"""The implementations that :mod:`benchmarks.head` compares: memhead, and its peers as installed packages.

A peer is called the way its users' trainers call it. One that cannot run here is listed with the reason.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Head(NamedTuple):
    """The tensors of one row of the table."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    grad: Tensor  # (N,) float32, upstream gradient of the log-probabilities


# A scorer takes hidden, weight and targets and returns log-probabilities, or (log-probabilities, entropies).
Scorer = Callable[[Tensor, Tensor, Tensor], Tensor]
PASSES = {
    "frozen": "log-probabilities, forward and backward to hidden",
    "frozen, entropy": "the same and the entropy's value",
    "no gradient": "log-probabilities alone",
    "trainable": "log-probabilities, forward and backward to hidden and weight",
    "cross entropy, frozen": "mean cross entropy, forward and backward to hidden",
    "cross entropy": "mean cross entropy, forward and backward to hidden and weight",
}
PRODUCTS = {
    "frozen": 2,
    "frozen, entropy": 2,
    "no gradient": 1,
    "trainable": 4,
    "cross entropy, frozen": 2,
    "cross entropy": 3,
}


@dataclass
class Contestant:
    """One implementation: its functions, or the reason why it cannot run here."""

    name: str
    logprobs: Scorer | None = None
    with_entropy: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    cross_entropy: Scorer | None = None  # the mean; None: computed from the log-probabilities
    absent: str = ""
    notes: dict[str, str] = field(default_factory=dict)

    def run(self, which: str, head: Head) -> Callable[[], object] | None:
        """A function that makes one pass over ``head``, or ``None`` where this implementation cannot."""
        trainable = which in ("trainable", "cross entropy")
        if which.startswith("cross entropy"):
            score = self.cross_entropy or (self.logprobs and mean_of(self.logprobs))
        elif which == "frozen, entropy":
            score = self.with_entropy and first_of(self.with_entropy)
        else:
            score = self.logprobs
        if score is None:
            return None
        scorer = score

        def function() -> object:
            if which == "no gradient":
                with torch.no_grad():
                    return scorer(head.hidden, head.weight, head.targets)
            hidden = head.hidden.detach().requires_grad_()
            weight = head.weight.detach().requires_grad_(trainable)
            result = scorer(hidden, weight, head.targets)
            result.backward(head.grad.to(result.dtype) if result.dim() else None)
            return hidden.grad, weight.grad

        return function


def mean_of(scorer: Scorer) -> Scorer:
    """Mean cross entropy from per-token log-probabilities."""
    return lambda hidden, weight, targets: -scorer(hidden, weight, targets).mean()


def first_of(scorer: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Scorer:
    """The log-probabilities of a scorer that computes entropies too."""
    return lambda hidden, weight, targets: scorer(hidden, weight, targets)[0]


def onednn_products(which: str, head: Head) -> Callable[[], object]:
    """The same products as :func:`bare_products` by oneDNN, a tile at a time; float32 on a CPU with AVX-512.

    oneDNN returns new memory, so a tile of the weight's gradient is copied to where it belongs.
    """
    hidden, weight = head.hidden, head.weight
    by_weight = torch.empty_like(weight) if PRODUCTS[which] > 2 else weight
    multiply = torch.ops.mkldnn._linear_pointwise

    def times(a: Tensor, b: Tensor) -> Tensor:
        return multiply(a, b.t(), None, "none", [], "")

    def function() -> None:
        for w, result in zip(weight.split(1024), by_weight.split(1024), strict=True):
            z = times(hidden, w.t())
            if PRODUCTS[which] > 1:
                times(z, w)
            if PRODUCTS[which] > 2:
                result.copy_(times(z.t(), hidden))
            if PRODUCTS[which] > 3:
                times(hidden, w.t())

    return function


def bare_products(which: str, head: Head, preallocated: bool) -> Callable[[], object]:
    """The floor: the matrix products that the pass cannot do without, and nothing else."""
    hidden, weight = head.hidden, head.weight
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    logits = hidden.new_empty(num_rows, vocab_size) if preallocated else None
    by_hidden = torch.empty_like(hidden) if preallocated else None
    by_weight = torch.empty_like(weight) if preallocated else None

    def function() -> None:
        z = torch.mm(hidden, weight.t(), out=logits)
        if PRODUCTS[which] > 1:
            torch.mm(z, weight, out=by_hidden)
        if PRODUCTS[which] > 2:
            torch.mm(z.t(), hidden, out=by_weight)
        if PRODUCTS[which] > 3:
            torch.mm(hidden, weight.t(), out=z)

    return function


def memhead_contestant() -> Contestant:
    """Ours, with the planned tile."""
    import memhead

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return memhead.linear_logprobs(hidden, weight, targets).logprobs

    def with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        result = memhead.linear_logprobs(hidden, weight, targets, entropy=True)
        assert result.entropy is not None
        return result.logprobs, result.entropy

    return Contestant("memhead", logprobs, with_entropy, memhead.linear_cross_entropy)


def full_contestant() -> Contestant:
    """Plain full logits, kept in the inputs' dtype until the softmax, as in a plain trainer."""
    from memhead.reference import full_logits, full_logprobs

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return full_logprobs(hidden, weight, targets).logprobs

    def with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logp = full_logits(hidden, weight).log_softmax(-1)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(1, targets[:, None]).squeeze(1), entropy

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(full_logits(hidden, weight), targets)

    return Contestant("full logits", logprobs, with_entropy, cross_entropy)


def torch_contestant() -> Contestant:
    """``torch.nn.functional.linear_cross_entropy`` with its chunks switched on."""
    name = "F.linear_cross_entropy"
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return Contestant(name, absent=f"torch {torch.__version__} has none; it came with 2.13")
    options = torch.nn.LinearCrossEntropyOptions()

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, targets, options=options)

    return Contestant(name, logprobs, None, cross_entropy)


def trl_contestant(path: str | None) -> Contestant:
    """TRL's own head: Triton on a GPU, from 1.16 on a fallback in torch elsewhere."""
    name = "TRL"
    try:
        with package_path(path, "trl"):
            module = importlib.import_module("trl.kernels.chunked_logprob")
            importlib.import_module("trl.trainer.utils")  # its backward imports it
            release = _release(path, "trl")
    except (ImportError, RuntimeError) as error:
        return Contestant(name, absent=f"cannot be imported: {error}")
    if not torch.cuda.is_available() and not hasattr(module, "_use_triton"):
        return Contestant(name, absent=f"TRL {release} has no head without a GPU; give --trl a path to 1.16")
    apply = module.ChunkedLogProbFunction.apply

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]

    def with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("entropy",))[:2]

    return Contestant(f"TRL {release}", logprobs, with_entropy)


def unsloth_contestant(path: str | None) -> Contestant:
    """unsloth_zoo's head, as its GRPO scorer calls it; unsloth itself chooses the device's backend."""
    name = "unsloth_zoo"
    try:
        with package_path(path, "unsloth", "unsloth_zoo"):
            importlib.import_module("unsloth")
            module = importlib.import_module("unsloth_zoo.fused_losses.fused_linear")
            release = importlib.import_module("unsloth_zoo").__version__
    except (ImportError, NotImplementedError, RuntimeError) as error:
        return Contestant(name, absent=f"cannot be imported: {error}")
    fused = module.fused_linear_logprobs

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        result = fused(hidden, weight, targets)
        return result[0] if isinstance(result, tuple) else result

    def with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return fused(hidden, weight, targets, return_entropy=True)[:2]

    return Contestant(f"unsloth_zoo {release}", logprobs, with_entropy)


def liger_contestant(path: str | None) -> Contestant:
    """The log-probabilities inside Liger's GRPO loss; its cross entropy exists in Triton only."""
    name = "Liger"
    try:
        with package_path(path, "liger_kernel"):
            module = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo")
            release = _release(path, "liger_kernel")
    except (ImportError, RuntimeError) as error:
        return Contestant(name, absent=f"cannot be imported: {error}")
    columns = module._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return module._ChunkedSelectiveLogProbFunction.apply(hidden, weight, targets, None, 1.0, columns)

    return Contestant(f"Liger {release}", logprobs)


@contextmanager
def package_path(path: str | None, *names: str):
    """Import ``names`` from ``path`` instead of from the environment, whose own versions stay for all other code."""
    if path is None:
        yield
        return
    if not Path(path).is_dir():
        raise ImportError(f"{path} is not a folder")
    prefixes = tuple(f"{name}." for name in names)
    for key in [k for k in sys.modules if k in names or k.startswith(prefixes)]:
        del sys.modules[key]
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)


def _release(path: str | None, package: str) -> str:
    from importlib.metadata import distributions

    for found in distributions(name=package, **({} if path is None else {"path": [path]})):
        return found.version
    return ""
