"""The `grpo` section: the fields of TRL's GRPOConfig, and the rules that TRL does not declare.

Names, types and defaults are those of the installed TRL. Added here: the ranges, the choices that TRL compares but
does not declare, the fields that are set elsewhere or refused, and that batches are whole groups.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import Enum
from functools import lru_cache, reduce
from operator import or_
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from recipes.config.parse import parse_section
from recipes.config.schema import Section
from recipes.config.unsloth import import_unsloth
from recipes.problems import Problem, one_of, show

_UP, _NOT_NEGATIVE, _COUNT = {"gt": 0}, {"ge": 0}, {"ge": 1}
_SHARE, _OPEN_SHARE, _MEMORY = {"ge": 0, "le": 1}, {"gt": 0, "le": 1}, {"ge": 0, "lt": 1}
RANGES: dict[str, dict[str, Any]] = {
    "learning_rate": _UP,
    "num_generations": {"ge": 2},
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
    "adam_beta1": _MEMORY,
    "adam_beta2": _MEMORY,
    "adam_epsilon": _UP,
    "max_grad_norm": _NOT_NEGATIVE,
    "top_entropy_quantile": _SHARE,
    "vllm_gpu_memory_utilization": _OPEN_SHARE,
    "vllm_server_timeout": _NOT_NEGATIVE,
    "vllm_tensor_parallel_size": _COUNT,
    "vllm_max_model_length": _COUNT,
    "ref_model_mixup_alpha": _SHARE,
    "ref_model_sync_steps": _COUNT,
    "sapo_temperature_neg": _UP,
    "sapo_temperature_pos": _UP,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "save_total_limit": _COUNT,
}
NARROWER: dict[str, Any] = {  # name -> its type, where TRL's annotation allows more than TRL can use
    "num_generations": int,
    "max_completion_length": int,
    "chat_template_kwargs": dict[str, Any] | None,
    "importance_sampling_level": Literal["token", "sequence"],
    "multi_objective_aggregation": Literal["sum_then_normalize", "normalize_then_sum"],
    "scale_rewards": Literal["group", "batch", "none", True, False],
    "remove_unused_columns": Literal[False],  # rewards read them
    "vllm_mode": Literal["colocate", "server"],
    "vllm_model_impl": Literal["vllm", "transformers"],
    "vllm_importance_sampling_mode": Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ],
}

_PROMPTS = "prompts are no longer truncated: filter the data by length; max_completion_length remains"
# Not in the installed TRL and transformers, but in many configurations that people copy.
GONE: dict[str, str] = {
    "max_prompt_length": _PROMPTS,
    "max_length": f"set max_completion_length; {_PROMPTS}",
    "max_new_tokens": "set grpo.max_completion_length",
    "use_liger_loss": "set head.impl: memhead; the loss stays TRL's",
    "vllm_device": "set grpo.vllm_mode: colocate (same GPU) or server (its own)",
    "vllm_dtype": "set model.dtype",
    "vllm_max_model_len": "set grpo.vllm_max_model_length",
    "vllm_guided_decoding_regex": "set grpo.vllm_structured_outputs_regex",
    "warmup_ratio": "set grpo.warmup_steps: a value below 1 is a share of all steps",
    "logging_dir": "the run folder is runs/<run.name>; set run.name and run.output_root",
    "overwrite_output_dir": "remove it: every run makes a folder of its own",
    "evaluation_strategy": "set run.evaluation.every",
    "no_cuda": "set grpo.use_cpu: true, or leave it out: without a GPU the run is on the CPU",
    "save_safetensors": "remove it: weights are always saved as safetensors",
    "push_to_hub_token": "log in with `hf auth login`; keep tokens out of files",
}

OWNED: dict[str, str] = {  # name -> where it is set instead
    "output_dir": "run.output_root and run.name",
    "run_name": "run.name",
    "seed": "run.seed",
    "report_to": "tracking.report_to",
    "logging_steps": "tracking.logging_every",
    "logging_strategy": "tracking.logging_every",
    "logging_first_step": "tracking.logging_every",
    "log_completions": "tracking.print_completions",
    "num_completions_to_print": "tracking.print_completions",
    "disable_tqdm": "nothing: the progress bar is the run's own",
    "save_steps": "run.save_every",
    "save_strategy": "run.save_every",
    "eval_strategy": "run.evaluation.every",
    "eval_steps": "run.evaluation.every",
    "eval_on_start": "nothing: the accuracy is always measured before and after",
    "per_device_eval_batch_size": "run.evaluation.batch_size",
    "do_train": "nothing: the run trains",
    "do_eval": "run.evaluation",
    "do_predict": "run.evaluation",
    "resume_from_checkpoint": "nothing here: give --resume on the command line",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "model_init_kwargs": "the keys of the model section",
    "reward_weights": "task.rewards, by name",
}

REFUSED: dict[str, str] = {  # name -> why, and what to do
    "trust_remote_code": "a model's own code is never run here; use a model that transformers knows",
    "hub_token": "a token does not belong in a file that is kept with the run; log in with `hf auth login`",
    "auto_find_batch_size": "halving the batch would break the groups; lower per_device_train_batch_size",
    "save_only_model": "a checkpoint without its optimizer is never resumed from; remove it, the model is in final/",
    "use_liger_kernel": "it patches the forward that head.impl replaces; set head.impl: memhead",
    "deepspeed": "accelerate's launcher asks for it: accelerate launch --config_file configs/accelerate/zero3.yaml …",
    "parallelism_config": "GRPO does not support context or sequence parallelism; remove it",
    "local_rank": "the launcher sets it; remove it",
    "vllm_importance_sampling_cap": "deprecated in TRL; set grpo.vllm_importance_sampling_clip_max",
    "use_transformers_paged": "deprecated in TRL; set grpo.use_transformers_continuous_batching",
}


def import_grpo_config(loader: str, standby: bool = False) -> type:
    """TRL's GRPOConfig class, or the one that Unsloth derives from it. The only place where a check imports TRL.

    Unsloth rewrites TRL's trainers, but only those imported after it, so where it will load the model it is imported
    first. A missing Unsloth is reported elsewhere: recipes.training.preflight names the remedy.
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
def grpo_section(grpo_config: type) -> type[Section]:
    """The fields that a configuration may set, as a section like the others: strict, with ranges and choices."""
    hints = typing.get_type_hints(grpo_config)
    fields = {
        field.name: _section_field(field, hints[field.name])
        for field in dataclasses.fields(grpo_config)
        if field.init and field.name not in OWNED and field.name not in REFUSED
    }
    return create_model("GrpoSection", __base__=Section, **fields)  # type: ignore[call-overload]


def _section_field(field: dataclasses.Field, hint: Any) -> tuple[Any, Any]:
    """The field's annotation and default as pydantic takes them."""
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        default = None if field.default is dataclasses.MISSING else field.default
    choices = loss_types(str(field.metadata.get("help"))) if field.name == "loss_type" else ()
    kind = Literal[choices] if choices else NARROWER.get(field.name, _declared(hint))
    bounded = Annotated[kind, Field(**RANGES[field.name])] if field.name in RANGES else kind
    return bounded, Field(default, description=f"TRL's default is {show(default)}")


def _declared(hint: Any) -> Any:
    """`SomeEnum | str` allows any text; the enum alone says which values there are."""
    options = typing.get_args(hint)
    if any(isinstance(option, type) and issubclass(option, Enum) for option in options):
        return reduce(or_, (option for option in options if option is not str))
    return hint


def loss_types(help_text: str) -> tuple[str, ...]:
    """The loss types that TRL's help text for the field lists; none if it no longer lists them."""
    listed = re.search(r"Supported values are (.+?)\. ", help_text)
    return tuple(re.findall(r"'(\w+)'", listed.group(1))) if listed else ()


def defaults(grpo_config: type) -> dict[str, Any]:
    """TRL's default of every field that a configuration may set. Unsloth's class has the same as fields."""
    fields = grpo_section(grpo_config).model_fields
    return {name: field.get_default(call_default_factory=True) for name, field in fields.items()}


def check_grpo(
    given: dict[str, Any], grpo_config: type, known: list[str], processes: int = 1
) -> list[Problem]:
    """Every problem of the `grpo` section.

    given: the section as read. known: the dotted keys of all sections, to suggest from. processes: of the run.
    """
    problems: list[Problem] = []
    rest: dict[str, Any] = {}
    for name, value in given.items():
        if (problem := _not_set_here(name, value)) is not None:
            problems.append(problem)
        else:
            rest[name] = value
    problems += parse_section("grpo", grpo_section(grpo_config), rest, known)[0]
    if not problems:  # the checks across fields may now trust every type
        grpo = {**defaults(grpo_config), **given}
        problems = [*_check_batches(grpo, processes), *_check_combinations(grpo)]
    return problems


def _not_set_here(name: str, value: Any) -> Problem | None:
    """The problem of a field that another section sets, that is refused, or that TRL no longer has."""
    key = f"grpo.{name}"
    if name in OWNED:
        return Problem(key, "is not set here", value, f"set {OWNED[name]}")
    if name in REFUSED:
        return Problem(key, "is refused", value, REFUSED[name])
    if name in GONE:
        return Problem(key, "no longer exists in the installed TRL", value, GONE[name])
    return None


def world_size() -> int:
    """The number of processes of this run, as torchrun and accelerate tell each of them."""
    announced = os.environ.get("WORLD_SIZE", "")
    return int(announced) if announced.isdecimal() else 1


def problems_of_batch(grpo: Mapping[str, Any], loader: str = "transformers", processes: int = 1) -> int:
    """Problems of a generation batch, each with its group of completions. Unsloth raises a batch to one group."""
    group, device = grpo["num_generations"], grpo["per_device_train_batch_size"]
    steps = grpo["steps_per_generation"] or grpo["gradient_accumulation_steps"]
    if loader == "unsloth":
        device = max(device, group)
    return (grpo["generation_batch_size"] or device * steps * processes) // group


def _check_batches(grpo: Mapping[str, Any], world: int) -> Iterator[Problem]:
    """TRL samples `generation_batch_size` completions at a time: whole groups of `num_generations`.

    generation_batch_size = per_device_train_batch_size * steps_per_generation * processes, where
    steps_per_generation is gradient_accumulation_steps unless given.
    """
    group, device = grpo["num_generations"], grpo["per_device_train_batch_size"]
    total, steps = grpo["generation_batch_size"], grpo["steps_per_generation"]
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
    steps = steps if steps is not None else grpo["gradient_accumulation_steps"]
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


def divisors_near(number: int, wish: int, reach: int = 10_000) -> list[int]:
    """The divisors of `number`, at least 2, nearest to `wish` below and above, within `reach`: none, one or two."""
    below = range(min(wish - 1, number), max(1, wish - 1 - reach), -1)
    above = range(wish + 1, min(number, wish + reach) + 1)
    nearest = (next((d for d in side if number % d == 0), None) for side in (below, above))
    return [divisor for divisor in nearest if divisor is not None]


def multiples_near(wish: int, unit: int) -> list[int]:
    """The positive multiples of `unit` next to `wish`, below and above: one or two."""
    below = wish // unit * unit
    return [m for m in (below, below + unit) if m > 0]


def _check_combinations(grpo: Mapping[str, Any]) -> Iterator[Problem]:
    """What the trainer refuses only after the model is loaded; GRPOConfig itself refuses the rest."""
    yield from _check_arguments(grpo)
    loss, level = grpo["loss_type"], grpo["importance_sampling_level"]
    if grpo["sync_ref_model"] and grpo["beta"] == 0.0:
        yield Problem(
            "grpo.sync_ref_model", "needs a reference model", True, "set grpo.beta above 0, or remove it"
        )
    if grpo["dataloader_persistent_workers"] and not grpo["dataloader_num_workers"]:
        remedy = "set grpo.dataloader_num_workers above 0, or remove it"
        yield Problem("grpo.dataloader_persistent_workers", "there are no workers to keep", True, remedy)
    if loss == "luspo" and level != "sequence":
        remedy = "set grpo.importance_sampling_level: sequence"
        yield Problem("grpo.loss_type", "luspo works on whole sequences", loss, remedy)
    if loss == "vespo" and level != "token":
        yield Problem(
            "grpo.loss_type", "vespo works on tokens", loss, "set grpo.importance_sampling_level: token"
        )


def _check_arguments(grpo: Mapping[str, Any]) -> Iterator[Problem]:
    """The arguments of a schedule and of an optimizer, which transformers passes on as they are."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType

    kind, given = SchedulerType(grpo["lr_scheduler_type"]), grpo["lr_scheduler_kwargs"] or {}
    signature = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind])
    trainers = {"num_warmup_steps", "num_training_steps"} & signature.parameters.keys()
    if isinstance(given, str):  # transformers takes JSON, too
        with suppress(ValueError):
            given = json.loads(given)
    try:
        if not isinstance(given, dict):
            raise TypeError("it is no mapping")
        signature.bind(None, **dict.fromkeys(trainers, 0), **given)
    except TypeError as error:
        remedy = f"grpo.lr_scheduler_type {kind.value} takes what transformers' schedule of that name does"
        yield Problem("grpo.lr_scheduler_kwargs", f"does not fit: {error}", given, remedy)
    options = grpo["optim_args"]
    if options and not all(part.count("=") == 1 for part in options.split(",")):
        yield Problem("grpo.optim_args", "is no list of name=value", options, "write a=1,b=2")
