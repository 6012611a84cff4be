"""The loader `unsloth`: `FastLanguageModel`. Its trainer takes no `peft_config`, so the adapters are put on here."""

from __future__ import annotations

from typing import Any

from recipes.config.schema import LoraSection, ModelConfig
from recipes.config.unsloth import MAX_SEQ_LENGTH
from recipes.models.generation_config import settle_generation_config


def load(config: ModelConfig, lora: LoraSection | None, seed: int) -> tuple[Any, Any]:
    """Model and tokenizer. With `lora` the model carries its adapters, without it every weight is trained."""
    import torch
    from unsloth import FastLanguageModel

    checkpointing = "unsloth" if config.gradient_checkpointing else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=config.name,
        max_seq_length=config.max_seq_length or MAX_SEQ_LENGTH,
        dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        full_finetuning=lora is None,
        use_gradient_checkpointing=checkpointing,
        random_state=seed,
        revision=config.revision,
        trust_remote_code=False,
        **_vllm(config, lora),
        **({"tokenizer_name": config.tokenizer} if config.tokenizer is not None else {}),
    )
    if mended := settle_generation_config(model, str(config.name), "model.name"):
        print(mended, flush=True)
    if lora is not None:
        model = FastLanguageModel.get_peft_model(
            model,
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            modules_to_save=lora.modules_to_save,
            use_rslora=lora.use_rslora,
            bias="none",
            use_gradient_checkpointing=checkpointing,
            random_state=seed,
        )
    tokenizer.padding_side = "left"
    return model, tokenizer


def _vllm(config: ModelConfig, lora: LoraSection | None) -> dict[str, Any]:
    """`from_pretrained`'s arguments for vLLM, which then holds the weights for both; standby was set at the import."""
    if not config.fast_inference:
        return {"fast_inference": False}
    options: dict[str, Any] = {"fast_inference": True}
    if lora is not None:
        options["max_lora_rank"] = lora.r
    if config.gpu_memory_utilization is not None:
        options["gpu_memory_utilization"] = config.gpu_memory_utilization
    return options
