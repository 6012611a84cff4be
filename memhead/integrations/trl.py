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

import torch
from torch import Tensor

from memhead.arguments import OUTPUTS, compute_dtype
from memhead.checks import check_chunk
from memhead.integrations.handle import Handle
from memhead.integrations.trl_lora import allow_lora_head, current_head
from memhead.logprobs import LinearLogprobs, LowRankUpdate, linear_logprobs
from memhead.products import result_dtype

IMPLEMENTATIONS = ("memhead", "full", "trl")

PerToken = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def install(
    impl: str = "memhead", *, chunk: int | tuple[int, int] | None = None, backend: str | None = None
) -> Handle:
    """Let ``impl`` compute TRL's per-token log-probabilities from now on.

    Args:
        impl: "memhead"; "full" for plain full logits with autograd, to compare with; "trl" for
            what is there already, only counted.
        chunk: see :func:`memhead.linear_logprobs`.
        backend: see :func:`memhead.linear_logprobs`.

    Raises:
        ValueError: an unknown ``impl``, or a chunk too small.
        RuntimeError: the installed TRL has no such slot.
    """
    from trl.trainer import utils

    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    check_chunk(chunk)
    if not hasattr(utils, "_ChunkedLogProbFunction"):
        import trl

        raise RuntimeError(
            f"trl {trl.__version__} has no fused head to replace; memhead needs trl>=1.15: pip install -U trl"
        )
    original = utils._ChunkedLogProbFunction
    refuse_lora_again = allow_lora_head() if impl != "trl" else None

    def restore() -> None:
        utils._ChunkedLogProbFunction = original
        if refuse_lora_again is not None:
            refuse_lora_again()

    handle = Handle(impl, restore)

    def memhead_apply(*args: Any, **kwargs: Any) -> PerToken:
        return _memhead_apply(*args, chunk=chunk, backend=backend, **kwargs)

    apply = {"memhead": memhead_apply, "full": _full_apply, "trl": getattr(original, "apply", None)}[impl]

    def counted(hidden: Tensor, *args: Any, **kwargs: Any) -> PerToken:
        handle.count(hidden.shape[0])
        if apply is None:
            raise RuntimeError(
                "head.impl=trl: this TRL computes its head with Triton, which is not installed: pip install triton"
            )
        return apply(hidden, *args, **kwargs)

    utils._ChunkedLogProbFunction = SimpleNamespace(apply=counted)
    return handle


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
    **unknown: Any,
) -> PerToken:
    _refuse(further, unknown)
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
    if weight.is_floating_point() or head is None:
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
    dtype = compute_dtype(hidden, weight)
    bias = None if bias is None else bias.to(dtype)
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias)  # (N, V)
    if (update := _update_of_head()) is not None:
        dropped = torch.nn.functional.dropout(hidden, update.dropout).to(dtype)
        logits = logits + (dropped @ update.a.to(dtype).t()) @ update.b.to(dtype).t() * update.scaling
    logits = logits.to(result_dtype(dtype)) * logit_scale
    if final_logit_softcapping is not None:
        logits = final_logit_softcapping * torch.tanh(logits / final_logit_softcapping)
    logits = logits / temperature
    logp = logits.log_softmax(-1)
    logprobs = logp.gather(1, targets[:, None]).squeeze(1)
    result = LinearLogprobs(
        logprobs,
        -(logp.exp() * logp).sum(-1) if "entropy" in outputs else None,
        (2 * logp.detach()).logsumexp(-1) if "log_sum_sq_probs" in outputs else None,
        logits.detach().mean(-1) if "mean_logits" in outputs else None,
        logits.argmax(-1) == targets if "is_top1" in outputs else None,
    )
    return tuple(result)  # type: ignore[return-value]


def _update_of_head() -> LowRankUpdate | None:
    """The LoRA update of the head that TRL is scoring with, if it carries one."""
    head = current_head()
    if head is None or not hasattr(head, "base_layer"):
        return None
    from memhead.integrations.peft import low_rank_update

    return low_rank_update(head)


def _refuse(further: tuple[Any, ...], unknown: dict[str, Any]) -> None:
    """An argument that a later TRL passes and we do not know must not be dropped in silence."""
    given = [f"argument {10 + i}: {value!r}" for i, value in enumerate(further) if value is not None]
    given += [f"{name}={value!r}" for name, value in unknown.items() if value is not None]
    if given:
        raise TypeError(f"memhead does not know what TRL passes to its head here: {', '.join(given)}")
