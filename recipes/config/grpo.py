"""The `grpo` section against the installed TRL: its GRPOConfig's fields, their types, ranges and batches.

The table is read from the installed TRL: a key that TRL lacks is an error, not dropped without a word.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import lru_cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from recipes.config.grpo_fields import GONE, OWNED, REFUSED
from recipes.models.unsloth import import_unsloth
from recipes.problems import Problem, describe_type, one_of, show, unknown_key

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_UP, _NOT_NEGATIVE, _COUNT = ((">", 0),), ((">=", 0),), ((">=", 1),)
_SHARE, _OPEN_SHARE = ((">=", 0), ("<=", 1)), ((">", 0), ("<=", 1))
RANGES: dict[str, tuple[tuple[str, float], ...]] = {
    "learning_rate": _UP,
    "num_generations": ((">=", 2),),
    "num_generations_eval": _COUNT,
    "temperature": _UP,
    "top_p": _OPEN_SHARE,
    "top_k": _NOT_NEGATIVE,
    "min_p": _SHARE,
    "repetition_penalty": _UP,
    "epsilon": _NOT_NEGATIVE,
    "epsilon_high": _NOT_NEGATIVE,
    "delta": _UP,
    "beta": _NOT_NEGATIVE,
    "num_iterations": _COUNT,
    "steps_per_generation": _COUNT,
    "generation_batch_size": _COUNT,
    "max_completion_length": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "num_train_epochs": _UP,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": ((">=", 0), ("<", 1)),
    "adam_beta2": ((">=", 0), ("<", 1)),
    "adam_epsilon": _UP,
    "max_grad_norm": _NOT_NEGATIVE,
    "top_entropy_quantile": _SHARE,
    "vllm_gpu_memory_utilization": _OPEN_SHARE,
    "vllm_tensor_parallel_size": _COUNT,
    "vllm_max_model_length": _COUNT,
    "ref_model_mixup_alpha": _SHARE,
    "ref_model_sync_steps": _COUNT,
    "sapo_temperature_neg": _UP,
    "sapo_temperature_pos": _UP,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "save_total_limit": _COUNT,
}
CHOICES: dict[str, tuple[Any, ...]] = {  # texts that TRL compares but does not declare as choices
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("vllm", "transformers"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}


def import_grpo_config(loader: str, standby: bool = False) -> type:
    """TRL's GRPOConfig class, or the one that Unsloth derives from it. Checking a configuration imports TRL here only.

    Unsloth rewrites TRL's trainers, and only those imported after it, so where it will load the model
    it comes first. A missing Unsloth is not this function's to report: recipes.training.preflight names the remedy.
    standby: `model.vllm_standby`.
    """
    if loader == "unsloth":
        try:
            import_unsloth(standby)
        except (ImportError, NotImplementedError, RuntimeError, ValueError):
            pass
    from trl.trainer.grpo_config import GRPOConfig

    return GRPOConfig


@lru_cache(maxsize=2)
def field_table(grpo_config: type) -> dict[str, tuple[Any, Any, str]]:
    """name -> (type, default, help text) of every field of the class."""
    hints = typing.get_type_hints(grpo_config)
    return {
        field.name: (hints[field.name], _default(field), str(field.metadata.get("help") or ""))
        for field in dataclasses.fields(grpo_config)
        if field.init
    }


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def settable(grpo_config: type) -> list[str]:
    """The field names a configuration may set: all but those that another section sets."""
    return [name for name in field_table(grpo_config) if name not in OWNED and name not in REFUSED]


def check_grpo(values: Mapping[str, Any], grpo_config: type, known: list[str]) -> list[Problem]:
    """Every problem of the `grpo` section.

    values: the section as read. known: the dotted keys of all sections, to suggest from.
    """
    table = field_table(grpo_config)
    problems = [
        problem for name, value in values.items() for problem in _check_field(name, value, table, known)
    ]
    if not problems:  # the checks across fields may then trust every type
        problems = [*_check_batches(values, table), *_check_combinations(values)]
    return problems


def _check_field(name: str, value: Any, table: Mapping[str, Any], known: list[str]) -> Iterator[Problem]:
    key = f"grpo.{name}"
    if name in OWNED:
        yield Problem(key, "is not set here", value, f"set {OWNED[name]}")
    elif name in REFUSED:
        yield Problem(key, "is refused", value, REFUSED[name])
    elif name in GONE:
        yield Problem(key, "no longer exists in the installed TRL", value, GONE[name])
    elif name not in table:
        yield unknown_key("grpo", name, value, known)
    elif name in CHOICES or name == "loss_type":
        choices = CHOICES.get(name) or loss_types(table)
        if not any(value is choice or (type(value) is str and value == choice) for choice in choices):
            yield Problem(key, "unknown choice", value, f"use {one_of(show_choice(c) for c in choices)}")
    elif not fits(value, table[name][0]):
        yield Problem(
            key,
            f"must be {describe_type(table[name][0])}",
            value,
            f"TRL's default is {show(table[name][1])}",
        )
    elif name == "num_generations" and value is None:
        yield Problem(key, "must be an integer", value, "set it to 2 or more")
    else:
        yield from _check_enum(key, value, table[name][0])
        yield from _check_range(key, value, RANGES.get(name, ()))


def show_choice(choice: Any) -> str:
    """A choice as one writes it in YAML: no quotes, lower-case booleans."""
    return choice if isinstance(choice, str) else show(choice)


def loss_types(table: Mapping[str, Any]) -> tuple[str, ...]:
    """The loss types of the installed TRL, as its own help text for the field lists them."""
    listed = re.search(r"Supported values are (.+?)\. ", table["loss_type"][2])
    return tuple(re.findall(r"'(\w+)'", listed.group(1))) if listed else (table["loss_type"][1],)


def fits(value: Any, annotation: Any) -> bool:
    """Whether the value has the annotated type. An integer is a number; a boolean is neither, nor is text."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    try:
        TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(
            value
        )
    except ValidationError:
        return False
    return True


def _check_enum(key: str, value: Any, annotation: Any) -> Iterator[Problem]:
    """A field of `SomeEnum | str` takes any text as far as its type goes; the enum says which it knows."""
    for option in typing.get_args(annotation) or (annotation,):
        if isinstance(option, type) and issubclass(option, Enum) and isinstance(value, str):
            names = [member.value for member in option]
            if value not in names:
                yield Problem(key, "unknown choice", value, f"use {one_of(names)}")


def _check_range(key: str, value: Any, bounds: tuple[tuple[str, float], ...]) -> Iterator[Problem]:
    if isinstance(value, (int, float)) and not all(_OPERATORS[sign](value, bound) for sign, bound in bounds):
        text = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds)
        yield Problem(key, "out of range", value, f"must be {text}")


def world_size() -> int:
    """Processes of this run, as torchrun and accelerate announce them to each one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_batches(values: Mapping[str, Any], table: Mapping[str, Any]) -> Iterator[Problem]:
    """TRL samples `generation_batch_size` completions at a time: whole groups of `num_generations`.

    generation_batch_size = per_device_train_batch_size * steps_per_generation * processes, where
    steps_per_generation is gradient_accumulation_steps unless given.
    """

    def value(name: str) -> Any:
        return values[name] if name in values else table[name][1]

    group, device, world = value("num_generations"), value("per_device_train_batch_size"), world_size()
    total, steps = value("generation_batch_size"), value("steps_per_generation")
    if total is not None and steps is not None:
        remedy = "remove one: generation_batch_size is batch size × steps_per_generation × processes"
        yield Problem("grpo.generation_batch_size", "given together with steps_per_generation", total, remedy)
        return
    if total is not None and total % (device * world):
        near = one_of(multiples_near(total, device * world))
        remedy = f"set generation_batch_size to {near}"
        message = f"not a multiple of per_device_train_batch_size {device} × {world} process(es)"
        yield Problem("grpo.generation_batch_size", message, total, remedy)
        return
    source = "steps_per_generation" if steps is not None else "gradient_accumulation_steps"
    steps = steps if steps is not None else value("gradient_accumulation_steps")
    made_of = f"per_device_train_batch_size {device} × {source} {steps} × {world} process(es)"
    batch = device * steps * world if total is None else total
    if batch % group == 0:
        return
    message = f"a generation batch of {batch} cannot be cut into groups of {group}"
    message += f" ({made_of})" if total is None else f" (generation_batch_size {total})"
    groups = divisors_near(batch, group)
    remedy = f"set num_generations to {one_of(groups)}" if groups else ""
    if total is None:
        sizes = one_of(multiples_near(device, group // math.gcd(group, steps * world)))
        remedy += f"{', or ' if remedy else 'set '}per_device_train_batch_size to {sizes}"
    else:
        sizes = one_of(multiples_near(total, group))
        remedy += f"{', or ' if remedy else 'set '}generation_batch_size to {sizes}"
    yield Problem("grpo.num_generations", message, group, remedy)


def divisors_near(number: int, wish: int) -> list[int]:
    """The divisors of `number` from 2 up that are next to `wish`, below and above: none, one or two."""
    divisors = [d for d in range(2, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < wish], [d for d in divisors if d > wish]
    return below[-1:] + above[:1]


def multiples_near(wish: int, unit: int) -> list[int]:
    """The positive multiples of `unit` next to `wish`, below and above: one or two."""
    below = wish // unit * unit
    return [m for m in (below, below + unit) if m > 0]


def _check_combinations(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Pairs of fields that TRL refuses, after the model is loaded; here before."""
    loss, level = values.get("loss_type", "dapo"), values.get("importance_sampling_level", "token")
    if values.get("sync_ref_model") and values.get("beta", 0.0) == 0.0:
        yield Problem(
            "grpo.sync_ref_model", "needs a reference model", True, "set grpo.beta above 0, or remove it"
        )
    if loss == "luspo" and level != "sequence":
        remedy = "set grpo.importance_sampling_level: sequence"
        yield Problem("grpo.loss_type", "luspo works on whole sequences", loss, remedy)
    if loss == "vespo" and level != "token":
        yield Problem(
            "grpo.loss_type", "vespo works on tokens", loss, "set grpo.importance_sampling_level: token"
        )
    low, high = (
        values.get("vllm_importance_sampling_clip_min"),
        values.get("vllm_importance_sampling_clip_max", 3.0),
    )
    if low is not None and high is not None and low >= high:
        key = "grpo.vllm_importance_sampling_clip_min"
        yield Problem(
            key, f"not below vllm_importance_sampling_clip_max {high:g}", low, f"set it below {high:g}"
        )
    if values.get("bf16") and values.get("fp16"):
        yield Problem("grpo.fp16", "set together with bf16", True, "keep one of the two")
