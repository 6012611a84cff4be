"""Where a run's model and tokenizer come from: one loader for each value of `model.loader`.

scratch        a small Llama with random weights, its tokenizer single characters or BPE; nothing is downloaded
transformers   `AutoModelForCausalLM.from_pretrained`, a local folder or a hub name
unsloth        `FastLanguageModel.from_pretrained`, with its adapters on (recipes.models.unsloth)
"""

import os
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recipes.config.schema import LoraSection, ModelConfig, ScratchConfig
from recipes.models import unsloth as unsloth_loader
from recipes.models.compiled import compile_layers
from recipes.models.foreign import require_own_attention
from recipes.models.generation_config import settle_generation_config
from recipes.models.published import require_trainable, require_whole
from recipes.models.saved import readable
from recipes.models.tokenizers import bpe_tokenizer, character_tokenizer
from recipes.tasks import Task


def scratch_config(shape: ScratchConfig, vocabulary: int, **tokens: int | None) -> LlamaConfig:
    """A new Llama's configuration. tokens: `pad_token_id` and `eos_token_id`, where they are known."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=None,
        **tokens,
    )


def scratch_llama(shape: ScratchConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A Llama of that shape for the tokenizer's vocabulary, float32; the same seed gives the same weights."""
    config = scratch_config(
        shape, len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load(
    config: ModelConfig, task: Task, seed: int, *, lora: LoraSection | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The run's model and tokenizer, by `model.loader`, on the GPU where there is one.

    task: for a tokenizer of its characters or its text.
    lora: the run's adapters, which the loader unsloth puts on at once and the others leave to the trainer.
    `load_config` has checked that loader and task fit each other.
    """
    if config.loader == "unsloth":
        return unsloth_loader.load(config, lora, seed)
    if config.loader == "scratch":
        model, tokenizer = _from_scratch(config, task, seed)
    else:
        model, tokenizer = _from_pretrained(config, lora)
    if config.compile_layers:
        compile_layers(model)
    return to_gpu(model), tokenizer


def _from_scratch(
    config: ModelConfig, task: Task, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A new model; its tokenizer is trained, the named one, or one token for each of the task's characters."""
    shape = config.scratch or ScratchConfig()
    if config.tokenizer == "bpe":
        tokenizer: PreTrainedTokenizerBase = bpe_tokenizer(task.corpus(), shape.vocabulary)
    elif config.tokenizer is not None:
        tokenizer = _named_tokenizer(config)
    else:
        tokenizer = character_tokenizer(task.characters)
    model = scratch_llama(shape, tokenizer, seed)
    set_dtype(model, _dtype(config) or torch.float32)
    return model, tokenizer


def set_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Of the weights, as from_pretrained: the rotary frequencies, a buffer, stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _from_pretrained(
    config: ModelConfig, lora: LoraSection | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint from a local folder or the hub. Code that comes with a checkpoint is never run.

    lora: None trains every weight, so `dtype: auto` is float32: an update of AdamW vanishes in bfloat16's rounding.
    """
    if config.name is None:
        raise ValueError("model.name: is missing; set it to a hub id or a local path")
    options: dict[str, Any] = {
        "dtype": _dtype(config) or (torch.float32 if lora is None else "auto"),
        "revision": config.revision,
    }
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    options |= quantisation(config)
    with readable("model", config.name, "name a whole model", "model.name", quiet=False):
        own = AutoConfig.from_pretrained(config.name, revision=config.revision, trust_remote_code=False)
        if config.attn_implementation is None:  # else it is the user's own word
            require_own_attention("model.name", config.name, own)
        require_trainable(own, config, lora)
        model, found = AutoModelForCausalLM.from_pretrained(
            config.name,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # and say which
            output_loading_info=True,
            **options,
        )
        require_whole(model, found, config.name, "name a whole causal language model", "model.name")
        if mended := settle_generation_config(model, config.name, "model.name"):
            print(mended, flush=True)
    return model, _named_tokenizer(config)


def quantisation(config: ModelConfig) -> dict[str, Any]:
    """The arguments of transformers' `from_pretrained` for 4-bit or 8-bit weights."""
    if not (config.load_in_4bit or config.load_in_8bit):
        return {}
    kind = BitsAndBytesConfig(
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=_dtype(config) or torch.bfloat16,
    )
    return {"quantization_config": kind}


def to_gpu(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the GPU where there is one; a quantised one is there already, and may not be moved."""
    if not torch.cuda.is_available() or getattr(model, "hf_quantizer", None) is not None:
        return model
    own = int(os.environ.get("LOCAL_RANK", "0"))  # as launchers number a machine's processes
    return model.to(torch.device("cuda", own))


def _named_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """That of `model.tokenizer`, or of `model.name`."""
    key = "model.name" if config.tokenizer is None else "model.tokenizer"
    name = str(config.tokenizer or config.name)
    with readable("tokenizer", name, "name a model with its tokenizer", key):
        return pretrained_tokenizer(name, config.revision_of(name))


def pretrained_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A saved tokenizer, set to pad on the left; one without a padding token pads with the end token.

    Raises ValueError if it has no end token: nothing would end a completion.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        name, revision=revision, padding_side="left", trust_remote_code=False
    )
    if tokenizer.eos_token_id is None:
        raise ValueError("it has no end token: tokenizer_config.json is missing, or lacks eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "model", None)).__name__ == "BPE":
        tokenizer.clean_up_tokenization_spaces = False  # ignored, but for a warning amid the answers
    return tokenizer


def _dtype(config: ModelConfig) -> torch.dtype | None:
    """The dtype asked for, None for auto."""
    return None if config.dtype == "auto" else getattr(torch, config.dtype)
