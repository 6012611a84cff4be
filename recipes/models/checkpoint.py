"""A trained checkpoint, loaded with its adapter where it has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.config.schema import ModelConfig
from recipes.models.foreign import no_foreign_code
from recipes.models.load import quantisation, to_gpu

WARM_START = "warm_start"  # the folder in the run's that keeps the model after it


def load_checkpoint(place: Path, trained: ModelConfig) -> tuple[Any, Any]:
    """Model and tokenizer of a folder with whole weights, or with an adapter and the name of its base.

    trained: the run's model section. An adapter's base is quantised as in training; Unsloth's is by its name.
    Raises OSError if the folder is no checkpoint, ConfigError if it would take code of the model's own.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = (place / "adapter_config.json").is_file()
    if not adapter and not (place / "config.json").is_file():
        raise FileNotFoundError(
            f"{place} holds neither config.json nor adapter_config.json; give a checkpoint or a run's final folder"
        )
    read_object(place / ("adapter_config.json" if adapter else "config.json"))
    options = quantisation(trained) if trained.loader == "transformers" else {}
    with no_foreign_code("", str(place)):
        tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left", trust_remote_code=False)
        if adapter:
            require_base(place)
            model = with_adapter(place, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(place, dtype="auto", trust_remote_code=False)
    return to_gpu(model), tokenizer


def with_adapter(place: Path, **options: Any) -> Any:
    """The model of the adapter in `place`, on its base; options are for the base's `from_pretrained`.

    A base that the run's warm start left is looked for in the run folder: the path on record is of where it was then.
    """
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    options |= {"dtype": "auto", "trust_remote_code": False}
    started = _own_warm_start(place)
    if started is None:
        return AutoPeftModelForCausalLM.from_pretrained(place, **options)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(started, **options), place)


def _own_warm_start(place: Path) -> Path | None:
    """The warm start's model in the run folder around final/ or checkpoints/checkpoint-N, if that is the base."""
    config = read_object(place / "adapter_config.json")
    if Path(config["base_model_name_or_path"]).name != WARM_START:
        return None
    around = [folder / WARM_START for folder in place.resolve().parents[:2]]
    return next((folder for folder in around if (folder / "config.json").is_file()), None)


def require_base(place: Path) -> None:
    """Raises FileNotFoundError if the adapter in `place` does not say what it belongs to."""
    config = read_object(place / "adapter_config.json")
    if not config.get("base_model_name_or_path"):
        raise FileNotFoundError(
            f"{place / 'adapter_config.json'}: base_model_name_or_path is empty, as it is after training an adapter "
            "on a model made from nothing; save that model and write its folder there, or train without lora"
        )


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object. Raises OSError, naming the file, for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise OSError(f"{file} is no JSON object: it was cut off or overwritten; give another checkpoint")
    return found
