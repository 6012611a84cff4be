"""LoRA on the head itself, as PEFT keeps it: its matrices for the unmerged, exact head."""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from memhead.logprobs import LowRankUpdate


def is_lora(layer: object) -> bool:
    """Whether ``layer`` is a LoRA layer of any variant around a linear head."""
    return isinstance(layer, LoraLinear)


def is_supported(layer: object) -> bool:
    """Whether ``layer`` is a LoRA layer around a linear head with plain LoRA adapters only."""
    return isinstance(layer, LoraLinear) and not any(unsupported(layer, name) for name in layer.lora_A)


def unsupported(layer: LoraLinear, adapter: str) -> str:
    """What plain LoRA does not cover in ``adapter``, by PEFT's name for it; empty if there is nothing."""
    if adapter in layer.lora_variant:
        return type(layer.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
    if layer.lora_bias.get(adapter):
        return "lora_bias"
    return "fan_in_fan_out" if getattr(layer, "fan_in_fan_out", False) else ""


def low_rank_update(layer: nn.Module) -> LowRankUpdate | None:
    """The update that a LoRA layer would add at this moment; ``None`` for any other module.

    Several active adapters become one update of their summed rank. An adapter that is switched
    off (the reference pass) or merged into the weight adds nothing.

    Raises:
        ValueError: an active adapter is a variant of LoRA (DoRA, with bias, …), or several active
            ones use dropout, which each would have to apply for itself.
    """
    if not isinstance(layer, LoraLinear):
        return None
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()
        return None
    if layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in active:
        if what := unsupported(layer, name):
            raise ValueError(
                f"adapter {name!r} on the language-model head uses {what}; memhead covers plain LoRA: "
                "leave it out of the LoraConfig, or the head out of target_modules"
            )
    if not active:
        return None
    drops = {name: _dropout(layer.lora_dropout[name]) for name in active}
    if len(active) > 1 and any(drops.values()):
        raise ValueError(
            f"adapters {active} are active on the language-model head with dropout {drops}; "
            "several at once need lora_dropout=0"
        )
    if len(active) == 1:
        (name,) = active
        return LowRankUpdate(
            layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]), drops[name]
        )
    return LowRankUpdate(
        torch.cat([layer.lora_A[name].weight * layer.scaling[name] for name in active], dim=0),
        torch.cat([layer.lora_B[name].weight for name in active], dim=1),
    )


def _dropout(module: nn.Module) -> float:
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0
