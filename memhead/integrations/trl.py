"""memhead inside TRL's trainers (TRL >= 1.15).

TRL computes every log-probability through ``trl.trainer.utils._ChunkedLogProbFunction.apply(...)``,
looked up at each call, in every trainer with a fused head. :func:`install` puts memhead there.
LoRA on ``lm_head``, which TRL refuses, then works too (:mod:`memhead.integrations.trl_lora`):

    from memhead.integrations import trl as memhead_trl
    handle = memhead_trl.install()
    GRPOTrainer(...).train()
    assert handle.calls > 0
    handle.uninstall()
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from memhead.arguments import OUTPUTS
from memhead.checks import check_chunk
from memhead.integrations.handle import Handle, Truncated
from memhead.integrations.trl_lora import allow_lora_head, current_head
from memhead.logprobs import LowRankUpdate, linear_logprobs
from memhead.own_rows import even_sizes, own_logprobs, part_of
from memhead.reference import full_logprobs

IMPLEMENTATIONS = ("memhead", "full", "trl")
INSTALLED = "memhead_handle"  # an attribute of what we put into a slot

PerToken = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def install(
    impl: str = "memhead",
    *,
    chunk: int | tuple[int, int] | None = None,
    backend: str | None = None,
    vocab_parallel: bool = False,
) -> Handle:
    """Let ``impl`` compute TRL's per-token log-probabilities from now on.

    Args:
        impl: "memhead"; "full" for plain full logits with autograd, to compare with; "trl" for
            what is there already, only counted.
        chunk: see :func:`memhead.linear_logprobs`.
        backend: see :func:`memhead.linear_logprobs`.
        vocab_parallel: where there are several processes, each computes its part of the vocabulary for the rows of
            all (:mod:`memhead.own_rows`); they must call their heads in step. "memhead" only.

    Raises:
        ValueError: an unknown ``impl``, a chunk too small, or a head that is installed already.
        RuntimeError: the installed TRL has no such slot.
    """
    from trl.trainer import utils

    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    check_chunk(chunk)
    if vocab_parallel and impl != "memhead":
        raise ValueError(f"vocab_parallel=True is memhead's; impl={impl!r} computes the whole vocabulary")
    if not hasattr(utils, "_ChunkedLogProbFunction"):
        import trl

        raise RuntimeError(
            f"trl {trl.__version__} has no fused head to replace; memhead needs trl>=1.15: pip install -U trl"
        )
    if (handle := installed()) is not None:
        raise ValueError(
            f"impl={handle.impl!r} is installed in TRL already; call uninstall() of its handle first, which "
            "memhead.integrations.trl.installed() returns"
        )
    original = utils._ChunkedLogProbFunction
    refuse_lora_again = allow_lora_head() if impl != "trl" else None

    def restore() -> None:
        utils._ChunkedLogProbFunction = original
        if refuse_lora_again is not None:
            refuse_lora_again()

    handle = Handle(impl, restore, "TRL's trainers")
    handle.chunk = chunk

    def memhead_apply(*args: Any, **kwargs: Any) -> PerToken:
        truncated = handle.truncated
        return _memhead_apply(
            *args, chunk=chunk, backend=backend, vocab_parallel=vocab_parallel, truncated=truncated, **kwargs
        )

    apply = {"memhead": memhead_apply, "full": _full_apply, "trl": getattr(original, "apply", None)}[impl]

    def counted(hidden: Tensor, *args: Any, **kwargs: Any) -> PerToken:
        handle.count(hidden.shape[0])
        if apply is None:
            raise RuntimeError(
                "head.impl=trl: this TRL computes its head with Triton, which is not installed: pip install triton"
            )
        if handle.listener is not None:
            weight, bias, targets, temperature, _, softcap, logit_scale, *_ = args
            handle.listener(
                hidden,
                weight,
                bias,
                targets,
                temperature=temperature,
                softcap=softcap,
                logit_scale=logit_scale,
            )
        return apply(hidden, *args, **kwargs)

    utils._ChunkedLogProbFunction = SimpleNamespace(apply=counted)
    name_handle(handle)
    return handle


def installed() -> Handle | None:
    """The handle of the head that :func:`install` put into TRL; ``None`` if there is none."""
    from trl.trainer import utils

    return getattr(getattr(utils, "_ChunkedLogProbFunction", None), INSTALLED, None)


def name_handle(handle: Handle) -> None:
    """Register ``handle`` as the installed one: that of an integration that fills TRL's slot among others."""
    from trl.trainer import utils

    setattr(utils._ChunkedLogProbFunction, INSTALLED, handle)


def _memhead_apply(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    temperature: float,
    chunk_size: int,  # TRL's vocabulary tile; memhead plans its own
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = OUTPUTS,
    *further: Any,
    chunk: int | tuple[int, int] | None,
    backend: str | None,
    truncated: Truncated | None,
    vocab_parallel: bool = False,
    **unknown: Any,
) -> PerToken:
    _refuse(further, unknown)
    if truncated is not None:
        _refuse_beside_truncation(weight, outputs)
        head_options = {
            "temperature": temperature,
            "softcap": final_logit_softcapping,
            "logit_scale": logit_scale,
        }
        found = truncated.score(
            hidden, weight, targets, entropy="entropy" in outputs, bias=bias, **head_options
        )
        return tuple(found)  # type: ignore[return-value]
    options: dict[str, Any] = {
        "bias": bias,
        "temperature": temperature,
        "softcap": final_logit_softcapping,
        "logit_scale": logit_scale,
        "entropy": "entropy" in outputs,
        "extra_outputs": [name for name in OUTPUTS[1:] if name in outputs],
        "chunk": chunk,
        "backend": backend,
    }
    head = current_head()
    if vocab_parallel and dist.is_initialized():
        if not weight.is_floating_point() or _update_of_head() is not None:
            raise ValueError("vocab_parallel=True takes a plain weight, without an adapter and not quantised")
        mine = part_of(len(weight))
        options["bias"] = None if bias is None else bias[mine]
        result = own_logprobs(hidden, weight[mine], targets, sizes=even_sizes(len(weight)), **options)
    elif weight.is_floating_point() or head is None:
        result = linear_logprobs(hidden, weight, targets, low_rank=_update_of_head(), **options)
    else:
        from memhead.integrations.bitsandbytes import quantized_logprobs, quantized_weight

        result = quantized_logprobs(hidden, quantized_weight(head), targets, **options)
    return tuple(result)  # type: ignore[return-value]


def _full_apply(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = OUTPUTS,
    *further: Any,
    **unknown: Any,
) -> PerToken:
    """The baseline: all logits at once, in float32 after the product, and autograd through them."""
    _refuse(further, unknown)
    result = full_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=final_logit_softcapping,
        logit_scale=logit_scale,
        entropy="entropy" in outputs,
        extra_outputs=[name for name in OUTPUTS[1:] if name in outputs],
        low_rank=_update_of_head(),
    )
    return tuple(result)  # type: ignore[return-value]


def _update_of_head() -> LowRankUpdate | None:
    """The LoRA update of the head that TRL is scoring with, if it carries one."""
    head = current_head()
    if head is None or not hasattr(head, "base_layer"):
        return None
    from memhead.integrations.peft import low_rank_update

    return low_rank_update(head)


def _refuse_beside_truncation(weight: Tensor, outputs: Sequence[str]) -> None:
    further = [name for name in outputs if name not in ("log_probs", "entropy")]
    if further or not weight.is_floating_point() or _update_of_head() is not None:
        what = ", ".join(further) or "a quantised head or one with an adapter"
        raise ValueError(f"truncated sampling is not combined with {what}; leave out top_k, top_p and min_p")


def _refuse(further: tuple[Any, ...], unknown: dict[str, Any]) -> None:
    """Refuse an argument that a later TRL passes and we do not know, rather than drop it silently."""
    given = [f"argument {10 + i}: {value!r}" for i, value in enumerate(further) if value is not None]
    given += [f"{name}={value!r}" for name, value in unknown.items() if value is not None]
    if given:
        raise TypeError(f"memhead does not know what TRL passes to its head here: {', '.join(given)}")
