"""The models that benchmarks of the packed step train: architectures with random weights, and adapters.

Random weights of the real architectures, so that nothing has to be downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARED = {
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
MODELS = {
    "llama-1b": SHARED | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "llama-8b": SHARED | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "smollm2-135m": SHARED | {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "toy": SHARED | {
        "vocab_size": 503, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
# To plan with.
HUB = {
    "llama-1b": "meta-llama/Llama-3.2-1B-Instruct", "llama-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}  # fmt: skip
CHECKPOINTING = {"llama-1b": False, "llama-8b": True, "smollm2-135m": False, "toy": False}
IN_FULL = {"smollm2-135m"}  # every weight trained, in float32


def new_model(name: str, toy: bool) -> Any:
    """Random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("cpu" if toy else "cuda"):
        return LlamaForCausalLM._from_config(
            LlamaConfig(**MODELS[name]),
            dtype=torch.float32 if toy or name in IN_FULL else torch.bfloat16,
            attn_implementation="sdpa",
        )


def in_4_bits(checkpoint: Path) -> Any:
    """A checkpoint as a run with `model.load_in_4bit` reads it."""
    from transformers import AutoModelForCausalLM

    from recipes.config.schema import ModelConfig
    from recipes.models.load import quantisation

    settings = ModelConfig(loader="transformers", dtype="bfloat16", load_in_4bit=True)
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa", **quantisation(settings)
    )


def make_model(name: str, toy: bool, checkpoint: Path | None = None) -> Any:
    """The model with adapters that are not zero, so that every layer has a gradient."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(0)
    model = in_4_bits(checkpoint) if checkpoint else new_model(name, toy)
    if name in IN_FULL:
        return model
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=16, target_modules=LAYERS, task_type="CAUSAL_LM")
    )
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model
