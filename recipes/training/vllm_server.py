"""A vLLM server that fails while a run uses it: one line with its address, and the work so far is kept.

TRL's client tries again by itself for about a minute, and then raises whatever its HTTP library, or reading an answer
that is none, comes to. For an answer it waits without end, so here it is one that gives up:

    with giving_up(config):
        trainer = GRPOTrainer(...)      whose client raises Unanswered in place of waiting for ever
    say_where_it_fails(trainer)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from functools import wraps
from math import inf
from time import monotonic
from typing import Any, NamedTuple

from memhead.shortage import is_out_of_memory
from recipes.config.load import RunConfig
from recipes.problems import visible
from recipes.training.ahead import in_background
from recipes.training.memory import save_last_step
from recipes.training.session import RunError

_REQUESTS = {
    "generate": "to sample",
    "update_named_params": "to take new weights",
    "reset_prefix_cache": "to forget its cache",
}
_SHOWN = 300  # characters of what went wrong
_LEAST = 10.0  # seconds that any request has, grpo.vllm_server_timeout: 0 included


class ServerFailed(RunError):
    """The server did not do what it was asked; the message says what, and how to go on."""


class Unanswered(TimeoutError):
    """A request was given up; the message says after how many seconds, and which key is about them."""


class Patience(NamedTuple):
    """How long a request may go unanswered, in seconds.

    Sampling may take long, and all that time nothing comes over the line. But vLLM answers `/health` beside its work.

    silent: while `/health` is not answered either.
    busy: in any case. As long as other processes would wait for the one that asks.
    """

    silent: float
    busy: float

    @classmethod
    def of(cls, config: RunConfig) -> Patience:
        """As TRL's keys and transformers' say."""
        silent, busy = config.grpo["vllm_server_timeout"], config.grpo["ddp_timeout"]
        return cls(max(silent, _LEAST), max(busy, _LEAST))

    @property
    def glance(self) -> float:
        """Seconds from one look at the server to the next, and that it has to answer one."""
        return min(10.0, self.silent / 4, self.busy / 4)

    def wait_for(self, request: Callable[[], Any], is_alive: Callable[[float], bool]) -> Any:
        """What `request` returns or raises, in a thread of its own. is_alive: within so many seconds.

        Raises Unanswered. While the process is suspended no time counts.
        """
        answer, before = in_background(request), monotonic()
        silent = waited = 0.0
        while not wait([answer], self.glance).done:
            alive, now = is_alive(self.glance), monotonic()
            passed, before = min(now - before, 3 * self.glance), now
            waited += passed
            silent = 0.0 if alive else silent + passed
            if not answer.done():
                self._judge(silent, waited)
        return answer.result()

    def _judge(self, silent: float, waited: float) -> None:
        if silent >= self.silent:
            raise Unanswered(
                f"no answer and no sign of life for {silent:.0f} s, /health included; "
                "for a server that needs longer raise grpo.vllm_server_timeout"
            )
        if waited >= self.busy:
            raise Unanswered(
                f"no answer for {waited:.0f} s; for requests that take longer raise grpo.ddp_timeout"
            )


@contextmanager
def giving_up(config: RunConfig) -> Iterator[None]:
    """While TRL's trainer is made inside, its client of a vLLM server waits as long as the configuration says.

    Raises ServerFailed for a server that takes what it is asked at the start, and does not answer.
    """
    grpo = config.grpo
    if not grpo["use_vllm"] or grpo["vllm_mode"] != "server":
        yield
        return
    from trl.generation import vllm_generation

    client = vllm_generation.VLLMClient
    vllm_generation.VLLMClient = patient(client, Patience.of(config))
    try:
        yield
    except Unanswered as error:
        url = grpo["vllm_server_base_url"] or f"http://{grpo['vllm_server_host']}:{grpo['vllm_server_port']}"
        raise ServerFailed(
            f"the vLLM server at {visible(url)} is not ready: {error}. Start it again, and then this command"
        ) from error
    finally:
        vllm_generation.VLLMClient = client


def patient(client: Any, patience: Patience) -> Any:
    """TRL's client class, every request of which is given up in time."""
    import requests

    class Patient(client):  # type: ignore[misc]
        def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
            """TRL's method, the first with a session. It gives up by itself where nothing listens, but neither where
            what listens is silent nor where it goes on answering another status than 200."""
            send, look = self.session.request, super().check_server
            self.session.request = lambda *args, **options: patience.wait_for(
                lambda: send(*args, **options), self._is_alive
            )
            start = Patience(silent=patience.silent + 2 * retry_interval, busy=inf)
            start.wait_for(lambda: look(total_timeout, retry_interval), lambda _: False)

        def _is_alive(self, seconds: float) -> bool:
            try:
                return bool(requests.get(f"{self.base_url}/health", timeout=seconds).status_code == 200)
            except requests.RequestException:
                return False

    return Patient


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
