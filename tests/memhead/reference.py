"""Inputs for a head, and what it must equal: plain full logits of them, widened to float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memhead import reference
from memhead.reference import full_logits

__all__ = ["Head", "double", "full_logits", "full_logprobs", "make_head", "relative_error"]


class Head(NamedTuple):
    """Inputs of one head over one batch of rows."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    bias: Tensor  # (V,)
    mask: Tensor  # (N,) bool
    temperature: Tensor  # (N,)
    grad_logprobs: Tensor  # (N,) what arrives from the loss
    grad_entropy: Tensor  # (N,)


def make_head(
    rows: int,
    vocab: int,
    features: int = 24,
    dtype: torch.dtype = torch.float32,
    spread: float = 2.0,
    seed: int = 0,
) -> Head:
    """Random inputs whose logits have a standard deviation of ``spread``."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    mask = torch.rand(rows, generator=random) > 0.3
    mask[:1] = True
    return Head(
        normal(rows, features).to(dtype),
        (normal(vocab, features) * spread / features**0.5).to(dtype),
        torch.randint(vocab, (rows,), generator=random),
        normal(vocab).to(dtype),
        mask,
        (0.5 + torch.rand(rows, generator=random)).float(),
        normal(rows).float(),
        normal(rows).float(),
    )


def full_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies (N,) from full logits in the inputs' dtype, half precision included."""
    return reference.full_logprobs(hidden, weight, targets, entropy=True, widen=False, **options)[:2]


def double(value: Any) -> Any:
    """Floating-point tensors widened to float64, as leaves of their own; the rest as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double()
    return value


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference, divided by the norm of the expected value."""
    norm = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / (norm if norm else 1.0)
