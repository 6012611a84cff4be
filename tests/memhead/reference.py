"""What memhead must equal: plain full logits in float64, with autograd through every step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


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


def full_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """(N, V) logits in the dtype of the inputs."""
    logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def full_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (N,) from full logits; zero where the mask is false."""
    logp = full_logits(hidden, weight, **options).log_softmax(-1)
    chosen = logp.gather(1, targets[:, None]).squeeze(1)
    entropy = -torch.where(
        logp == float("-inf"), 0.0, logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)
    ).sum(-1)
    if mask is None:
        return chosen, entropy
    return torch.where(mask, chosen, 0.0), torch.where(mask, entropy, 0.0)


def double(value: Any) -> Any:
    """Floating-point tensors widened to float64, as leaves of their own; the rest as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double()
    return value


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    norm = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / (norm if norm else 1.0)
