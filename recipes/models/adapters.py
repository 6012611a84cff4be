"""A model and the adapters around it."""

from __future__ import annotations

from typing import Any


def without_adapters(model: Any) -> Any:
    """The causal language model under its adapters, or the model itself where it has none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
