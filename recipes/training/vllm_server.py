"""A vLLM server that fails while a run uses it: one line with its address, and the work so far is kept.

TRL's client tries again by itself for about a minute, and then raises whatever its HTTP library, or reading an answer
that is none, comes to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from memhead.shortage import is_out_of_memory
from recipes.problems import visible
from recipes.training.memory import save_last_step
from recipes.training.session import RunError

_REQUESTS = {
    "generate": "to sample",
    "update_named_params": "to take new weights",
    "reset_prefix_cache": "to forget its cache",
}
_SHOWN = 300  # characters of what went wrong


class ServerFailed(RunError):
    """The server did not do what it was asked; the message says what, and how to go on."""


def say_where_it_fails(trainer: Any) -> None:
    """Wraps the requests of a trainer that samples on a server, on the process that makes them."""
    client = getattr(getattr(trainer, "vllm_generation", None), "vllm_client", None)
    if client is None:
        return
    for name, what in _REQUESTS.items():
        setattr(client, name, _said(getattr(client, name), trainer, client.base_url, what))


def _said(request: Callable[..., Any], trainer: Any, url: str, what: str) -> Callable[..., Any]:
    @wraps(request)
    def asked(*args: Any, **options: Any) -> Any:
        try:
            return request(*args, **options)
        except Exception as error:  # of answers that are none, whatever comes of reading them
            if isinstance(error, RunError) or is_out_of_memory(error):
                raise
            reason = visible(f"{type(error).__name__}: {error}"[:_SHOWN])
            kept = save_last_step(trainer, "generation")
            raise ServerFailed(
                f"the vLLM server at {visible(url)} was asked {what} and failed ({reason}); start it again, and go on "
                f"with --resume. {kept}"
            ) from error

    return asked
