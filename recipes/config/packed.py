"""Settings that rule the packed step out, each with its reason.

The plan asks by the keys (`RunConfig.packs`), the trainer by what it is made with, such as adapters that came with a
model (recipes.training.packed_support, which adds what the model itself says). Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator


def by_noise(name: str, share: float | None) -> Iterator[str]:
    """A dropout of that name."""
    if share:
        yield f"{name} is {share}, and a packed row draws other numbers"


def by_adapter(dropout: float | None) -> Iterator[str]:
    """Of a LoRA, whoever has put it on."""
    yield from by_noise("lora.dropout", dropout)


def by_embeddings(neftune_noise_alpha: float | None) -> Iterator[str]:
    """Noise on the embeddings."""
    if neftune_noise_alpha:
        yield "neftune_noise_alpha adds noise by the length of a row, and a packed row has another"
