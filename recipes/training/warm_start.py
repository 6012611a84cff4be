"""A short supervised start: GRPO learns from what it samples, so now and then a sample must be right already.

It stops as soon as the greedy accuracy on the held-out problems reaches a target. A look that was lucky stops it early
and flatters the accuracy *before* GRPO, so what GRPO adds is, if anything, understated.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.config.schema import WarmStartConfig
from recipes.models.generation import rendered

IGNORED = -100  # the label that transformers leaves out of its loss

Examples = list[tuple[Any, str]]  # (prompt: text or chat messages, right completion)


@dataclass(frozen=True)
class WarmStartResult:
    """How far the warm start went."""

    steps: int
    examples: int
    accuracy: float  # at the last probe
    loss: float  # mean cross entropy a completion token, at the last step


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    settings: WarmStartConfig,
    *,
    probe: Callable[[], float],
    on_step: Callable[[int, float, float], Any] = lambda step, loss, accuracy: None,
) -> WarmStartResult:
    """Train on `examples` in their order, from the start again when they end, until `probe()` reaches the target.

    The learning rate rises for 20 steps and then falls in a straight line to a twentieth at `settings.steps`.
    `probe` gives the accuracy (0 to 1), every `check_every` steps and at the end; `on_step(step, loss, last
    accuracy)` is called after each step. Raises ValueError if there are fewer examples than one batch.
    """
    batches = _batches(tokenizer, examples, settings.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    accuracy, loss, step = math.nan, math.nan, 0
    model.train()
    for step in range(1, settings.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(step, settings.steps)
        loss = _train_step(model, optimizer, next(batches))
        if step % settings.check_every == 0 or step == settings.steps:
            accuracy = probe()
        on_step(step, loss, accuracy)
        if settings.target_accuracy is not None and accuracy >= settings.target_accuracy:
            break
    return WarmStartResult(steps=step, examples=step * settings.batch_size, accuracy=accuracy, loss=loss)


def _rate(step: int, steps: int) -> float:
    """The learning rate at a step, in proportion to its peak."""
    return min(1.0, step / 20) * max(0.05, 1.0 - step / steps)


def _train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    """One step of AdamW on one batch; the batch's loss before it."""
    loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _batches(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of `batch_size` without end; the examples left over by the last whole batch of a round are dropped."""
    if len(examples) < batch_size:
        raise ValueError(
            f"run.warm_start.batch_size: {batch_size} is more than the {len(examples)} examples there are; lower it"
        )
    return _endless(tokenizer, examples, batch_size)


def _endless(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    while True:
        for start in range(0, len(examples) - batch_size + 1, batch_size):
            yield collate(tokenizer, examples[start : start + batch_size])


def collate(tokenizer: PreTrainedTokenizerBase, examples: Examples) -> dict[str, Tensor]:
    """Prompt, completion, end token, padded on the right: three tensors (B, longest).

    Labels are the completion and its end token; prompt and padding are left out of the loss.
    """
    texts, special = rendered(tokenizer, [prompt for prompt, _ in examples])
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
