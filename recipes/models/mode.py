"""A model's mode for a while; after it the model is in the one it was in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


def in_evaluation_mode(model: Any) -> AbstractContextManager[None]:
    """Without dropout."""
    return _in_mode(model, training=False)


def in_training_mode(model: Any) -> AbstractContextManager[None]:
    """With dropout, and with gradient checkpointing, if there is any."""
    return _in_mode(model, training=True)


@contextmanager
def _in_mode(model: Any, *, training: bool) -> Iterator[None]:
    was_training = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(was_training)
