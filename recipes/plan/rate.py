"""What a device can do, measured by a short matrix product or taken from its maker."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

_SIZES = {"cuda": 4096, "cpu": 1024}  # of the square matrices: large enough for the device's full rate
_ROUNDS = 3
_OF_PUBLISHED = (
    0.8  # what a plain product reaches of a card's published rate: 800 of 989 TFLOP/s, measured on an H100
)


@dataclass(frozen=True)
class Rate:
    """Operations a second of a large matrix product, bytes a second of memory. measured: by a product, here."""

    operations: float
    bandwidth: float
    measured: bool = False


# TFLOP/s with dense half-precision operands and TB/s, as the makers publish them.
_PUBLISHED = {
    "T4": (65, 0.32),
    "L4": (121, 0.30),
    "4090": (165, 1.01),
    "A100-40": (312, 1.56),
    "A100-80": (312, 2.04),
    "H100": (989, 3.35),
    "H200": (989, 4.80),
}
_MAIN_MEMORY = 2e10  # bytes a second: an estimate for a CPU, where arithmetic decides


def published(card: str) -> Rate | None:
    """Of a card by its name in `recipes.plan.plan.CARDS`, whatever the case; None for another."""
    found = _PUBLISHED.get(card.strip().upper())
    return None if found is None else Rate(found[0] * 1e12 * _OF_PUBLISHED, found[1] * 1e12)


def rate_here(dtype: torch.dtype) -> Rate:
    """Of this machine: its first GPU, or its CPU. A GPU's bandwidth is that of the card named like it, else 1 TB/s."""
    if not torch.cuda.is_available():
        return Rate(matrix_rate(torch.device("cpu"), torch.float32), _MAIN_MEMORY, measured=True)
    device = torch.device("cuda", 0)
    name = torch.cuda.get_device_name(device)
    bandwidth = next((r[1] for card, r in _PUBLISHED.items() if card.partition("-")[0] in name), 1.0)
    return Rate(matrix_rate(device, dtype), bandwidth * 1e12, measured=True)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, the best of a few rounds. Takes a small part of a second."""
    size = _SIZES.get(device.type, 1024)
    repeats = 20 if device.type == "cuda" else 1
    generator = torch.Generator(device).manual_seed(0)  # the run's own draws stay as they are
    one = torch.rand(size, size, device=device, generator=generator).to(dtype)
    out = torch.mm(one, one)
    best = float("inf")
    for _ in range(_ROUNDS):
        _wait(device)
        began = time.perf_counter()
        for _ in range(repeats):
            torch.mm(one, one, out=out)
        _wait(device)
        best = min(best, (time.perf_counter() - began) / repeats)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
