"""A model's own generation_config.json, settled at loading: it can be saved, and changes nothing of a run's sampling.

Transformers loads files that it refuses to save, Llama 2's among them: a temperature, and no `do_sample` beside it. The
refusal came with the first checkpoint, or when everything was trained.

A run's own sampling never follows the file. Whatever TRL and an evaluation do not set themselves transformers takes
from it, though: beams, n-grams that may not come again, tokens that may not come at all. With those the completions
are not drawn from the distribution that the loss is computed from. So they are taken out, and that is said.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from recipes.models.saved import unusable
from recipes.problems import visible

FILE = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What a run sets itself whenever it samples, and what changes no token.
_KEPT = {
    *_IDS, "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_length", "max_new_tokens",
    "cache_implementation", "transformers_version",
}  # fmt: skip


def settle_generation_config(model: Any, name: str, key: str = "") -> str | None:
    """Mends `model.generation_config` where it could not be saved, or would change what a run samples.

    Returns a line, or two, that say what was changed.

    name: the model's folder or hub id; key: of the configuration, as `recipes.models.saved.unusable` takes it.
    Raises ConfigError for end tokens that are no token ids, which no one can guess.
    """
    given = getattr(model, "generation_config", None)
    if given is None:
        return None
    ends = given.eos_token_id
    if not all(_is_id(end) for end in (ends if isinstance(ends, list) else [ends])):
        message = f"its {FILE} has an eos_token_id that is no token id ({visible(repr(ends))})"
        raise unusable(name, message, "write the number of the end token there, or null", key)
    left_out = _leave_out(given)
    said = []
    if left_out:
        said.append(
            f"{FILE} of {visible(name)}: {visible(', '.join(left_out))} left out, as a run samples without"
        )
    if (mended := _mend(model, name)) is not None:
        said.append(mended)
    return "\n".join(said) or None


def _leave_out(config: GenerationConfig) -> list[str]:
    """Takes out what would change the sampling behind a run's back. Returns the names."""
    defaults = config._get_default_generation_params()
    names = [
        name
        for name, value in vars(config).items()
        if not (name.startswith("_") or name in _KEPT or value is None or value is False)
        and not (name in defaults and value == defaults[name])
    ]
    if config.use_cache is False:
        names.append("use_cache")  # each token would take a pass over all before it
    for name in names:
        setattr(config, name, None)
    return sorted(names)


def _mend(model: Any, name: str) -> str | None:
    """Makes it one that can be saved. Returns a line that says how, None where it was one."""
    given = model.generation_config
    reason = refusal(given)
    if reason is None:
        return None
    given.do_sample = True
    if refusal(given) is None:
        change = "do_sample is true from here on"
    else:
        kept = {id: number for id in _IDS if _is_id(number := getattr(given, id)) and number is not None}
        model.generation_config = GenerationConfig(**kept)
        change = "of it the token ids alone are kept"
    return (
        f"{FILE} of {visible(name)} could not be saved with the trained model ({visible(reason)}): {change}"
    )


def refusal(config: GenerationConfig) -> str | None:
    """Why it cannot be saved, in a line; None where it can."""
    try:
        config.validate(strict=True)
    except Exception as error:  # of nonsensical values whatever comes of comparing them
        lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
        first, *_ = (
            lines[1:] or lines or [type(error).__name__]
        )  # transformers puts a heading over its findings
        return first.partition(". ")[0][:200]
    return None


def _is_id(number: Any) -> bool:
    return number is None or (type(number) is int and number >= 0)
