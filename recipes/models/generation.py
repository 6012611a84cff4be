"""Completions for prompts: one interface for an evaluation, whichever engine generates.

generate = by_transformers(model, tokenizer)      model.generate
generate = by_trainer(trainer)                    vLLM where the trainer samples with it, else the same
generate(["357>26="], Sampling(max_new_tokens=6))  -> [["3*7+5"]]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from recipes.models.mode import in_evaluation_mode
from recipes.models.precision import AS_WEIGHTS, Precision
from recipes.models.static_cache import rows_by_graphs
from recipes.processes import spread

Prompt = Any  # text, or a list of chat messages
NO_CHAT: Mapping[str, Any] = MappingProxyType({})
UNCUT = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # the model's own distribution


@dataclass(frozen=True)
class Sampling:
    """How to complete. temperature 0: greedily; else `samples` completions per prompt, from the whole vocabulary."""

    max_new_tokens: int
    samples: int = 1
    temperature: float = 0.0


Generate = Callable[[list[Prompt], Sampling], list[list[str]]]


def by_transformers(
    model: Any,
    tokenizer: Any,
    chat: Mapping[str, Any] = NO_CHAT,
    precision: Precision = AS_WEIGHTS,
    streamer: Any = None,
    kept_rows: int | None = None,
) -> Generate:
    """`model.generate`. The model's mode is left as it was. chat: as `rendered` takes it; precision: the run's.

    streamer: one of transformers', which gets the tokens of a single completion as they come.
    kept_rows: completions of a batch for which the model keeps a static cache and compiled steps. A smaller batch is
        filled up to it, with the same results; a larger one is completed with a growing cache.
    """

    @torch.no_grad()
    def generate(prompts: list[Prompt], sampling: Sampling) -> list[list[str]]:
        encoded = encode(tokenizer, prompts, chat).to(model.device)
        config = _generation_config(model, tokenizer, sampling)
        if kept_rows is not None and len(prompts) <= kept_rows // sampling.samples:
            config.cache_implementation = "static"
            encoded = _filled(encoded, kept_rows // sampling.samples)
        with in_evaluation_mode(model), precision.autocast(model.device):
            tokens = model.generate(**encoded, generation_config=config, streamer=streamer)
        asked = len(prompts) * sampling.samples
        answers = tokens[:asked, encoded["input_ids"].shape[1] :]  # (prompts × samples, completion)
        return _grouped(tokenizer.batch_decode(answers, skip_special_tokens=True), sampling.samples)

    return generate


def by_trainer(trainer: Any) -> Generate:
    """The trainer's own engine, with the weights and adapters as they are now.

    Under Unsloth `trainer.vllm_generation` is TRL's too: it hands the current adapters to the shared engine.
    """
    chat = trainer.chat_template_kwargs
    if not trainer.use_vllm:
        precision, rows = Precision.of(trainer.args), rows_by_graphs(trainer)
        sample = by_transformers(trainer.model, trainer.processing_class, chat, precision, kept_rows=rows)

        def generate_here(prompts: list[Prompt], sampling: Sampling) -> list[list[str]]:
            with _gathered(trainer):
                return sample(prompts, sampling)

        return generate_here
    engine, tokenizer = trainer.vllm_generation, trainer.processing_class

    def generate(prompts: list[Prompt], sampling: Sampling) -> list[list[str]]:
        ids = token_ids(tokenizer, prompts, chat)
        if trainer.state.global_step != trainer._last_loaded_step:  # as the trainer does before it samples
            _send_weights(engine)
            trainer._last_loaded_step = trainer.state.global_step
        repeated = [prompt for prompt in ids for _ in range(sampling.samples)]
        with _sampled_with(engine, sampling):
            _, answers, _, _ = engine.generate(
                prompts=repeated, images=None, num_generations=sampling.samples
            )
        return _grouped(tokenizer.batch_decode(answers, skip_special_tokens=True), sampling.samples)

    return generate


def _send_weights(engine: Any) -> None:
    """To the server or the engine. TRL puts parts together from the start, but FSDP2 makes them when training begins.

    The names are not kept, since those of the parts differ: of tied weights both, and not one alone.
    """
    if spread() != "FSDP" or any(isinstance(module, FSDPModule) for module in engine.model.modules()):
        engine.sync_weights()
        return
    backend = engine._dist
    version, backend.fsdp_version = backend.fsdp_version, None
    try:
        engine.sync_weights()
    finally:
        backend.fsdp_version, engine._weight_metadata = version, None


@contextmanager
def _gathered(trainer: Any) -> Iterator[None]:
    """With the weights put together once, as TRL samples, where deepspeed's engine has taken them apart."""
    if getattr(trainer, "deepspeed", None) is None:
        yield
        return
    from trl.models import unwrap_model_for_generation

    once = trainer.args.ds3_gather_for_generation
    with unwrap_model_for_generation(trainer.deepspeed, trainer.accelerator, gather_deepspeed3_params=once):
        yield


@contextmanager
def _sampled_with(engine: Any, sampling: Sampling) -> Iterator[None]:
    """TRL's VLLMGeneration reads these attributes at each call; the trainer's own values are put back."""
    wanted = {
        **UNCUT,
        "temperature": sampling.temperature,
        "max_completion_length": sampling.max_new_tokens,
    }
    before = {name: getattr(engine, name) for name in wanted}
    vars(engine).update(wanted)
    try:
        yield
    finally:
        vars(engine).update(before)


def encode(tokenizer: Any, prompts: list[Prompt], chat: Mapping[str, Any] = NO_CHAT) -> Any:
    """Prompts as one batch padded on the left: `input_ids` and `attention_mask`, both (B, longest)."""
    texts, special = rendered(tokenizer, prompts, chat)
    return tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=special
    )


def _filled(encoded: Any, rows: int) -> dict[str, Any]:
    """The batch with its own rows again and again, up to that many."""
    index = torch.arange(rows, device=encoded["input_ids"].device) % len(encoded["input_ids"])
    return {name: tensor[index] for name, tensor in encoded.items()}


def token_ids(tokenizer: Any, prompts: list[Prompt], chat: Mapping[str, Any] = NO_CHAT) -> list[list[int]]:
    """The same tokens, one list per prompt, without padding."""
    texts, special = rendered(tokenizer, prompts, chat)
    return tokenizer(texts, add_special_tokens=special)["input_ids"]


def rendered(
    tokenizer: Any, prompts: list[Prompt], chat: Mapping[str, Any] = NO_CHAT
) -> tuple[list[str], bool]:
    """Prompts as text, and whether the tokenizer must add its special tokens: a chat template writes its own.

    chat: the template's arguments beside the messages, the run's `chat_template_kwargs` (Qwen3: enable_thinking).
    """
    if isinstance(prompts[0], str):
        return prompts, True
    render = tokenizer.apply_chat_template
    options = {**chat, "tokenize": False, "add_generation_prompt": True}
    return [str(render(messages, **options)) for messages in prompts], False


def _generation_config(model: Any, tokenizer: Any, sampling: Sampling) -> Any:
    """Every setting spelled out: a checkpoint's generation_config.json (Qwen2.5: a repetition penalty) fills gaps."""
    from transformers import GenerationConfig

    options: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "repetition_penalty": UNCUT["repetition_penalty"],
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": end_tokens(model, tokenizer),
        "do_sample": sampling.temperature > 0.0,
    }
    if options["do_sample"]:
        options |= UNCUT | {
            "temperature": sampling.temperature,
            "num_return_sequences": sampling.samples,
        }
    return GenerationConfig(**options)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion, the model's and the tokenizer's, as in TRL's trainer."""
    declared = model.generation_config.eos_token_id
    ends = [] if declared is None else declared if isinstance(declared, list) else [declared]
    return list(dict.fromkeys([tokenizer.eos_token_id, *ends]))


def _grouped(texts: list[str], size: int) -> list[list[str]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]
