"""The implementations that :mod:`benchmarks.head_gpu` compares. Peers are installed packages, called as documented."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contestants import Contestant
from memhead import linear_cross_entropy, linear_logprobs
from memhead.reference import full_logits, full_logprobs


def contestants(softcap: float | None, *, compiled: bool) -> list[Contestant]:
    """All of them, present or absent; ``compiled`` adds ``torch.compile`` of full logits, which is slow to start."""
    makers = [_memhead, _full, _trl, _unsloth, _liger, _cce, _quack]
    found = [contestant for make in makers for contestant in _make(make, softcap)]
    if compiled:
        found.append(_compiled(softcap))
    if hasattr(F, "linear_cross_entropy"):
        from benchmarks.contestants import torch_contestant

        found.append(torch_contestant())
    else:
        found.append(Contestant("F.linear_cross_entropy", absent=f"torch {torch.__version__} has none"))
    return found


def _make(make: Callable[[float | None], list[Contestant]], softcap: float | None) -> list[Contestant]:
    try:
        return make(softcap)
    except Exception as error:  # a peer that cannot be imported is one row of the table, not the end of it
        return [Contestant(make.__name__.strip("_"), absent=f"{type(error).__name__}: {error}"[:200])]


def _memhead(softcap: float | None) -> list[Contestant]:
    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, targets, softcap=softcap).logprobs

    def with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        out = linear_logprobs(hidden, weight, targets, softcap=softcap, entropy=True)
        assert out.entropy is not None
        return out.logprobs, out.entropy

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, softcap=softcap)

    return [Contestant("memhead", logprobs, with_entropy, cross_entropy)]


def _full_logprobs(softcap: float | None, widen: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return full_logprobs(hidden, weight, targets, softcap=softcap, widen=widen).logprobs

    return logprobs


def _full(softcap: float | None) -> list[Contestant]:
    found = []
    for name, widen in (("full logits, softmax in fp32", True), ("full logits, bf16", False)):
        logprobs = _full_logprobs(softcap, widen)

        def with_entropy(
            hidden: Tensor, weight: Tensor, targets: Tensor, widen: bool = widen
        ) -> tuple[Tensor, Tensor]:
            logp = full_logits(hidden, weight, softcap=softcap, widen=widen).log_softmax(-1)
            with torch.no_grad():
                entropy = -(logp.exp() * logp).sum(-1)
            return logp.gather(1, targets[:, None]).squeeze(1), entropy

        def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, widen: bool = widen) -> Tensor:
            return F.cross_entropy(full_logits(hidden, weight, softcap=softcap, widen=widen), targets)

        found.append(Contestant(name, logprobs, with_entropy, cross_entropy))
    return found


def _compiled(softcap: float | None) -> Contestant:
    logprobs = torch.compile(_full_logprobs(softcap, widen=True))
    return Contestant("torch.compile(full logits)", logprobs)


def _trl(softcap: float | None) -> list[Contestant]:
    module = importlib.import_module("trl.kernels.chunked_logprob")
    importlib.import_module("trl.trainer.utils")  # its backward imports it
    apply = module.ChunkedLogProbFunction.apply

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return apply(hidden, weight, None, targets, 1.0, 32768, softcap, 1.0, ())[0]

    def with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return apply(hidden, weight, None, targets, 1.0, 32768, softcap, 1.0, ("entropy",))[:2]

    return [Contestant(f"TRL {version('trl')}", logprobs, with_entropy)]


def _unsloth(softcap: float | None) -> list[Contestant]:
    """unsloth_zoo's module itself, without the package's set-up, which needs all of Unsloth installed."""
    if "unsloth_zoo" not in sys.modules:
        spec = find_spec("unsloth_zoo")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("unsloth_zoo is not installed")
        root = next(iter(spec.submodule_search_locations))
        for name, path in (("unsloth_zoo", root), ("unsloth_zoo.fused_losses", f"{root}/fused_losses")):
            package = sys.modules[name] = ModuleType(name)
            package.__path__ = [path]
    fused = importlib.import_module("unsloth_zoo.fused_losses.fused_linear").fused_linear_logprobs
    cap = softcap or 0.0

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        out = fused(hidden, weight, targets, logit_softcapping=cap)
        return out[0] if isinstance(out, tuple) else out

    def with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return fused(
            hidden, weight, targets, logit_softcapping=cap, return_entropy=True, entropy_requires_grad=False
        )[:2]

    return [Contestant(f"unsloth_zoo {version('unsloth_zoo')}", logprobs, with_entropy)]


def _liger(softcap: float | None) -> list[Contestant]:
    release = version("liger_kernel")
    ppo = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo")
    columns = ppo._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    grpo = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="grpo", compiled=False
    )
    fused = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ppo._ChunkedSelectiveLogProbFunction.apply(hidden, weight, targets, None, 1.0, columns)

    def grpo_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        sequences = hidden.view(-1, 1024, hidden.shape[-1])
        ids = targets.view(-1, 1024)
        advantages = torch.linspace(-1, 1, len(ids), device=hidden.device)
        return grpo(sequences, weight, ids, torch.ones_like(ids), advantages)[0]

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        out = fused.LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, None, None, -100, 0.0, 0.0, "mean", softcap
        )
        return out[0] if isinstance(out, tuple) else out

    if softcap is not None:
        return [Contestant(f"Liger {release}", None, None, cross_entropy)]
    # The whole loss, for the pass that it stands for; its value is not a log-probability.
    whole = Contestant(f"Liger {release}, GRPO loss", grpo_loss, notes={"kind": "loss"})
    return [Contestant(f"Liger {release}", logprobs, None, cross_entropy), whole]


def _cce(softcap: float | None) -> list[Contestant]:
    module = importlib.import_module("cut_cross_entropy")
    release = version("cut_cross_entropy")
    found = []
    for name, eps in (("CCE", None), ("CCE, filtered", "high")):

        def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, eps: str | None = eps) -> Tensor:
            return -module.linear_cross_entropy(
                hidden, weight, targets, softcap=softcap, reduction="none", filter_eps=eps
            )

        def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, eps: str | None = eps) -> Tensor:
            return module.linear_cross_entropy(hidden, weight, targets, softcap=softcap, filter_eps=eps)

        found.append(Contestant(f"{name} {release}", logprobs, None, cross_entropy))
    return found


def _quack(softcap: float | None) -> list[Contestant]:
    if softcap is not None:
        return []
    module = importlib.import_module("quack.linear_cross_entropy")

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return module.chunked_linear_cross_entropy(hidden, weight, targets, tuned=False)

    return [Contestant(f"quack {version('quack-kernels')}", None, None, cross_entropy)]
