"""A trained checkpoint, loaded with its adapter where it has one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from recipes.config.schema import ModelConfig
from recipes.models.foreign import require_own_attention
from recipes.models.generation_config import settle_generation_config
from recipes.models.load import pretrained_tokenizer, quantisation, to_gpu
from recipes.models.manifest import MANIFEST, altered, other_base
from recipes.models.published import require_whole
from recipes.models.saved import ADAPTER_CONFIG, readable, unusable, without_weights
from recipes.problems import place_of
from recipes.processes import by_main

WARM_START = "warm_start"  # the folder in the run's that keeps the model after it
REMEDY = "give a whole checkpoint, or a run's final folder"
_AS_WRITTEN = f"put back what was written, or remove {MANIFEST} if the change is meant"


def load_checkpoint(place: Path, trained: ModelConfig) -> tuple[Any, Any]:
    """Model and tokenizer of a folder with whole weights, or with an adapter and the name of its base.

    trained: the run's model section. An adapter's base is quantised as in training; Unsloth's is by its name.
    Raises ConfigError for a folder that is no checkpoint, is not whole, or would take code of the model's own.
    """
    adapter = is_adapter(place)
    with readable("tokenizer", str(place), REMEDY):
        tokenizer = pretrained_tokenizer(str(place))
    if adapter:
        model = with_adapter(place, **(quantisation(trained) if trained.loader == "transformers" else {}))
    else:
        model = _whole(place)
    settle_generation_config(model, str(place))  # it is sampled from as in its training
    return to_gpu(model), tokenizer


def is_adapter(place: Path) -> bool:
    """Whether a folder holds an adapter, rather than whole weights. Whoever loads a model asks this first.

    Raises ConfigError if it holds neither, or files that are not those its manifest has; that reads the whole model.
    """
    if not place_of("", str(place)).is_dir():
        raise unusable(str(place), "there is no such folder", REMEDY)
    file = next((place / name for name in (ADAPTER_CONFIG, "config.json") if (place / name).is_file()), None)
    if file is None:
        raise unusable(str(place), f"holds neither config.json nor {ADAPTER_CONFIG}", REMEDY)
    read_object(file)
    if missing := without_weights(place):
        raise unusable(str(place), f"holds {missing}", REMEDY)
    require_as_written(place, _AS_WRITTEN)
    return file.name == ADAPTER_CONFIG


def require_as_written(place: Path, remedy: str) -> None:
    """Raises ConfigError for a sealed folder whose model was damaged or exchanged.

    Of several processes the main one reads, and the others wait. A hub id is no folder.
    """
    if found := by_main(lambda: altered(place)):
        raise unusable(str(place), found, remedy)


def _whole(place: Path) -> Any:
    """The model of a folder. transformers would draw what is missing in its weights at random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with readable("model", str(place), REMEDY):
        require_own_attention("", str(place), AutoConfig.from_pretrained(place, trust_remote_code=False))
        model, found = AutoModelForCausalLM.from_pretrained(
            place,
            dtype="auto",
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    require_whole(model, found, str(place), REMEDY)
    return model


def with_adapter(place: Path, **options: Any) -> Any:
    """The model of the adapter in `place`, on its base; options are for the base's `from_pretrained`.

    A base that the run's warm start left is looked for in the run folder: the path on record is of where it was then.
    Raises ConfigError for an adapter or a base that cannot be loaded.
    """
    from peft import PeftConfig
    from transformers import AutoConfig

    recorded = require_base(place)
    base = str(_own_warm_start(place, recorded) or recorded)
    if Path(base).is_absolute() and not Path(base).exists():
        sealed = f", and remove {MANIFEST}" if (place / MANIFEST).is_file() else ""
        remedy = f"put it back, or write where it is now into {ADAPTER_CONFIG}{sealed}"
        raise unusable(str(place), f"its base {base} is not there", remedy)
    require_own_base(place, Path(base))
    with readable(f"adapter on {recorded}", str(place), REMEDY):
        options |= {"revision": PeftConfig.from_pretrained(place).revision}
        config = AutoConfig.from_pretrained(base, revision=options["revision"], trust_remote_code=False)
        require_own_attention("", str(place), config)
        model = whole_base(base, "put back the whole of it", **options)
        _make_room(model, place)
        return put_on(model, place)


def whole_base(name: str, remedy: str, **options: Any) -> Any:
    """A model to put an adapter on, by folder or hub id. transformers would draw what is missing in it at random.

    Raises ConfigError.
    """
    from transformers import AutoModelForCausalLM

    options |= {"dtype": "auto", "trust_remote_code": False, "output_loading_info": True}
    model, found = AutoModelForCausalLM.from_pretrained(name, **options)
    require_whole(model, found, name, remedy)
    return model


def put_on(model: Any, place: Path) -> Any:
    """The model with the adapter in `place` on it. PEFT only warns of parts that are not in the file, and draws them.

    Left to itself PEFT reads the file onto the GPU, where a model that is on the CPU has no business: its context alone
    takes memory that another process may be measuring.

    Raises UserWarning where there are such.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        return PeftModel.from_pretrained(model, place, torch_device=str(model.device))


def _make_room(model: Any, place: Path) -> None:
    """For tokens that were added beside an adapter, as PEFT's own loader makes it."""
    if not (place / "tokenizer_config.json").is_file():
        return
    tokens = len(pretrained_tokenizer(str(place)))
    if tokens > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokens)


def _own_warm_start(place: Path, base: str) -> Path | None:
    """The warm start's model in the run folder around final/ or checkpoints/checkpoint-N, if that is the base.

    Around a link to such a folder, which may lie on another disk, or around what it leads to. The one on record where
    a copy of the adapter lies in another run's folder.
    """
    if Path(base).name != WARM_START:
        return None
    around = [
        folder / WARM_START for path in (place.absolute(), place.resolve()) for folder in path.parents[:2]
    ]
    there = [folder for folder in (*around, Path(base)) if (folder / "config.json").is_file()]
    return next((folder for folder in there if not other_base(place, folder)), there[0] if there else None)


def require_own_base(place: Path, base: Path) -> None:
    """Raises ConfigError for a folder that is another base than the adapter's, or is not what was written.

    What has neither a note beside the adapter nor a manifest, such as a hub's model, is taken as it is.
    """
    if found := by_main(lambda: other_base(place, base) or altered(base)):
        raise unusable(str(place), f"of its base {base}, {found}", "put back the folder that its run wrote")


def require_base(place: Path) -> str:
    """What the adapter in `place` belongs to. Raises ConfigError if it does not say."""
    base = read_object(place / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        remedy = "save that model and write its folder there, or train without lora"
        message = "base_model_name_or_path is empty, as it is after training an adapter on a model made from nothing"
        raise unusable(str(place / ADAPTER_CONFIG), message, remedy)
    return base


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError, naming the file, for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise unusable(str(file), "is no JSON object: it was cut off or overwritten", REMEDY)
    return found
