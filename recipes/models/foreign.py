"""No code of a model's own: what comes with a checkpoint is data, and is never run, nor offered to be."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from recipes.problems import ConfigError, Problem


@contextmanager
def no_foreign_code(key: str, name: str) -> Iterator[None]:
    """Around whatever loads a checkpoint: its refusals, without their advice to trust the code all the same.

    Loading is told `trust_remote_code=False`, and pickles are read by torch's `weights_only`, its default.
    Raises ConfigError, under `key`, for a checkpoint that cannot be loaded without code of its own.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        message = "holds a pickle that is damaged, or runs code when it is read; it was not"
        raise ConfigError([Problem(key, message, name, "take a checkpoint in safetensors")]) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise _needs_code(key, name) from error


def require_own_attention(key: str, name: str, config: Any) -> None:
    """Raises ConfigError for a configuration that asks for an attention kernel of the hub, which is code.

    To be asked before a model is made by it: making one fetches and runs that.
    """
    if "/" in (config.get_text_config()._attn_implementation or ""):
        raise _needs_code(key, name)


def _needs_code(key: str, name: str) -> ConfigError:
    message = "needs code of its own to be loaded, which is not run here"
    remedy = "name a model of an architecture that transformers itself knows"
    return ConfigError([Problem(key, message, name, remedy)])
