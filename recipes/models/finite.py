"""Is a model usable at all? Weights or logits that are NaN or infinite make every other figure nonsense; so do logits
that are the same for every prompt, which is what is left where RMSNorm divides by an overflow.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from recipes.models.adapters import without_adapters
from recipes.models.mode import in_evaluation_mode
from recipes.processes import first

Named = Iterable[tuple[str, Tensor]]


def first_not_finite(tensors: Named) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None if there is none. One synchronisation if so.

    Of a tensor in parts over several processes, as FSDP2 and ZeRO-3 keep it, this one's part.
    """
    floating = [(name, _here(tensor).detach()) for name, tensor in tensors if tensor.is_floating_point()]
    floating = [(name, tensor) for name, tensor in floating if tensor.numel()]
    if not floating:
        return None
    largest = torch.nn.utils.get_total_norm([tensor for _, tensor in floating], norm_type=float("inf"))
    if bool(torch.isfinite(largest)):
        return None
    return next((name for name, tensor in floating if not bool(torch.isfinite(tensor).all())), None)


def _here(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)  # of ZeRO-3, whose parameter itself is empty


@torch.no_grad()
def why_unusable(model: Any, batch: Any | None = None) -> str | None:
    """Why a model is of no use, as the rest of a sentence, by its weights and its logits for `batch`. None: it may be.

    batch: what the tokenizer gave for some prompts, padded on the left. The model's mode and the random state are left
    as they were. All processes of a run must ask: one may hold the part that is not finite, and all run the model.
    """
    weight = first(first_not_finite(model.named_parameters()))
    if weight is not None:
        return f"its weight {weight} holds NaN or infinity"
    return None if batch is None else why_no_distribution(model, batch)


@torch.no_grad()
def why_no_distribution(model: Any, batch: Any) -> str | None:
    """The same of a model whose weights are known to be finite. Where several processes share it, all must ask."""
    batch = batch.to(model.device)
    logits = _last_logits(model, batch)
    if not bool(torch.isfinite(logits).all()):
        return "its weights are finite, but its logits for the task's prompts are NaN or infinite"
    if _same_for_all(logits, batch["input_ids"]) and bool(_here(model.get_output_embeddings().weight).any()):
        return "its weights are finite, but something overflows: its logits are the same whatever the prompt"
    return None


def _last_logits(model: Any, batch: Any) -> Tensor:
    """(B, V), after each prompt: of a whole prompt they might not fit."""
    plain = without_adapters(model)
    short = "logits_to_keep" in inspect.signature(plain.forward).parameters
    with in_evaluation_mode(model):
        return model(**batch, **({"logits_to_keep": 1} if short else {})).logits[:, -1]


def _same_for_all(logits: Tensor, prompts: Tensor) -> bool:
    """Whether prompts that differ have the same logits to the bit, as no model has that reads them."""
    return len(prompts.unique(dim=0)) > 1 and bool((logits == logits[:1]).all())
