"""A trained checkpoint: loaded with its adapter where it has one, and evaluated alone.

python train_grpo.py --config configs/quickstart.yaml --evaluate runs/quickstart/final
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from recipes.config.load import RunConfig
from recipes.config.schema import ModelConfig
from recipes.models.generation import by_transformers
from recipes.models.load import quantisation, to_gpu
from recipes.problems import printable
from recipes.training.evaluation import evaluator


def load_checkpoint(place: Path, trained: ModelConfig) -> tuple[Any, Any]:
    """Model and tokenizer of a folder with whole weights, or with an adapter and the name of its base.

    trained: the run's model section. An adapter's base is quantised as in training; Unsloth's is by its name.
    Raises FileNotFoundError if the folder is no checkpoint.
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
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    options = quantisation(trained) if adapter and trained.loader == "transformers" else {}
    return to_gpu(kind.from_pretrained(place, dtype="auto", **options)), tokenizer


def require_base(place: Path) -> None:
    """Raises FileNotFoundError if the adapter in `place` does not say what it belongs to."""
    config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
    if not config.get("base_model_name_or_path"):
        raise FileNotFoundError(
            f"{place / 'adapter_config.json'}: base_model_name_or_path is empty, as it is after training an adapter "
            "on a model made from nothing; save that model and write its folder there, or train without lora"
        )


def evaluate_checkpoint(config: RunConfig, place: Path) -> dict[str, Any]:
    """Figures of a checkpoint on the config's held-out problems; see `recipes.training.evaluation.evaluator`."""
    from recipes.tasks import get_task

    model, tokenizer = load_checkpoint(place, config.model)
    measure = evaluator(
        config, get_task(config.task.name), by_transformers(model, tokenizer, config.chat_template_kwargs)
    )
    return {"checkpoint": str(place), **measure()}


def show(config: RunConfig, place: str) -> int:
    """The command line's `--evaluate`: prints the figures as JSON. Returns the exit status."""
    try:
        print(json.dumps(evaluate_checkpoint(config, Path(place)), indent=2))
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0
