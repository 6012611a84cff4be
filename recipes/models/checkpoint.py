"""A trained checkpoint, loaded with its adapter where it has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.config.schema import ModelConfig
from recipes.models.foreign import no_foreign_code
from recipes.models.load import quantisation, to_gpu


def load_checkpoint(place: Path, trained: ModelConfig) -> tuple[Any, Any]:
    """Model and tokenizer of a folder with whole weights, or with an adapter and the name of its base.

    trained: the run's model section. An adapter's base is quantised as in training; Unsloth's is by its name.
    Raises FileNotFoundError if the folder is no checkpoint, ConfigError if it would take code of the model's own.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = (place / "adapter_config.json").is_file()
    if not adapter and not (place / "config.json").is_file():
        raise FileNotFoundError(
            f"{place} holds neither config.json nor adapter_config.json; give a checkpoint or a run's final folder"
        )
    if adapter:
        require_base(place)
    kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    options = quantisation(trained) if adapter and trained.loader == "transformers" else {}
    with no_foreign_code("", str(place)):
        tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left", trust_remote_code=False)
        model = kind.from_pretrained(place, dtype="auto", trust_remote_code=False, **options)
    return to_gpu(model), tokenizer


def require_base(place: Path) -> None:
    """Raises FileNotFoundError if the adapter in `place` does not say what it belongs to."""
    config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
    if not config.get("base_model_name_or_path"):
        raise FileNotFoundError(
            f"{place / 'adapter_config.json'}: base_model_name_or_path is empty, as it is after training an adapter "
            "on a model made from nothing; save that model and write its folder there, or train without lora"
        )
