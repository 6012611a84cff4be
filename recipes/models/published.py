"""What a published model has that would fail late, or train something else without a word; said before training.

require_trainable(own, config.model, lora)       by its config.json: quantised by others, an encoder
require_whole(model, found, name, key)           by what was loaded: weights drawn at random, an adapter on top
require_known_tokens(model, tokenizer, texts)    tokens that the model has no embedding for
require_open_end(tokenizer, prompt)              a tokenizer that ends the prompts
require_blanks(tokenizer, text, name)            one that loses the blanks
unended_turn(tokenizer, prompt, ends, chat)      a sentence, where a chat's end of a turn ends no completion
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recipes.config.schema import LoraSection, ModelConfig
from recipes.models.saved import unusable
from recipes.problems import ConfigError, Problem

_KEY = "model.name"
_ANSWER = "forty-two"  # what an answer may say


def require_trainable(own: Any, model: ModelConfig, lora: LoraSection | None) -> None:
    """Raises ConfigError for a model that its configuration says cannot be trained as the run asks.

    own: transformers' configuration of it. For `model.loader: transformers`; Unsloth has kernels of its own.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    if type(own) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(own, "is_decoder", False):
        message = f"is an encoder ({own.model_type}): each of its tokens sees those after it"
        raise ConfigError([Problem(_KEY, message, model.name, "name a causal language model")])
    method = _quantised_by(getattr(own, "quantization_config", None))
    if method is None:
        return
    if method != "bitsandbytes":
        message = f"is quantised by {method}, on which nothing has been trained here"
        remedy = "name the weights that it was made from, with model.load_in_4bit: true to save memory"
        raise ConfigError([Problem(_KEY, message, model.name, remedy)])
    if lora is None:
        message = "is quantised by bitsandbytes, and quantised weights cannot be trained"
        remedy = "add a lora section, or name the weights that it was made from"
        raise ConfigError([Problem(_KEY, message, model.name, remedy)])


def _quantised_by(written: Any) -> str | None:
    """By its quantization_config; None where it has none."""
    if not written:
        return None
    options = written if isinstance(written, dict) else written.to_dict()
    method = options.get("quant_method")
    if method is None:  # as older files of bitsandbytes
        return (
            "bitsandbytes" if options.get("load_in_4bit") or options.get("load_in_8bit") else "another tool"
        )
    return str(getattr(method, "value", method))


def require_whole(model: Any, found: dict[str, Any], name: str, remedy: str, key: str = "") -> None:
    """Raises ConfigError where weights were missing, which transformers draws at random, or an adapter came along.

    found: `from_pretrained`'s loading information. key: as `recipes.models.saved.unusable` takes it.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        message = "holds an adapter beside the whole weights, and transformers puts it on"
        raise unusable(name, message, "merge it into them, or take adapter_config.json out", key)
    drawn = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if drawn:
        more = f" and {len(drawn) - 1} more" if drawn[1:] else ""
        message = f"its weights lack {drawn[0]}{more}, or have another shape than config.json says"
        raise unusable(name, message, remedy, key)


def require_known_tokens(
    model: Any, tokenizer: Any, texts: Iterable[list[int]], name: str, key: str = ""
) -> None:
    """Raises ConfigError for tokens that the model has no embedding for: its padding, its end, or one of the texts'.

    A tokenizer may have more tokens than the model as long as they are not used, as Gemma 3's has.
    texts: token ids, looked at only where the tokenizer has such tokens.
    """
    rows = model.config.get_text_config().vocab_size
    if max(tokenizer.get_vocab().values(), default=0) < rows:
        return
    special = {"padding token": tokenizer.pad_token_id, "end token": tokenizer.eos_token_id}
    for what, number in special.items():
        if number >= rows:
            message = (
                f"the tokenizer's {what} {tokenizer.convert_ids_to_tokens(number)!r} is number {number:,}"
            )
            raise _unknown(message, rows, name, key)
    largest = max((max(ids, default=0) for ids in texts), default=0)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise _unknown(f"a text of the task has the token {token!r}, number {largest:,}", rows, name, key)


def require_open_end(tokenizer: Any, prompt: list[int], name: str, key: str = "") -> None:
    """Raises ConfigError for a tokenizer that ends a prompt itself: the model would go on after its own end."""
    if len(prompt) > 1 and prompt[-1] == tokenizer.eos_token_id:
        message = f"its tokenizer puts the end token {tokenizer.eos_token!r} behind every text, so behind each prompt"
        remedy = (
            "take it out: add_eos_token in tokenizer_config.json, or the post_processor of tokenizer.json"
        )
        raise unusable(name, message, remedy, key)


def require_blanks(tokenizer: Any, text: str, name: str, key: str = "") -> None:
    """Raises ConfigError for a tokenizer that loses the blanks of a text: its prompts would be other ones.

    So transformers 5 reads a byte-level tokenizer.json by the class LlamaTokenizer (DeepSeek's distilled Llamas).
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in ids:
        return
    again = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if 2 * sum(map(str.isspace, again)) < sum(map(str.isspace, text)):
        message = f"its tokenizer ({type(tokenizer).__name__}) loses the blanks between words"
        remedy = 'write "tokenizer_class": "PreTrainedTokenizerFast" into its tokenizer_config.json'
        raise unusable(name, message, remedy, key)


def unended_turn(tokenizer: Any, prompt: list[dict[str, str]], ends: list[int], chat: Any) -> str | None:
    """A sentence, where the template closes an answer with a token that ends no completion; None where it does.

    ends: the tokens that do. Qwen2.5's base models have such a template, and so has a Phi-3 whose
    generation_config.json was lost.
    """
    answered = [*prompt, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(answered, **{**chat, "tokenize": False}))
    except Exception:  # a template may raise anything, and need not know answers
        return None
    after = tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
    closing = next((number for number in after if number in tokenizer.added_tokens_decoder), None)
    if closing is None or closing in ends:
        return None
    token, known = tokenizer.convert_ids_to_tokens(closing), tokenizer.convert_ids_to_tokens(ends)
    return (
        f"The chat template closes an answer with {token!r}, which ends no completion; {', '.join(known)} does. If the "
        f"model writes it and goes on, put {closing} into eos_token_id of its generation_config.json"
    )


def _unknown(message: str, rows: int, name: str, key: str) -> ConfigError:
    remedy = (
        "take the model's own tokenizer, or save the model with its embeddings resized to the tokenizer's"
    )
    return unusable(name, f"{message}, and the model has {rows:,} embeddings", remedy, key)
