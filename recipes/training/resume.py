"""Going on with a run: it must be the same model, adapters, task and data as before, and something must be left to do.

The rest may change from one session to the next: more steps, another rate or batch, other tracking. A setting that
changed is applied (`apply_settings`), or refused by name where the checkpoint has no room for another value.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import TrainerState

from recipes.config.load import RunConfig, load_config
from recipes.config.schema import ModelConfig
from recipes.models.checkpoint import WARM_START
from recipes.models.manifest import BASE, MANIFEST, REFERENCE, STATE, altered, damage, other_base
from recipes.problems import ConfigError, Problem, join, place_of, show
from recipes.processes import count, spread
from recipes.tracking.run_folder import RunFolder

FINISHED = "finished.json"  # written last of all, with the step whose model is in final/
# Within the model and the task: what concerns memory, speed and patience alone, so that another card can take over.
MAY_CHANGE = {
    "model.attn_implementation",
    "model.fast_inference",
    "model.gpu_memory_utilization",
    "model.gradient_checkpointing",
    "model.max_seq_length",
    "model.vllm_engine",
    "model.vllm_standby",
    "task.reward_failures",
    "task.reward_seconds",
}
# Outside of them: what the checkpoint was made with. Another optimizer keeps other moments, and a checkpoint lies at
# the end of a generation.
MAY_NOT_CHANGE = (
    "grpo.optim",
    "grpo.optim_args",
    "grpo.num_iterations",
    "grpo.steps_per_generation",
    "grpo.generation_batch_size",
    "run.seed",  # it splits off the held-out problems: under another one the run would train on them
    "run.warm_start",  # is over
)
# What an optimizer's group of parameters says of the configuration; the rest of it (`lr` too) is state.
_SETTINGS = ("initial_lr", "betas", "eps", "weight_decay", "momentum", "alpha", "fused", "foreach")


def require_same(config: RunConfig, folder: RunFolder) -> None:
    """Raises ConfigError, a line a key, if the folder's config.yaml describes another run than `config`."""
    before, now = _settings(load_config(folder.path / "config.yaml")), _settings(config)
    problems = [
        problem
        for section in ("model", "lora", "task")
        for problem in _differences(section, before[section], now[section], folder)
    ]
    for key in MAY_NOT_CHANGE:
        section, _, name = key.partition(".")
        problems += _differences(key, before[section].get(name), now[section].get(name), folder)
    if 0 < config.grpo["max_steps"] < folder.step:
        message = f"{config.grpo['max_steps']} is fewer than the {folder.step} steps that {folder.checkpoint} has taken"
        problems.append(Problem("grpo.max_steps", message, remedy="give as many at least"))
    checkpoint = folder.checkpoint
    if before["grpo"]["sync_ref_model"] and checkpoint and not (checkpoint / REFERENCE).is_file():
        message = f"moved the reference model, and {checkpoint} is without it"
        problems.append(
            Problem("grpo.sync_ref_model", message, remedy="leave --resume out to begin another run")
        )
    if problems:
        raise ConfigError(problems)


def require_whole_warm_start(config: RunConfig, folder: RunFolder) -> None:
    """Raises ConfigError if what the warm start left is not what was written.

    Adapters lie on it and a reference is loaded from it: with another model there the run would be another.
    """
    place = folder.path / WARM_START
    needed = config.lora is not None or config.grpo["beta"] or place.exists()
    if config.run.warm_start is None or not needed:
        return
    found = damage(place, parts={}) or (folder.checkpoint and other_base(folder.checkpoint, place))
    if found:
        remedy = "put the file back, or leave --resume out to begin another run"
        raise ConfigError([Problem("run.warm_start", f"of {place}, {found}", remedy=remedy)])


def require_as_sealed(config: RunConfig, begun: RunFolder | None) -> None:
    """Raises ConfigError if the model that `model.name` names was sealed, as a run's merged/ and final/ are, and is
    not what was written, or not the one that the adapters of the run begun before lie on."""
    name, checkpoint = config.model.name, None if begun is None else begun.checkpoint
    if name is None or _begins_from_another(begun):
        return
    place = place_of("model.name", name)
    noted = "" if checkpoint is None else other_base(checkpoint, place)
    if found := noted or altered(place):
        other = (
            "leave --resume out to begin another run" if checkpoint else f"remove {MANIFEST} if it is meant"
        )
        raise ConfigError(
            [Problem("model.name", f"of {place}, {found}", remedy=f"put back what its run wrote, or {other}")]
        )


def _begins_from_another(begun: RunFolder | None) -> bool:
    """Whether a run that goes on has its weights in what its warm start left or in its checkpoint."""
    if begun is None:
        return False
    checkpoint = begun.checkpoint
    return _warmed(begun) or (checkpoint is not None and not (checkpoint / BASE).is_file())


def require_same_spread(folder: RunFolder) -> None:
    """Raises ConfigError if the checkpoint's weights and optimizer were kept in parts and this session's are not, or
    the other way round: accelerate and deepspeed each read their own files alone."""
    before, now = _spread_of(folder.checkpoint), spread()
    if before != now:
        how = {"": "whole in each process", "FSDP": "in parts by FSDP", "DeepSpeed": "in parts by DeepSpeed"}
        message = (
            f"{folder.checkpoint} keeps weights and optimizer {how[before]}, and this session {how[now]}"
        )
        remedy = "start it as before (docs/scaling.md), or leave --resume out to begin another run"
        raise ConfigError([Problem("--resume", message, remedy=remedy)])
    if now == "DeepSpeed":
        _require_as_many(folder)


def _require_as_many(folder: RunFolder) -> None:
    """Of ZeRO-3: each process reads the part of the optimizer that it wrote."""
    if folder.checkpoint is None:
        return
    parts = len(list(folder.checkpoint.glob("global_step*/*optim_states.pt")))
    if parts != (now := count()):
        message = (
            f"{folder.checkpoint} keeps {parts} parts by DeepSpeed, and this session has {now} process(es)"
        )
        remedy = f"start {parts}, or leave --resume out to begin another run"
        raise ConfigError([Problem("--resume", message, remedy=remedy)])


def _spread_of(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return spread()  # nothing to go on from but the warm start, which is whole
    names = [path.name for path in checkpoint.iterdir()]
    if any(name.startswith("pytorch_model_fsdp") for name in names):
        return "FSDP"
    return "DeepSpeed" if any(name.startswith("global_step") for name in names) else ""


def what_changed(config: RunConfig, folder: RunFolder) -> list[str]:
    """A line for each setting that this session sees otherwise than the one before, all of them applied."""
    before, now = _settings(load_config(folder.path / "config.yaml")), _settings(config)
    found = [
        problem
        for name in now
        for problem in _differences(name, before[name], now[name], folder, changed=True)
    ]
    lines = [f"{problem.key}: {problem.message}" for problem in found]
    processes = (folder.read_json("environment.json") or {}).get("processes", 1)
    if processes != config.processes:
        lines.append(
            f"processes: {config.processes} from here on, {processes} before: sampling goes on from the seed, the data "
            "after as many batches of this size"
        )
    return lines


def apply_settings(optimizer: Any, scheduler: Any, settings: list[dict[str, Any]]) -> None:
    """Puts a configuration's values into an optimizer and a scheduler that a checkpoint's state was loaded into.

    settings: the optimizer's groups as they were before that. The rate is what the scheduler says of this step:
    state alone would give the next one the last rate of the session before, 0 after a whole linear decay.
    """
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        group.update({name: wanted[name] for name in _SETTINGS if name in wanted})
    if not isinstance(scheduler, LambdaLR):  # by the history of a metric, which no configuration can ask for
        return
    for group, function in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * function(scheduler.last_epoch)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _settings(config: RunConfig) -> dict[str, Any]:
    """As plain data, TRL's defaults included."""
    return {**config.to_dict(), "grpo": config.grpo}


def is_finished(config: RunConfig, folder: RunFolder) -> bool:
    """Whether nothing is left to do: every step taken and evaluated, the final model and the report written.

    FINISHED counts, not the checkpoint: without run.save_every the last one may be of a step long before.
    """
    record = folder.read_json(FINISHED) or {"step": 0}
    there = folder.final.is_dir() and (folder.path / "report.html").is_file()
    return _is_last(config, record["step"]) and there


def is_trained(trainer: Any, folder: RunFolder) -> bool:
    """Whether the last checkpoint is after the last step, so that only what follows the training is missing."""
    return 0 < steps_of(trainer) <= folder.step


def steps_of(trainer: Any) -> int:
    """All steps of the run, also where epochs decide."""
    *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return int(steps)


def _is_last(config: RunConfig, step: int) -> bool:
    """Whether no step comes after this one. Where epochs decide in place of max_steps, only the trainer knows."""
    return 0 < config.grpo["max_steps"] <= step


def model_to_load(config: RunConfig, folder: RunFolder) -> ModelConfig:
    """The model section to load by: what the warm start left, where a resumed run has had one.

    A checkpoint with adapters holds those alone; without the base that they were trained on they mean nothing.
    """
    on_gpu = torch.cuda.is_available() and not config.grpo["use_cpu"]
    decided: dict[str, Any] = {"compile_layers": config.compiles_layers(cuda=on_gpu)}
    if _warmed(folder):
        place = (folder.path / WARM_START).resolve()
        decided |= {"name": str(place), "revision": None, "tokenizer": None}
        if config.model.loader == "scratch":
            decided |= {"loader": "transformers", "scratch": None}
    return config.model.model_copy(update=decided)


def _warmed(folder: RunFolder) -> bool:
    return (folder.path / WARM_START / "config.json").is_file()


def restore(trainer: Any, checkpoint: Path) -> None:
    """The checkpoint's weights and state, as after its last step: `trainer.train` would take one more."""
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
    trainer.state.max_steps = steps_of(trainer)


def _differences(
    key: str, before: Any, now: Any, folder: RunFolder, *, changed: bool = False
) -> Iterator[Problem]:
    """What differs and may not; `changed`: what differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for word in dict.fromkeys([*before, *now]):
            yield from _differences(join(key, word), before.get(word), now.get(word), folder, changed=changed)
    elif before != now and changed:
        yield Problem(key, f"{show(now)} from here on, {show(before)} before")
    elif before != now and key not in MAY_CHANGE:
        message = f"{show(now)} differs from the {show(before)} of the run being resumed, {folder.path}"
        yield Problem(key, message, remedy="set it back, or leave --resume out to begin another run")
