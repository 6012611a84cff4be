"""Tokenizers of models made from nothing: a token a character, or `model.tokenizer: bpe`, trained on a task's text.

    tokenizer = bpe_tokenizer(task.corpus(), 2048)
    tokenizer.apply_chat_template([{"role": "user", "content": "2 + 2?"}], tokenize=False, add_generation_prompt=True)
    -> "<|user|>2 + 2?<eos><|assistant|>"

The second can write any text, since its alphabet is the 256 bytes. Every digit is a token of its own: a small model
does not learn arithmetic on hundreds of unrelated numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of `characters`, and `<pad>`, `<eos>`, `<unk>` as ids 0, 1, 2.

    It pads on the left, as generation needs. Raises ValueError if a character occurs twice.
    """
    if len(set(characters)) != len(characters):
        raise ValueError(f"characters: {characters!r} holds a character twice; give each once")
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # characters are joined again without blanks
    return _wrapped(tokenizer, unk_token=UNKNOWN)


def bpe_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary` tokens; fewer if the texts have no more pairs to merge.

    `<pad>` and `<eos>` are ids 0 and 1; each role of a chat has a token that opens it. It pads on the left, as
    generation needs. The same texts give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS, *(f"<|{role}|>" for role in ROLES)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer, chat_template=CHAT_TEMPLATE)


def _wrapped(tokenizer: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    """As transformers takes it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **more,
    )
