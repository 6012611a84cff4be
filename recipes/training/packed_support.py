"""Where the packed step is exact, decided before training: a table of architectures, and options that rule it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from transformers import ProcessorMixin

from recipes.config import packed
from recipes.training.packed_attention import varlen_available

# Attention only over whole prefixes, relative positions, nothing that depends on the batch or on a row's length. Each
# is tested against TRL's padded way in float64 (tests/recipes/training/test_packed_step.py).
ARCHITECTURES = frozenset(
    {
        "cohere", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2", "qwen3",
        "smollm3",
    }
)  # fmt: skip
_ROPES_BY_LENGTH = ("dynamic", "longrope")  # whose angles depend on the longest row of a batch
_IMAGES = {"image", "images"}  # columns that TRL's trainer knows
_LARGEST_HEAD = 256  # of torch's varlen attention
# Of LoRA, by option: some find their own tokens in a row, which the start-up check's need not have, or add noise.
_VARIANTS = {
    "use_dora": "DoRA", "alora_invocation_tokens": "an activated LoRA", "arrow_config": "Arrow", "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA", "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA", "kasa_config": "KaSA",
}  # fmt: skip
# TRL's ways to write into a completion from outside.
_LOOPS = ("tools", "rollout_func", "environment_factory")


def ruled_out(given: Mapping[str, Any]) -> str | None:
    """:func:`why_not`, with the attention of the device and the precision that ``args`` name."""
    arguments = given["args"]
    half = half_precision(given["model"], arguments)
    return why_not(given, varlen=varlen_available(arguments.device, half=half))


def why_not(given: Mapping[str, Any], *, varlen: bool) -> str | None:
    """The reason not to pack, or None.

    Args:
        given: what TRL's GRPOTrainer is made with: ``model``, ``args`` and what else there is. ``peft_config`` stands
            for adapters that the trainer will put on.
        varlen: one row with variable-length attention; else one row per group with a dense mask.
    """
    return next(chain(of_the_run(given), of_the_model(given), _of_attention(given["model"], varlen)), None)


def of_the_run(given: Mapping[str, Any]) -> Iterator[str]:
    """Reasons in how the trainer is made."""
    if (cards := given["args"].n_gpu) > 1:
        yield f"one process with {cards} GPUs would cut the packed row in pieces; show it one: CUDA_VISIBLE_DEVICES=0"
    yield from packed.by_embeddings(getattr(given["args"], "neftune_noise_alpha", None))
    plugin = getattr(given["args"], "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        yield "ZeRO-3 takes the model apart when training begins, so the packed step cannot be tried out before it"
    for name in _LOOPS:
        if given.get(name):
            yield f"{name} writes tokens into completions that the policy did not sample, which has not been tested"
    columns = set(getattr(given.get("train_dataset"), "column_names", None) or ())
    if isinstance(given.get("processing_class"), ProcessorMixin) or columns & _IMAGES:
        yield "images take positions that a row of tokens does not show"


def of_the_model(given: Mapping[str, Any]) -> Iterator[str]:
    """Reasons in the model and its adapters, whoever computes its attention."""
    model, lora = given["model"], given.get("peft_config")
    config = model.config
    text = config.get_text_config()
    if config.model_type not in ARCHITECTURES:
        yield f"the architecture {config.model_type} is not among those known to be exact"
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(r for r in ropes.values() if isinstance(r, dict))):
        if rope.get("rope_type") in _ROPES_BY_LENGTH:
            yield f"its rotary positions ({rope['rope_type']}) depend on the length of a row"
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
        yield from packed.by_noise(name, getattr(text, name, None))
    adapters = [lora] if lora is not None else list(getattr(model, "peft_config", {}).values())
    for adapter in adapters:
        if not hasattr(adapter, "lora_dropout"):
            yield f"adapters of type {adapter.peft_type} may add tokens of their own"
            continue
        yield from packed.by_adapter(adapter.lora_dropout)
        for option, variant in _VARIANTS.items():
            if getattr(adapter, option, None):
                yield f"{variant} has not been tested"
    if hasattr(text, "output_router_logits"):
        yield "a mixture of experts balances its load over the rows of a batch"


def _of_attention(model: Any, varlen: bool) -> Iterator[str]:
    text = model.config.get_text_config()
    implementation = text._attn_implementation
    if not varlen and implementation not in ("sdpa", "eager"):
        yield f"{implementation} takes no dense mask; set model.attn_implementation: sdpa"
    if varlen:
        # sdpa does not cap either.
        if getattr(text, "attn_logit_softcapping", None) and implementation != "sdpa":
            yield "torch's variable-length attention has no softcap"
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if head > _LARGEST_HEAD:
            yield f"torch's variable-length attention takes heads of at most {_LARGEST_HEAD}, not {head}"


def half_precision(model: Any, arguments: Any) -> bool:
    """Whether attention will run in 16 bits, which variable-length attention needs."""
    return bool(arguments.bf16 or arguments.fp16) or model.dtype in (torch.float16, torch.bfloat16)
