"""The configuration of a run: one YAML file, checked to the last key before anything is loaded.

    load_config("configs/quickstart.yaml", ["grpo.learning_rate=2e-5"]) -> RunConfig

Every mistake is a ConfigError with one line each: file and line, key, what is wrong, value, remedy.
`python -m recipes.config FILE [key=value …]` prints the resolved configuration, and
`python -m recipes.config --markdown` the reference that is kept as docs/configuration.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from recipes.config.grpo import check_grpo, field_table, import_grpo_config, settable
from recipes.config.schema import (
    ORDER,
    SECTIONS,
    HeadConfig,
    LoraSection,
    ModelConfig,
    RunSection,
    ScratchConfig,
    Section,
    StepConfig,
    TaskConfig,
    TrackingConfig,
    nested_section,
    schema_keys,
)
from recipes.config.source import dump, merge, read_file, read_overrides
from recipes.config.unsloth import is_unsloths, trl_meaning
from recipes.models.unsloth import MAX_SEQ_LENGTH
from recipes.problems import (
    EXIT_STATUS,
    ConfigError,
    Problem,
    describe_type,
    join,
    one_of,
    unknown_key,
)

if TYPE_CHECKING:
    from trl import GRPOConfig

__all__ = ["EXIT_STATUS", "ConfigError", "RunConfig", "load_config"]

_BOUNDS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
_LIMITS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}


class RunConfig(Section):
    """A whole, checked configuration. `grpo` holds the fields that were given, by TRL's names."""

    model: ModelConfig
    head: HeadConfig
    step: StepConfig
    task: TaskConfig
    grpo: dict[str, Any]
    lora: LoraSection | None
    tracking: TrackingConfig
    run: RunSection

    @property
    def completion_length(self) -> int:
        """Tokens of a completion at most."""
        return completion_length(self.model, self.grpo)

    def grpo_config(self, output_dir: str | Path) -> GRPOConfig:
        """TRL's GRPOConfig of this run: the `grpo` section and what the other sections say of TRL's fields.

        Raises ConfigError if TRL still refuses a combination of fields.
        """
        import_grpo_config(self.model.loader, self.model.vllm_standby)
        import trl  # GRPOConfig as the package names it now: Unsloth puts its own class there

        given = trl_meaning(self.grpo) if is_unsloths(trl.GRPOConfig) else self.grpo
        try:
            return trl.GRPOConfig(**{**self._derived_fields(), **given}, output_dir=str(output_dir))
        except ValueError as error:
            raise ConfigError(
                [Problem("grpo", str(error), remedy="change the fields that it names")]
            ) from error

    def _derived_fields(self) -> dict[str, Any]:
        """Fields of GRPOConfig that follow from other sections and from the device."""
        import torch

        fields: dict[str, Any] = {
            "run_name": self.run.name,
            "seed": self.run.seed,
            "project": "memhead",
            "report_to": [] if self.tracking.report_to == "none" else [self.tracking.report_to],
            "logging_steps": self.tracking.logging_every,
            "logging_first_step": True,
            "log_completions": self.tracking.print_completions > 0,
            "num_completions_to_print": self.tracking.print_completions or None,
            "disable_tqdm": True,
            "save_strategy": "no" if self.run.save_every is None else "steps",
            "gradient_checkpointing": self.model.gradient_checkpointing,
        }
        if self.run.save_every is not None:
            fields["save_steps"] = self.run.save_every
        return fields | _precision(self.model.dtype, self.grpo, torch.cuda.is_available())

    def to_dict(self) -> dict[str, Any]:
        """Plain data in the shape of the YAML: every key, the task's options beside its name."""
        data = self.model_dump(mode="json")
        data["task"] = {"name": self.task.name, **data["task"]["options"]}
        return {section: data[section] for section in ORDER}

    def to_yaml(self) -> str:
        """The resolved configuration; `load_config` of it gives an equal RunConfig."""
        return dump(self.to_dict())


def completion_length(model: ModelConfig, grpo: Mapping[str, Any]) -> int:
    """`grpo.max_completion_length`, or the default of the installed GRPOConfig."""
    default = field_table(import_grpo_config(model.loader, model.vllm_standby))["max_completion_length"][1]
    return grpo.get("max_completion_length") or default


def _precision(dtype: str, grpo: Mapping[str, Any], cuda: bool) -> dict[str, Any]:
    """TRL's precision and device fields for this machine.

    TRL turns bfloat16 autocast on unless told otherwise, also on a CPU and on GPUs that have no bfloat16.
    """
    import torch

    if not cuda or grpo.get("use_cpu"):
        return {"use_cpu": not cuda, "bf16": False, "dataloader_pin_memory": False}
    if "bf16" in grpo or "fp16" in grpo:
        return {"bf16": False} if grpo.get("fp16") else {}
    half = dtype == "float16" or not torch.cuda.is_bf16_supported(including_emulation=False)
    return {"fp16": half, "bf16": not half}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of a YAML file with command-line overrides applied.

    overrides: `section.key=value` each, the value read as YAML. Raises ConfigError with every problem found.
    """
    path = Path(path)
    document = merge(read_file(path), read_overrides(list(overrides)))
    problems, sections = _check(document.data)
    if problems:
        raise ConfigError(problems, document.where, str(path))
    if not sections["run"].name:
        sections["run"] = sections["run"].model_copy(update={"name": path.stem})
    if sections["model"].loader == "scratch" and sections["model"].scratch is None:
        sections["model"] = sections["model"].model_copy(update={"scratch": ScratchConfig()})
    return RunConfig.model_construct(**sections)


def _check(data: dict[str, Any]) -> tuple[list[Problem], dict[str, Any]]:
    """All problems of the data, and the parsed sections (complete only if there are no problems)."""
    model = data["model"] if isinstance(data.get("model"), dict) else {}
    grpo_config = import_grpo_config(model.get("loader", ""), model.get("vllm_standby") is True)
    known = [*schema_keys(), *(f"grpo.{name}" for name in settable(grpo_config))]
    problems = [unknown_key("", key, value, known) for key, value in data.items() if key not in ORDER]
    sections: dict[str, Any] = {}
    for name in ORDER:
        value = data.get(name)
        if name == "lora" and value is None:
            sections[name] = None
        elif value is not None and not isinstance(value, dict):
            problems.append(
                Problem(name, "must be a section of keys", value, f"write `{name}:` and its keys below it")
            )
        elif name == "grpo":
            sections[name] = dict(value or {})
            problems += check_grpo(sections[name], grpo_config, known)
        elif name == "task":
            found, sections[name] = _check_task(value or {}, known)
            problems += found
        else:
            found, sections[name] = parse_section(name, SECTIONS[name], value or {}, known)
            problems += found
    return problems + ([] if problems else [*_check_across(sections), *_check_task_fits(sections)]), sections


def _check_task(data: dict[str, Any], known: list[str]) -> tuple[list[Problem], TaskConfig | None]:
    """The task's name against the registry, its options against the task's own Options class."""
    from recipes.tasks import get_task, task_names

    name = data.get("name")
    if not isinstance(name, str) or name not in task_names():
        message = "is missing" if name is None else "unknown task"
        value = {} if name is None else {"value": name}
        return [Problem("task.name", message, remedy=f"use {one_of(sorted(task_names()))}", **value)], None
    options_class = get_task(name).Options
    known = [*known, *(f"task.{option}" for option in options_class.model_fields)]
    options = {key: value for key, value in data.items() if key != "name"}
    problems, parsed = parse_section("task", options_class, options, known)
    return problems, TaskConfig.model_construct(name=name, options=parsed) if parsed is not None else None


def parse_section(
    name: str, section: type[BaseModel], data: dict[str, Any], known: list[str]
) -> tuple[list[Problem], Any]:
    """`data` as a `section`, strictly; or the problems, one for each key that has one."""
    try:  # through JSON, in whose strict mode a list may become a tuple, but no text a number
        return [], section.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        found: dict[str, Problem] = {}
        for detail in error.errors():
            problem = _problem(name, section, data, dict(detail), known)
            found.setdefault(problem.key, problem)
        return list(found.values()), None


def _problem(
    name: str, section: type[BaseModel], data: dict[str, Any], detail: dict[str, Any], known: list[str]
) -> Problem:
    """One of pydantic's error details in our words."""
    words = _real_path(data, detail["loc"])
    key, kind, value = join(name, *words), detail["type"], detail["input"]
    annotation, description = _field_at(section, words)
    if kind == "extra_forbidden":
        return unknown_key(join(name, *words[:-1]), str(words[-1]), value, known)
    if kind == "missing":
        return Problem(key, "is missing", remedy=f"set it: {description}")
    if kind in _BOUNDS:
        bound = detail["ctx"][_LIMITS[kind]]
        return Problem(key, "out of range", value, f"must be {_BOUNDS[kind]} {bound:g}")
    if kind == "literal_error" and annotation is not None:
        return Problem(key, "unknown choice", value, f"use {describe_type(annotation)}")
    if kind == "value_error":  # a task's own validator: its words are the message
        return Problem(key, detail["msg"].removeprefix("Value error, "), value)
    if kind.endswith(("_type", "_parsing")) or "from_" in kind:
        wanted = describe_type(annotation) if annotation is not None else detail["msg"]
        return Problem(key, f"must be {wanted}", _value_at(data, words), description)
    return Problem(key, detail["msg"][0].lower() + detail["msg"][1:], value, description)


def _real_path(data: Any, loc: Sequence[Any]) -> list[Any]:
    """The part of pydantic's location that exists in the data: it adds the names of a union's members."""
    words: list[Any] = []
    for word in loc:
        inside = (isinstance(data, dict) and word in data) or (
            isinstance(data, list) and isinstance(word, int)
        )
        if not inside and not isinstance(data, dict):
            break
        words.append(word)
        data = data[word] if inside else None
    return words


def _value_at(data: Any, words: Sequence[Any]) -> Any:
    for word in words:
        data = data[word]
    return data


def _field_at(section: type[BaseModel], words: Sequence[Any]) -> tuple[Any, str]:
    """The field's annotation and description; None and "" if there is no such field."""
    annotation, description = None, ""
    for word in words:
        field = section.model_fields.get(str(word))
        if field is None:
            annotation = _values_of(annotation)
            break
        annotation, description = field.annotation, field.description or ""
        section = nested_section(annotation) or section
    return annotation, description


def _values_of(annotation: Any) -> Any:
    """The type of a mapping's values in `dict[…] | None`; another annotation as it is."""
    for candidate in (annotation, *get_args(annotation)):
        if get_origin(candidate) is dict:
            return get_args(candidate)[1]
    return annotation


def _check_across(sections: Mapping[str, Any]) -> list[Problem]:
    """What only several keys together show. Every section is valid by itself here."""
    model, lora, run = sections["model"], sections["lora"], sections["run"]
    problems: list[Problem] = []
    if model.loader == "scratch":
        problems += _check_scratch(model)
        if lora is not None and run.warm_start is None:  # which saves the model that the adapters belong to
            remedy = "add run.warm_start, or set lora: null"
            problems.append(
                Problem("lora", "a new model's adapters would be all that is kept of it", remedy=remedy)
            )
    elif model.name is None:
        problems.append(Problem("model.name", "is missing", remedy="set it to a hub id or a local path"))
    elif model.scratch is not None:
        remedy = "remove it, or set model.loader: scratch"
        problems.append(
            Problem("model.scratch", f"means nothing to the loader {model.loader}", remedy=remedy)
        )
    if model.loader == "unsloth":
        problems += _check_unsloth(model, lora, sections["grpo"])
        if lora is not None and run.warm_start is not None and sections["grpo"].get("beta"):
            remedy = "set grpo.beta: 0.0, or model.loader: transformers"
            problems.append(
                Problem("run.warm_start", "Unsloth's KL is to the model before it", remedy=remedy)
            )
    else:
        problems += _unsloths(model)
    if model.tokenizer == "bpe" and model.loader != "scratch":
        remedy = "remove it: a checkpoint has its own, or set model.loader: scratch"
        problems.append(Problem("model.tokenizer", "is trained for a new model alone", "bpe", remedy))
    if model.load_in_4bit and model.load_in_8bit:
        problems.append(
            Problem("model.load_in_8bit", "set together with load_in_4bit", True, "keep one of the two")
        )
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, key) and lora is None:
            problems.append(
                Problem(f"model.{key}", "quantised weights cannot be trained", True, "add a lora section")
            )
    if lora is not None and isinstance(lora.target_modules, list) and "lm_head" in lora.target_modules:
        remedy = "remove 'lm_head' from it: TRL does not train an adapter there"
        problems.append(Problem("lora.target_modules", "adapts the head", lora.target_modules, remedy))
    if run.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run.name):
        problems.append(
            Problem("run.name", "is no folder name", run.name, "use letters, digits, '.', '_' and '-'")
        )
    return problems + list(_check_lengths(model, sections["grpo"]))


def _check_lengths(model: ModelConfig, grpo: Mapping[str, Any]) -> Iterator[Problem]:
    """A completion follows a prompt of one token at least."""
    limits = {"model.max_seq_length": model.max_seq_length}
    if model.loader == "scratch":
        limits["model.scratch.max_positions"] = (model.scratch or ScratchConfig()).max_positions
    elif model.loader == "unsloth":
        limits["model.max_seq_length"] = model.max_seq_length or MAX_SEQ_LENGTH
    length = completion_length(model, grpo)
    for key, limit in limits.items():
        if limit is not None and length >= limit:
            yield Problem(
                "grpo.max_completion_length",
                f"leaves no room for a prompt within {key} {limit}",
                length,
                f"set it below {limit}, or raise {key}",
            )


def _check_task_fits(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """The task beside the other sections."""
    from recipes.rewards.contract import problems
    from recipes.tasks import get_task

    task: Any = get_task(sections["task"].name)
    defaults = getattr(task, "WEIGHTS", None)
    yield from problems(sections["task"].options, task.rewards, sections["grpo"], defaults)
    model = sections["model"]
    if model.loader != "scratch":
        return
    has = [choice for choice, name in ((None, "CHARACTERS"), ("bpe", "corpus")) if hasattr(task, name)]
    if model.tokenizer in (None, "bpe") and model.tokenizer not in has:
        message = f"the task {sections['task'].name} has nothing to make that tokenizer of"
        remedy = "".join(f"set it to {choice or 'null'}, or " for choice in has) + "name a tokenizer"
        yield Problem("model.tokenizer", message, model.tokenizer, remedy)


def _unsloths(model: ModelConfig) -> list[Problem]:
    """Keys that only the loader unsloth knows."""
    remedy = "remove it, or set model.loader: unsloth"
    return [
        Problem(f"model.{key}", "is Unsloth's", getattr(model, key), remedy)
        for key in ("fast_inference", "gpu_memory_utilization", "vllm_standby")
        if getattr(model, key)
    ]


def _check_unsloth(model: ModelConfig, lora: LoraSection | None, grpo: Mapping[str, Any]) -> list[Problem]:
    """What Unsloth drops without a word, or refuses after the weights are loaded."""
    problems = []
    if model.attn_implementation is not None:
        problems.append(
            Problem(
                "model.attn_implementation", "is Unsloth's to choose", model.attn_implementation, "remove it"
            )
        )
    if not model.fast_inference:
        for key in ("gpu_memory_utilization", "vllm_standby"):
            if getattr(model, key):
                remedy = "set model.fast_inference: true, or remove it"
                problems.append(Problem(f"model.{key}", "is vLLM's", getattr(model, key), remedy))
        if grpo.get("use_vllm"):
            problems.append(
                Problem("grpo.use_vllm", "is model.fast_inference here", True, "set that in its place")
            )
        return problems
    if lora is None:
        remedy = "add a lora section, or set model.fast_inference: false"
        problems.append(Problem("lora", "vLLM shares frozen weights alone", None, remedy))
    elif lora.modules_to_save is not None:
        remedy = "remove it, or set model.fast_inference: false"
        problems.append(
            Problem("lora.modules_to_save", "vLLM takes adapters alone", lora.modules_to_save, remedy)
        )
    for key, why in (
        ("load_in_8bit", "vLLM has no such weights"),
        ("revision", "vLLM loads the main branch"),
    ):
        if getattr(model, key):
            remedy = "remove it, or set model.fast_inference: false"
            problems.append(Problem(f"model.{key}", why, getattr(model, key), remedy))
    return problems


def _check_scratch(model: ModelConfig) -> list[Problem]:
    shape = model.scratch or ScratchConfig()
    problems = []
    if model.name is not None:
        remedy = "remove it, or set model.loader: transformers"
        problems.append(Problem("model.name", "means nothing to the loader scratch", model.name, remedy))
    if shape.hidden_size % (2 * shape.heads):
        unit = 2 * shape.heads
        near = one_of(
            size for size in (shape.hidden_size // unit * unit, -(-shape.hidden_size // unit) * unit) if size
        )
        message = f"not a multiple of 2 × heads {shape.heads}"  # rotary positions turn pairs within a head
        problems.append(Problem("model.scratch.hidden_size", message, shape.hidden_size, f"set it to {near}"))
    if shape.kv_heads is not None and shape.heads % shape.kv_heads:
        message = f"does not divide heads {shape.heads}"
        problems.append(
            Problem("model.scratch.kv_heads", message, shape.kv_heads, "set it to a divisor, or null")
        )
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, key):
            remedy = "remove it: a new model is trained in full"
            problems.append(Problem(f"model.{key}", "means nothing to the loader scratch", True, remedy))
    return problems


def main(arguments: Sequence[str]) -> int:
    """Prints the reference (`--markdown`) or a resolved configuration; returns the exit status."""
    if list(arguments) == ["--markdown"]:
        from recipes.config.reference import markdown

        print(markdown(), end="")
        return 0
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m recipes.config FILE [section.key=value …] | --markdown", file=sys.stderr)
        return EXIT_STATUS
    try:
        print(load_config(arguments[0], arguments[1:]).to_yaml(), end="")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_STATUS
    return 0
