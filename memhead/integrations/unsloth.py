"""memhead inside Unsloth's GRPO trainer.

    import unsloth                                   # first, before trl
    from memhead.integrations import unsloth as memhead_unsloth
    handle = memhead_unsloth.install(args=grpo_config)
    GRPOTrainer(...).train()
    assert handle.calls > 0

With a GPU, Unsloth writes its own trainer, which scores, with gradient and without, through
``unsloth_zoo.rl_replacements.grpo_chunked_hidden_states_logprobs``, imported again at each call.
Its other trainers, and all of them on its CPU backend, are TRL's and use TRL's slot, in which
Unsloth has put its own class. :func:`install` takes both places.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from memhead.checks import check_chunk
from memhead.integrations import trl as memhead_trl
from memhead.integrations.handle import Handle
from memhead.logprobs import linear_logprobs

SCORER = "grpo_chunked_hidden_states_logprobs"
# Arguments of the scorer that change nothing here: our logits are float32 in any case.
NEUTRAL = {
    "support_top_k": (0, None),
    "support_top_p": (1.0, None),
    "support_min_p": (0.0, None),
    "support_excluded_ids": (None,),
    "support_triton_sampler": (False, None),
    "fp32_lm_head": (True, False, None),
}
# Options of the run under which the generated trainer computes entropies, or scores, past the scorer.
BYPASSES = {
    "entropy_coef": (0.0, None),
    "top_entropy_quantile": (1.0, None),
    "use_adaptive_entropy": (False, None),
}
BYPASSING_VARIABLE = "UNSLOTH_GRPO_LOGPROB_RECOMPUTE"


def install(
    impl: str = "memhead",
    *,
    args: Any = None,
    chunk: int | tuple[int, int] | None = None,
    backend: str | None = None,
) -> Handle:
    """Let ``impl`` compute Unsloth's per-token log-probabilities from now on.

    Args:
        impl: "memhead"; "full" for plain full logits with autograd, to compare with; "trl" for
            Unsloth's own head, only counted, which also scores where vLLM's truncation counts: a warning says so.
        args: the run's GRPOConfig, if its options are to be checked for what would bypass memhead.
        chunk: see :func:`memhead.linear_logprobs`.
        backend: see :func:`memhead.linear_logprobs`.

    Raises:
        RuntimeError: unsloth is not imported yet, or its version has no such scorer.
        ValueError: an unknown ``impl``, a chunk too small, an option that would bypass memhead, or a
            head that is installed already.
    """
    if "unsloth" not in sys.modules:
        raise RuntimeError(
            "import unsloth before installing memhead (and before trl): it replaces parts of trl"
        )
    from unsloth_zoo import rl_replacements

    check_chunk(chunk)
    if not hasattr(rl_replacements, SCORER):
        raise RuntimeError(
            f"this unsloth_zoo has no {SCORER}; memhead needs unsloth_zoo>=2026.10.8: pip install -U unsloth_zoo"
        )
    if impl != "trl":
        refuse_bypasses(args)
    original = getattr(rl_replacements, SCORER)
    slot = memhead_trl.install(impl, chunk=chunk, backend=backend)

    def restore() -> None:
        setattr(rl_replacements, SCORER, original)
        slot.uninstall()

    handle = _SharedHandle(impl, restore, slot)
    memhead_trl.name_handle(handle)

    def counted(
        hidden_states: Tensor, lm_head: Tensor, index: Tensor, *further: Any, **options: Any
    ) -> Tensor:
        handle.count(index.numel())
        if impl == "trl" or _truncates(options):
            return original(hidden_states, lm_head, index, *further, **options)
        return _score(
            hidden_states, lm_head, index, *further, impl=impl, tile=chunk, backend=backend, **options
        )

    setattr(rl_replacements, SCORER, counted)
    return handle


class _SharedHandle(Handle):
    """Counts the calls of TRL's slot among its own."""

    def __init__(self, impl: str, restore: Any, slot: Handle) -> None:
        super().__init__(impl, restore)
        slot.count = self.count  # type: ignore[method-assign]


def refuse_bypasses(args: Any = None) -> None:
    """Refuse options under which Unsloth's generated trainer computes log-probabilities without its scorer.

    Raises:
        ValueError: names the variable or the option of ``args`` (a GRPOConfig), its value and the remedy.
    """
    value = os.environ.get(BYPASSING_VARIABLE, "0")
    if value not in ("", "0"):
        raise ValueError(f"{BYPASSING_VARIABLE}={value} makes Unsloth score without memhead; unset it")
    if args is None or not generates_trainers():
        return
    for name, neutral in BYPASSES.items():
        given = getattr(args, name, None)
        if given not in neutral:
            raise ValueError(
                f"grpo.{name}={given} makes Unsloth's trainer compute entropies past memhead; "
                f"set it to {neutral[0]}, or load the model with model.loader=transformers"
            )


def generates_trainers() -> bool:
    """Whether this Unsloth replaces TRL's trainers with its own; on its CPU backend it keeps them."""
    return getattr(sys.modules["unsloth"], "DEVICE_TYPE", "cuda") != "cpu"


def _score(
    hidden_states: Tensor,  # (B, T, H)
    lm_head: Tensor,  # (V, H)
    index: Tensor,  # (B, T)
    chunks: int = 4,  # Unsloth's number of chunks; memhead plans its own
    logit_scale_multiply: float | None = 0.0,
    logit_scale_divide: float | None = 0.0,
    logit_softcapping: float | None = 0.0,
    temperature: float = 1.0,
    max_rows_per_chunk: int | None = None,
    lm_head_bias: Tensor | None = None,
    *,
    impl: str,
    tile: int | tuple[int, int] | None,
    backend: str | None,
    **extra: Any,
) -> Tensor:
    """Log-probabilities (B, T), float32. The three transforms are off at 0."""
    refused = [f"{k}={v!r}" for k, v in extra.items() if not _is_neutral(k, v)]
    if refused:
        raise TypeError(f"memhead does not cover what Unsloth passes to its head here: {', '.join(refused)}")
    scale = (logit_scale_multiply or 1.0) / (logit_scale_divide or 1.0)
    if impl == "full":
        slot = memhead_trl._full_apply
        flat = (hidden_states.flatten(0, -2), lm_head, lm_head_bias, index.flatten())
        return slot(*flat, temperature, 0, logit_softcapping or None, scale, ())[0].view(index.shape)
    # A float32 head is asked for inside a half-precision autocast; otherwise autocast decides, as for any head.
    with (
        torch.autocast(hidden_states.device.type, enabled=False)
        if extra.get("fp32_lm_head")
        else nullcontext()
    ):
        return linear_logprobs(
            hidden_states.to(lm_head),  # dtype, and device where the model is split
            lm_head,
            index,
            bias=lm_head_bias,
            temperature=temperature,
            softcap=logit_softcapping or None,
            logit_scale=scale,
            chunk=tile,
            backend=backend,
        ).logprobs


def _truncates(options: dict[str, Any]) -> bool:
    """Whether Unsloth scores over the tokens that vLLM's truncated sampling has left, which its own head does."""
    if not any(
        name.startswith("support_") and not _is_neutral(name, value) for name, value in options.items()
    ):
        return False
    warnings.warn(
        "Unsloth scores over what top_k, top_p or min_p leave: by its own head, not by memhead", stacklevel=3
    )
    return True


def _is_neutral(name: str, value: Any) -> bool:
    if isinstance(value, Tensor):
        return False
    return value is None or (name in NEUTRAL and value in NEUTRAL[name])
