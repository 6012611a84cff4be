"""Where the packed step is exact, decided before training: a table of architectures and what must not be on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Attention over whole prefixes alone, relative positions, nothing that a batch or a row's length changes. Each is
# tested against TRL's padded way in float64 (tests/recipes/training/test_packed_step.py).
ARCHITECTURES = frozenset(
    {
        "cohere", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2", "qwen3",
        "smollm3",
    }
)  # fmt: skip
_ROPES_BY_LENGTH = ("dynamic", "longrope")  # whose angles depend on the longest row of a batch
_LARGEST_HEAD = 256  # of torch's varlen attention


def why_not(model: Any, arguments: Any, lora: Any, *, varlen: bool) -> str | None:
    """The reason not to pack, or None.

    Args:
        model: a causal language model of transformers, or one with adapters.
        arguments: TRL's GRPOConfig.
        lora: PEFT's LoraConfig of adapters that the trainer will put on, or None.
        varlen: one row with variable-length attention; else a row a group with a dense mask.
    """
    return next(_reasons(model, arguments, lora, varlen), None)


def _reasons(model: Any, arguments: Any, lora: Any, varlen: bool) -> Iterator[str]:
    config = model.config
    text = config.get_text_config()
    if config.model_type not in ARCHITECTURES:
        yield f"the architecture {config.model_type} is not among those known to be exact"
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(r for r in ropes.values() if isinstance(r, dict))):
        if rope.get("rope_type") in _ROPES_BY_LENGTH:
            yield f"its rotary positions ({rope['rope_type']}) depend on the length of a row"
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
        if getattr(text, name, 0.0):
            yield f"{name} is {getattr(text, name)}, and a packed row draws other numbers"
    adapters = [lora] if lora is not None else list(getattr(model, "peft_config", {}).values())
    for adapter in adapters:
        if not hasattr(adapter, "lora_dropout"):
            yield f"adapters of type {adapter.peft_type} may add tokens of their own"
        elif adapter.lora_dropout:
            yield f"lora.dropout is {adapter.lora_dropout}, and a packed row draws other numbers"
        elif getattr(adapter, "use_dora", False):
            yield "DoRA has not been tested"
    if hasattr(text, "output_router_logits"):
        yield "a mixture of experts balances its load over the rows of a batch"
    implementation = text._attn_implementation
    if not varlen and implementation not in ("sdpa", "eager"):
        yield f"{implementation} takes no dense mask; set model.attn_implementation: sdpa"
    if varlen:
        if (
            getattr(text, "attn_logit_softcapping", None) and implementation != "sdpa"
        ):  # sdpa does not cap either
            yield "torch's variable-length attention has no softcap"
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if head > _LARGEST_HEAD:
            yield f"torch's variable-length attention takes heads of at most {_LARGEST_HEAD}, not {head}"


def half_precision(model: Any, arguments: Any) -> bool:
    """Whether attention will run in 16 bits, which variable-length attention needs."""
    return bool(arguments.bf16 or arguments.fp16) or model.dtype in (torch.float16, torch.bfloat16)
