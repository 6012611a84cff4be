"""The arguments of every function that scores tokens, checked once and brought into the form the sweeps use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memhead import checks
from memhead.products import result_dtype
from memhead.statistics import FoldSpec

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class Settings(NamedTuple):
    """How to score, in plain values."""

    spec: FoldSpec
    chunk: int | tuple[int, int] | None  # rows, or (rows, columns), of a tile; None: planned
    backend: str | None
    compute: torch.dtype


class Arguments(NamedTuple):
    """The arguments with a value for each row of hidden (N, H), and the plain ones as settings."""

    targets: Tensor  # (N,) int64
    mask: Tensor | None  # (N,) bool
    temperature: Tensor | None  # (N,) of the results' dtype; None: the same for all, in settings
    settings: Settings


def read_arguments(
    hidden: Tensor,  # (..., H)
    targets: Tensor,
    compute: torch.dtype,
    *,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    extra_outputs: Sequence[str],
    chunk: int | tuple[int, int] | None,
    backend: str | None,
) -> Arguments:
    """See :func:`memhead.linear_logprobs`. The head's tensors and the targets have been checked by the caller.

    Raises:
        ValueError: naming argument, value and rule.
    """
    checks.check_chunk(chunk)
    checks.check_logit_options(softcap, logit_scale)
    wanted = wanted_outputs(entropy, extra_outputs)
    per_row, number = split_temperature(temperature, hidden, result_dtype(compute))
    if mask is not None:
        mask = flat_mask(mask, hidden)
    spec = FoldSpec(float(logit_scale), float(softcap or 0.0), number, *wanted)
    return Arguments(targets.reshape(-1).long(), mask, per_row, Settings(spec, chunk, backend, compute))


def wanted_outputs(entropy: bool, extra_outputs: Sequence[str]) -> list[bool]:
    """Which of :data:`OUTPUTS` are asked for."""
    checks.check_names("extra_outputs", extra_outputs, OUTPUTS)
    return [entropy or "entropy" in extra_outputs, *(name in extra_outputs for name in OUTPUTS[1:])]


def split_temperature(
    temperature: float | Tensor, hidden: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    """The temperature as a tensor (N,) in ``dtype``, or None, and as a number, 1 where there is a tensor."""
    if not isinstance(temperature, Tensor | Sequence):
        checks.check_positive("temperature", temperature)
        return None, float(temperature)
    checks.check_rows("temperature", temperature, hidden)
    checks.check_device("temperature", temperature, hidden)
    return temperature.detach().reshape(-1).to(dtype), 1.0


def flat_mask(mask: Tensor, hidden: Tensor) -> Tensor:
    """A mask (...) as (N,) bool."""
    checks.check_rows("mask", mask, hidden)
    checks.check_device("mask", mask, hidden)
    return mask.reshape(-1).bool()


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """dtype of the matrix products' operands: the wider of the two, or autocast's, which leaves float64 alone."""
    wider = torch.promote_types(hidden.dtype, weight.dtype)
    if wider != torch.float64 and torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return wider
