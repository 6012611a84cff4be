"""`step.ahead`: a vLLM server samples the next rollout while this one trains, one rollout off-policy.

    rollout 0   sampled and waited for; then the server begins with rollout 1, by the same weights
    rollout k   waited for; the server gets the weights as they are now, and begins with rollout k + 1

A rollout thus comes from the weights of one rollout before. What corrects it is TRL's importance ratio, formed as it is
for vLLM anyway: the log-probabilities of the model before the rollout's first update, over those that the sampler
reported of each token. A session's first rollout, the last of an epoch and whatever comes after it are sampled when
they are asked for; so is the first after --resume.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from threading import Thread
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from recipes.training.generation_batches import Rows

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Trainer
else:
    _Trainer = object


class Ahead(_Trainer):
    """To be put before TRL's trainer, where it samples on a vLLM server: :func:`ahead`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._source: Iterator[Any] | None = None  # of an epoch's micro-batches
        self._read: deque[Any] = deque()  # of it, and not yet trained on
        self._next: Any = None  # the rows of the next rollout, if they are known
        if self.accelerator.is_main_process:
            self.vllm_generation.vllm_client = AheadClient(self.vllm_generation.vllm_client)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """transformers' method for the micro-batches of an update; reads on to the next rollout's first."""
        if epoch_iterator is not self._source:
            self._source, self._read = epoch_iterator, deque()
        every = self.args.steps_per_generation * self.num_iterations
        for _ in range(every + 1 - len(self._read)):
            if (micro_batch := next(epoch_iterator, None)) is None:
                break
            self._read.append(micro_batch)
        self._next = self._read[every] if len(self._read) > every else None
        given = [self._read.popleft() for _ in range(min(num_batches, len(self._read)))]
        return super().get_batch_samples(iter(given), num_batches, device)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._generate_single_turn(*args, **kwargs)
        if self.model.training:
            self._begin_next()
        return found

    def _begin_next(self) -> None:
        rows, self._next = self._next, None
        if rows is None or self._is_last_rollout():
            return
        rows = rows.rows if isinstance(rows, Rows) else rows
        prompts, *_ = self._tokenize_prompts([row["prompt"] for row in rows])
        prompts = gather_object(prompts)
        if self.accelerator.is_main_process:
            self.vllm_generation.vllm_client.begin(prompts[:: self.num_generations])

    def _is_last_rollout(self) -> bool:
        window = self.args.gradient_accumulation_steps
        updates = self.args.steps_per_generation * self.num_iterations // window
        return self.state.global_step + updates >= self.state.max_steps


class AheadClient:
    """TRL's client of a vLLM server, with one request that runs while nobody waits for it.

    New weights are sent when that has ended, so that one set of weights samples all of it.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._options: dict[str, Any] = {}  # of the last request
        self._begun: tuple[Any, Future[Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(self, prompts: Any, **options: Any) -> Any:
        """The client's method; if this very request has been begun, its end."""
        self._options = options
        if self._begun is not None and self._begun[0] == (prompts, options):
            (_, future), self._begun = self._begun, None
            return future.result()
        return self._client.generate(prompts=prompts, **options)

    def begin(self, prompts: Any) -> None:
        """Sends a request like the last one, and returns."""
        options = self._options
        future = in_background(lambda: self._client.generate(prompts=prompts, **options))
        self._begun = ((prompts, options), future)

    def update_named_params(self, *args: Any, **kwargs: Any) -> Any:
        """The client's method, after what has been begun."""
        if self._begun is not None:
            self._begun[1].exception()  # whoever asks for the completions gets it
        return self._client.update_named_params(*args, **kwargs)


def in_background(action: Callable[[], Any]) -> Future[Any]:
    """What `action` returns or raises. Unlike an executor's its thread keeps no process alive: one that ends without
    the result, stopped or failed, must not wait for a server that may never answer."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def ahead(trainer_class: type) -> type:
    """TRL's trainer class with :class:`Ahead` before it."""
    return type(f"Ahead{trainer_class.__name__}", (Ahead, trainer_class), {})
