"""What is wrong with a saved model, in one line: transformers' own words for a missing file fill half a page.

with readable("tokenizer", "runs/x/final", "give a whole checkpoint"):
    tokenizer = AutoTokenizer.from_pretrained(…)
without_weights(Path("runs/x/final"))     "no weights (model.safetensors)", or None
require_savable(model, tokenizer, name)   before anything is trained
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from memhead.shortage import is_out_of_memory
from recipes.models.foreign import no_foreign_code
from recipes.problems import ConfigError, Problem

ADAPTER_CONFIG = "adapter_config.json"
WHOLE, ADAPTER = "model.safetensors", "adapter_model.safetensors"
TOKENIZER = "tokenizer.json"
_OTHER_FORM = {WHOLE: "pytorch_model.bin", ADAPTER: "adapter_model.bin"}
INDEX = ".index.json"  # of weights in several files


def without_weights(place: Path) -> str | None:
    """What a folder holds no weights of, by the name of the file; None where every file is there.

    Of a folder with an adapter the adapter's.
    """
    wanted = ADAPTER if (place / ADAPTER_CONFIG).is_file() else WHOLE
    forms = (wanted, _OTHER_FORM[wanted])
    if any((place / name).is_file() for name in forms):
        return None
    index = next((file for name in forms if (file := place / f"{name}{INDEX}").is_file()), None)
    if index is None:
        return f"no weights ({wanted})"
    try:
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"no readable {index.name}"
    return next(
        (f"no {name}, a part of its weights" for name in sorted(parts) if not (place / name).is_file()), None
    )


@contextmanager
def readable(part: str, name: str, remedy: str, key: str = "", *, quiet: bool = True) -> Iterator[None]:
    """Around what loads a part of a checkpoint: a failure becomes a ConfigError in one line. No code of its own runs.

    part: "tokenizer" or "model". name: the folder or hub id. key: of the configuration; "": the command line named it.
    quiet: without transformers' warnings.
    """
    try:
        with no_foreign_code(key, name), _quiet() if quiet else nullcontext():
            yield
    except ConfigError:
        raise
    except Exception as error:  # of files that say nonsense, transformers raises whatever comes of it
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(" .:")
        if part == "tokenizer" and Path(name).is_dir() and not (Path(name) / TOKENIZER).is_file():
            reason = f"there is no {TOKENIZER}"
        raise unusable(name, f"its {part} cannot be loaded ({reason})", remedy, key) from error


def require_savable(model: Any, tokenizer: Any, name: str, key: str = "") -> None:
    """Saves all but the weights, and removes it: what fails at that would fail when everything is trained.

    Raises ConfigError.
    """
    try:
        with TemporaryDirectory() as place:
            model.config.save_pretrained(place)
            if model.can_generate():
                model.generation_config.save_pretrained(place)
            tokenizer.save_pretrained(place)
    except OSError:  # of this machine's temporary folder, not the model's
        return
    except Exception as error:  # of files that say nonsense, transformers raises whatever comes of it
        reason = str(error).strip().partition("\n")[0].rstrip(" .:")
        raise unusable(name, f"could not be saved again ({reason})", "name a whole model", key) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of what was not loaded: what is missing is said in the error."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def unusable(name: str, message: str, remedy: str, key: str = "") -> ConfigError:
    """The error for a folder or hub id that a key or the command line named."""
    if key:
        return ConfigError([Problem(key, message, name, remedy)])
    return ConfigError([Problem("", f"{name}: {message}", remedy=remedy)])
