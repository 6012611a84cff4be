"""Accuracy on problems that training never sees: greedy, in batches."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What the model answered: one completion and one verdict for each row, in the order of the rows."""

    completions: list[str]
    correct: list[bool]

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0 to 1."""
        return sum(self.correct) / len(self.correct)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    is_correct: Callable[[str, Row], bool],
    *,
    max_new_tokens: int,
    batch_size: int = 256,
) -> Evaluation:
    """Answer the "prompt" of every row greedily and let `is_correct(completion, row)` judge.

    The random state and the model's mode are left as they were. Raises ValueError if there are no rows.
    """
    kept = list(rows)
    if not kept:
        raise ValueError("rows: none given; evaluation needs at least one problem")
    completions: list[str] = []
    for start in range(0, len(kept), batch_size):
        prompts = [row["prompt"] for row in kept[start : start + batch_size]]
        completions += complete_greedily(model, tokenizer, prompts, max_new_tokens)
    return Evaluation(
        completions, [is_correct(text, row) for text, row in zip(completions, kept, strict=True)]
    )


@torch.no_grad()
def complete_greedily(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Any], max_new_tokens: int
) -> list[str]:
    """One greedy completion, of at most `max_new_tokens` tokens, for each prompt (text, or a list of chat messages)."""
    encoded = encode(tokenizer, prompts).to(model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    was_training = model.training
    model.eval()
    try:
        tokens = model.generate(**encoded, generation_config=config)  # (B, prompt + completion)
    finally:
        model.train(was_training)
    answers = tokens[:, encoded["input_ids"].shape[1] :]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def encode(tokenizer: PreTrainedTokenizerBase, prompts: list[Any]) -> Any:
    """Prompts as one batch padded on the left: `input_ids` and `attention_mask`, both (B, longest)."""
    chat = not isinstance(prompts[0], str)
    texts = (
        [
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in prompts
        ]
        if chat
        else prompts
    )
    # A chat template writes its own special tokens: the tokenizer must not add them a second time.
    return tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not chat
    )
