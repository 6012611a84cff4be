"""A short supervised start: GRPO learns from what it samples, so now and then a sample must be right already.

It stops as soon as the greedy accuracy on the held-out problems reaches a target. A look that was lucky stops it early
and flatters the accuracy *before* GRPO, so what GRPO adds is, if anything, understated.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memhead.shortage import is_out_of_memory
from recipes.config.schema import WarmStartConfig
from recipes.models.checkpoint import WARM_START
from recipes.models.generation import NO_CHAT, by_transformers, rendered
from recipes.models.load import load
from recipes.models.manifest import seal
from recipes.models.precision import Precision
from recipes.processes import by_main, is_main
from recipes.tracking.files import naming_what_failed
from recipes.tracking.phases import in_phase
from recipes.training.evaluation import evaluator
from recipes.training.finite import BadSteps, Diverged, unusable_for
from recipes.training.resume import model_to_load
from recipes.training.session import Session
from recipes.training.trainer import head_of_warm_start

_REMEDY = "lower run.warm_start.learning_rate, or lengthen run.warm_start.warmup_steps"
IGNORED = -100  # the label that transformers leaves out of its loss

Examples = list[tuple[Any, str]]  # (prompt: text or chat messages, right completion)
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class WarmStartStep:
    """One optimizer step of it."""

    step: int
    loss: float  # mean cross entropy a completion token, before the step
    learning_rate: float
    accuracy: float  # at the last probe; nan before the first


@dataclass(frozen=True)
class WarmStartResult:
    """How far the warm start went."""

    steps: int
    examples: int
    accuracy: float  # at the last probe; nan without one
    loss: float  # mean cross entropy a completion token, at the last step


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    settings: WarmStartConfig,
    *,
    precision: Precision,
    probe: Callable[[], float],
    on_step: Callable[[WarmStartStep], Any] = lambda step: None,
    chat: Mapping[str, Any] = NO_CHAT,
    max_bad_steps: int = 3,
) -> WarmStartResult:
    """Train on `examples` in their order, from the start again when they end, until `probe()` reaches the target.

    `probe` gives the accuracy (0 to 1), every `check_every` steps and at the end, or never; `on_step` is called after
    each step.
    A batch that does not fit is cut, with the same gradient. `chat`: what the chat template is told beside the
    messages. A step that is not finite is skipped; `max_bad_steps` in a row raise Diverged.
    Raises ValueError if there are fewer examples than one batch.
    """
    batches = _batches(functools.partial(collate, tokenizer, chat=chat), examples, settings.batch_size)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        betas=(0.9, settings.adam_beta2),
        weight_decay=settings.weight_decay,
    )
    gradient, bad_steps = _Gradient(model, precision), BadSteps(max_bad_steps, _REMEDY)
    taken = WarmStartStep(0, math.nan, math.nan, math.nan)
    model.train()
    for step in range(1, settings.steps + 1):
        rate = settings.learning_rate * rate_share(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = gradient(next(batches))
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            bad_steps.good(step)
        else:
            print(
                bad_steps.bad(f"warm start, step {step}: the loss is {loss}, the gradient norm {norm}"),
                flush=True,
            )
            bad_steps.stop_at_limit()
        optimizer.zero_grad()
        every = settings.check_every
        looked = every is not None and (step % every == 0 or step == settings.steps)
        taken = WarmStartStep(step, loss, rate, probe() if looked else taken.accuracy)
        on_step(taken)
        if settings.target_accuracy is not None and taken.accuracy >= settings.target_accuracy:
            break
    return WarmStartResult(taken.step, taken.step * settings.batch_size, taken.accuracy, taken.loss)


@in_phase("warm start")
def begin_supervised(session: Session, settings: WarmStartConfig) -> Session:
    """The run's warm start: trained, logged, saved beside the run, where adapters find their base.

    The main process trains; the others wait, and load what it saved. Returns the session to go on with.
    """
    by_main(lambda: _train_and_save(session, settings))
    if is_main():
        return session
    config = session.config
    model, _ = load(model_to_load(config, session.folder), session.task, config.run.seed, lora=config.lora)
    return replace(session, model=model)


def _train_and_save(session: Session, settings: WarmStartConfig) -> None:
    config, folder, model, tokenizer = session.config, session.folder, session.model, session.tokenizer
    examples = session.task.warm_start_examples(settings.steps * settings.batch_size)
    generate = by_transformers(model, tokenizer, config.chat_template_kwargs, session.precision)
    evaluate = evaluator(config, session.task, generate)
    started = time.perf_counter()

    until = (
        ""
        if settings.target_accuracy is None
        else f", or until {settings.target_accuracy:g} of the answers are right"
    )
    print(
        f"warm start  at most {settings.steps} steps on right answers{until}: GRPO learns from what the model itself "
        "writes, so some of that must be right already",
        flush=True,
    )

    def report(taken: WarmStartStep) -> None:
        folder.metrics.append({"warm_start": asdict(taken)})
        if taken.step % (settings.check_every or settings.steps) == 0:
            accuracy = "" if math.isnan(taken.accuracy) else f"accuracy {taken.accuracy:.3f}  "
            print(
                f"warm start  step {taken.step}  loss {taken.loss:.3f}  {accuracy}"
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )

    with head_of_warm_start(config, model):
        result = warm_start(
            model,
            tokenizer,
            examples,
            settings,
            precision=session.precision,
            probe=lambda: evaluate(sampled=False)["accuracy"],
            on_step=report,
            chat=config.chat_template_kwargs,
            max_bad_steps=config.run.max_bad_steps,
        )
    reason = unusable_for(session)
    if reason is not None:
        raise Diverged(f"the warm start has diverged: of its model, {reason}; {_REMEDY}")
    folder.write_json("warm_start.json", asdict(result) | {"seconds": time.perf_counter() - started})
    place = folder.path / WARM_START
    with naming_what_failed(place):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        seal(place)
    # An adapter remembers its base by this name.
    model.name_or_path = model.config._name_or_path = str(place.resolve())


def rate_share(step: int, settings: WarmStartConfig) -> float:
    """The learning rate at a step, counted from 1, as a share of its peak: up, then down to `final_rate`."""
    up = min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
    done = step / settings.steps
    if settings.schedule == "cosine":
        half = (1.0 - settings.final_rate) / 2
        return up * (settings.final_rate + half * (1.0 + math.cos(math.pi * done)))
    return up * max(settings.final_rate, 1.0 - done)


class _Gradient:
    """Adds up the gradient of a batch's mean loss, in as few parts as fit the memory."""

    def __init__(self, model: PreTrainedModel, precision: Precision) -> None:
        self._model, self._precision = model, precision
        self._rows: int | None = None  # of a part, once a whole batch did not fit

    def __call__(self, batch: Batch) -> float:
        """The batch's loss; its gradient is in the parameters."""
        part = self._rows or len(batch["input_ids"])
        while True:
            try:
                return self._in_parts(batch, part)
            except (RuntimeError, MemoryError) as error:
                if part == 1 or not is_out_of_memory(error):
                    raise
            self._model.zero_grad()  # outside the handler, which would keep the failed pass's tensors alive
            torch.cuda.empty_cache()
            print(f"warm start: {part} rows at a time do not fit, going on with {part // 2}", flush=True)
            part = self._rows = part // 2

    def _in_parts(self, batch: Batch, part: int) -> float:
        tokens = (batch["labels"][:, 1:] != IGNORED).sum()
        total = 0.0
        for start in range(0, len(batch["input_ids"]), part):
            rows = {
                name: tensor[start : start + part].to(self._model.device) for name, tensor in batch.items()
            }
            with self._precision.autocast(self._model.device):
                loss = self._model(
                    **rows, use_cache=False, num_items_in_batch=tokens.to(self._model.device)
                ).loss
            loss.backward()
            total += float(loss.detach())
        return total


def _batches(collated: Callable[[Examples], Batch], examples: Examples, batch_size: int) -> Iterator[Batch]:
    """Batches of `batch_size` without end; the examples left over by the last whole batch of a round are dropped."""
    if len(examples) < batch_size:
        raise ValueError(
            f"run.warm_start.batch_size: {batch_size} is more than the {len(examples)} examples there are; lower it"
        )
    rounds = itertools.cycle(range(0, len(examples) - batch_size + 1, batch_size))
    return (collated(examples[start : start + batch_size]) for start in rounds)


def collate(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, chat: Mapping[str, Any] = NO_CHAT
) -> Batch:
    """Prompt, completion, end token, padded on the right: three tensors (B, longest).

    Labels are the completion and its end token; prompt and padding are left out of the loss.
    """
    texts, special = rendered(tokenizer, [prompt for prompt, _ in examples], chat)
    prompts = tokenizer(texts, add_special_tokens=special).input_ids
    answers = tokenizer([answer for _, answer in examples], add_special_tokens=False).input_ids
    answers = [[*answer, tokenizer.eos_token_id] for answer in answers]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    input_ids, labels, mask = [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        padding = longest - len(prompt) - len(answer)
        input_ids.append(prompt + answer + [tokenizer.pad_token_id] * padding)
        labels.append([IGNORED] * len(prompt) + answer + [IGNORED] * padding)
        mask.append([1] * (len(prompt) + len(answer)) + [0] * padding)
    return {
        "input_ids": torch.tensor(input_ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
    }
