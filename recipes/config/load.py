"""The configuration of a run: one YAML file, checked to the last key before anything is loaded.

    load_config("configs/quickstart.yaml", ["grpo.learning_rate=2e-5"]) -> RunConfig

Every mistake is a ConfigError with one line each: file and line, key, what is wrong, value, remedy.
`python -m recipes.config FILE [key=value …]` prints the resolved configuration, and
`python -m recipes.config --markdown` the reference that is kept as docs/configuration.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.config import packed
from recipes.config.checks import check_across
from recipes.config.grpo import check_grpo, defaults, import_grpo_config, world_size
from recipes.config.parse import parse_section, unknown_keys
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
    leaves,
    schema_keys,
)
from recipes.config.source import dump, merge, read_file, read_overrides
from recipes.config.unsloth import is_unsloths, trl_meaning
from recipes.problems import EXIT_STATUS, ConfigError, Problem, one_of
from recipes.processes import ends_though_it_waits, spread, wait_at_most

COMPILING_PAYS = 200  # steps, from which on it takes less than it saves (docs/speed.md)

if TYPE_CHECKING:
    from trl import GRPOConfig

    from recipes.tasks import Task

__all__ = ["EXIT_STATUS", "ConfigError", "RunConfig", "load_config"]


class RunConfig(Section):
    """A whole, checked configuration.

    grpo: every field that a configuration may set, by TRL's names, with TRL's default where none was given.
    grpo_given: only those that the file and the command line set.
    processes: as the launcher announced them when it was loaded; no key sets it.
    longest_prompt: tokens of the task's longest, None until its problems were looked at; no key sets it.
    """

    model: ModelConfig
    head: HeadConfig
    step: StepConfig
    task: TaskConfig
    grpo: dict[str, Any]
    grpo_given: dict[str, Any]
    lora: LoraSection | None
    tracking: TrackingConfig
    run: RunSection
    processes: int = 1
    longest_prompt: int | None = None

    @property
    def completion_length(self) -> int:
        """The most tokens that a completion may have."""
        return self.grpo["max_completion_length"]

    @property
    def own_vllm(self) -> bool:
        """Whether a vLLM samples in the training process itself: Unsloth's, or TRL's colocated one."""
        beside = self.grpo["use_vllm"] and self.grpo["vllm_mode"] == "colocate"
        return bool(self.model.fast_inference or beside)

    def compiles_layers(self, *, cuda: bool) -> bool:
        """Whether layers are compiled: as asked, else where that was measured and the run is long enough."""
        asked = self.model.compile_layers
        if asked is not None:
            return asked
        model, grpo = self.model, self.grpo
        quantised = model.load_in_8bit or (model.load_in_4bit and self.own_vllm)
        tried = model.loader == "transformers" and not quantised
        long = not 0 < grpo["max_steps"] < COMPILING_PAYS
        alone = self.processes == 1 and not spread()
        return cuda and tried and alone and long

    @property
    def packs(self) -> bool:
        """Whether the packed step is asked for and no key or launcher rules it out; the model still may."""
        asked = self.step.impl == "packed" and not self.unsloths_step and spread() != "DeepSpeed"
        return asked and not any(self.against_packing())

    @property
    def unsloths_step(self) -> bool:
        """Whether the step is that of Unsloth's trainer: under its loader, unless packed is written out."""
        by_name = self.step.impl == "packed" and "impl" in self.step.model_fields_set
        return self.model.loader == "unsloth" and not by_name

    def against_packing(self) -> Iterator[str]:
        """Why the packed step is not exact with these keys, as the trainer will say it."""
        yield from packed.by_embeddings(self.grpo["neftune_noise_alpha"])
        yield from packed.by_adapter(self.lora.dropout if self.lora is not None else None)

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """The chat template's arguments beside the messages, wherever a prompt is rendered."""
        return self.grpo["chat_template_kwargs"] or {}

    def grpo_config(self, output_dir: str | Path) -> GRPOConfig:
        """TRL's GRPOConfig of this run: the `grpo` section, and the fields that follow from other sections.

        Raises ConfigError if TRL still refuses a field or a combination of fields.
        """
        import_grpo_config(self.model.loader, self.model.vllm_standby)
        import trl  # GRPOConfig as the package names it now: Unsloth puts its own class there

        told = trl_meaning(self.grpo) if is_unsloths(trl.GRPOConfig) else self.grpo
        try:
            with ends_though_it_waits():
                arguments = trl.GRPOConfig(**{**told, **self._derived_fields()}, output_dir=str(output_dir))
        except Exception as error:  # TRL, transformers, accelerate: a dozen kinds, all meaning the same here
            message = f"TRL refuses it: {error or type(error).__name__}"
            raise ConfigError([Problem("grpo", message, remedy="change the fields that it names")]) from error
        _load_whole()
        wait_at_most(arguments.ddp_timeout)
        return arguments

    def make_task(self) -> Task:
        """The run's task. Make it once and pass it on: it keeps what it has read."""
        from recipes.tasks import get_task

        return get_task(self.task.name)(self.task.options, self.run.seed)

    def _derived_fields(self) -> dict[str, Any]:
        """Fields of GRPOConfig that follow from other sections and from the device."""
        import torch

        fields: dict[str, Any] = {
            "run_name": self.run.name,
            "seed": self.run.seed,
            "project": self.grpo_given.get("project", "memhead"),
            "report_to": [] if self.tracking.report_to == "none" else [self.tracking.report_to],
            "logging_steps": self.tracking.logging_every,
            "logging_first_step": True,
            "log_completions": self.tracking.print_completions > 0,
            "num_completions_to_print": self.tracking.print_completions or None,
            "disable_tqdm": True,
            "save_strategy": "no" if self.run.save_every is None else "steps",
            "gradient_checkpointing": self.model.gradient_checkpointing,
        }
        if self.grpo["push_to_hub"] and self.grpo["hub_model_id"] is None:
            fields["hub_model_id"] = self.run.name  # TRL would call it by its folder: checkpoints
        if self.run.save_every is not None:
            fields["save_steps"] = self.run.save_every
        if self.grpo.get("ddp_find_unused_parameters") is None:
            fields["ddp_find_unused_parameters"] = False  # every pass uses all of them; a search costs time
        return fields | _precision(self.model.dtype, self.grpo_given, torch.cuda.is_available())

    def to_dict(self) -> dict[str, Any]:
        """Plain data in the shape of the YAML: every key, the task's options beside its name."""
        data = self.model_dump(mode="json", exclude={"grpo"})
        data["grpo"] = self.grpo_given
        data["task"] = {"name": self.task.name, **data["task"]["options"]}
        return {section: data[section] for section in ORDER}

    def to_yaml(self) -> str:
        """The resolved configuration; `load_config` of it gives an equal RunConfig.

        A step that nobody asked for by name stays unnamed: the default gives way to TRL's where it must, the name
        does not, and a rerun of this file has to do what this run did.
        """
        data = self.to_dict()
        if "impl" not in self.step.model_fields_set:
            del data["step"]["impl"]
        return dump(data)


def _load_whole() -> None:
    """Whatever is loaded from here on is whole, until a trainer is made.

    Where a GRPOConfig under ZeRO-3 exists, transformers takes apart what it loads; but a model is checked, warm-started
    and evaluated before there is deepspeed's engine, which puts parts together again and takes a whole model as well.
    """
    if spread() == "DeepSpeed":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _precision(dtype: str, given: Mapping[str, Any], cuda: bool) -> dict[str, Any]:
    """TRL's precision and device fields for this machine, except those that were given.

    TRL turns bfloat16 autocast on unless told otherwise, also on a CPU and on GPUs that have no bfloat16.
    """
    import torch

    if not cuda or given.get("use_cpu"):
        fields = {"use_cpu": not cuda, "bf16": False, "dataloader_pin_memory": False}
    elif "bf16" in given or "fp16" in given:
        fields = {"bf16": False} if given.get("fp16") else {}
    else:
        half = dtype == "float16" or not torch.cuda.is_bf16_supported(including_emulation=False)
        fields = {"fp16": half, "bf16": not half}
    return {name: value for name, value in fields.items() if name not in given}


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, processes: int | None = None
) -> RunConfig:
    """The checked configuration of a YAML file with command-line overrides applied.

    overrides: `section.key=value` each, the value read as YAML. processes: of the run; None: as the launcher says.
    Raises ConfigError with every problem found.
    """
    path = Path(path)
    document = merge(read_file(path), read_overrides(list(overrides)))
    processes = processes or world_size()
    problems, sections = _check(document.data, processes)
    if problems:
        raise ConfigError(problems, document.where, str(path))
    if not sections["run"].name:
        sections["run"] = sections["run"].model_copy(update={"name": path.stem})
    if sections["model"].loader == "scratch" and sections["model"].scratch is None:
        sections["model"] = sections["model"].model_copy(update={"scratch": ScratchConfig()})
    return RunConfig.model_construct(**sections, processes=processes)


def _check(data: dict[str, Any], processes: int) -> tuple[list[Problem], dict[str, Any]]:
    """All problems of the data, and the parsed sections (complete only if there are no problems)."""
    model = data["model"] if isinstance(data.get("model"), dict) else {}
    grpo_config = import_grpo_config(model.get("loader", ""), model.get("vllm_standby") is True)
    trls = defaults(grpo_config)
    known = [*schema_keys(), *(f"grpo.{name}" for name in trls), *_task_keys(data.get("task"))]
    problems = unknown_keys("", data, ORDER, known)
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
            sections["grpo_given"] = dict(value or {})
            sections["grpo"] = {**trls, **sections["grpo_given"]}
            problems += check_grpo(sections["grpo_given"], grpo_config, known, processes)
        elif name == "task":
            found, sections[name] = _check_task(value or {}, known)
            problems += found
        else:
            found, sections[name] = parse_section(name, SECTIONS[name], value or {}, known)
            problems += found
    return problems or list(check_across(sections)), sections


def _task_keys(section: Any) -> list[str]:
    """The dotted keys of the named task: whoever writes `rewards:` at the top level means task.rewards."""
    from recipes.tasks import get_task, task_names

    name = section.get("name") if isinstance(section, dict) else None
    if not isinstance(name, str) or name not in task_names():
        return []
    return [f"task.{key}" for key in leaves(get_task(name).Options)]


def _check_task(data: dict[str, Any], known: list[str]) -> tuple[list[Problem], TaskConfig | None]:
    """The task's name against the registry, its options against the task's own Options class."""
    from recipes.tasks import get_task, task_names

    name = data.get("name")
    if not isinstance(name, str) or name not in task_names():
        message = "is missing" if name is None else "unknown task"
        value = {} if name is None else {"value": name}
        return [Problem("task.name", message, remedy=f"use {one_of(sorted(task_names()))}", **value)], None
    options_class = get_task(name).Options
    options = {key: value for key, value in data.items() if key != "name"}
    problems, parsed = parse_section("task", options_class, options, known)
    return problems, TaskConfig.model_construct(name=name, options=parsed) if parsed is not None else None


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
