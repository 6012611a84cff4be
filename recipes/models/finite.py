"""Is a model usable at all? A weight that is NaN or infinite, or logits that are, make every other figure nonsense."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Named = Iterable[tuple[str, Tensor]]


def first_not_finite(tensors: Named) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None if there is none. One synchronisation if so.

    Of a tensor in parts over several processes, as FSDP2 keeps it, this one's part.
    """
    floating = [(name, _here(tensor.detach())) for name, tensor in tensors if tensor.is_floating_point()]
    floating = [(name, tensor) for name, tensor in floating if tensor.numel()]
    if not floating:
        return None
    largest = torch.nn.utils.get_total_norm([tensor for _, tensor in floating], norm_type=float("inf"))
    if bool(torch.isfinite(largest)):
        return None
    return next((name for name, tensor in floating if not bool(torch.isfinite(tensor).all())), None)


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def why_unusable(model: Any, batch: Any | None = None) -> str | None:
    """What is not finite about a model, as the rest of a sentence: a weight, or the logits of `batch`. None: nothing.

    batch: what the tokenizer gave for some prompts. The model's mode and the random state are left as they were.
    """
    weight = first_not_finite(model.named_parameters())
    if weight is not None:
        return f"its weight {weight} holds NaN or infinity"
    if batch is None:
        return None
    was_training = model.training
    model.eval()
    try:
        logits = model(**batch.to(model.device)).logits
    finally:
        model.train(was_training)
    if bool(torch.isfinite(logits[batch["attention_mask"].bool()]).all()):
        return None
    return "its weights are finite, but its logits for the task's prompts are NaN or infinite"
