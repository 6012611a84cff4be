"""Going on with a run: it must be the same model, adapters, task and data as before, and something must be left to do.

The rest may change from one session to the next: more steps, another batch, other tracking.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from recipes.config.load import RunConfig, load_config
from recipes.config.schema import ModelConfig
from recipes.problems import ConfigError, Problem, join, show
from recipes.tracking.run_folder import STATE, RunFolder

WARM_START = "warm_start"  # the folder in the run's that keeps the model after it
FINISHED = "finished.json"  # written last of all, with the step whose model is in final/
# Within the model and the task: what concerns memory, speed and patience alone, so that another card can take over.
MAY_CHANGE = {
    "model.attn_implementation",
    "model.fast_inference",
    "model.gpu_memory_utilization",
    "model.gradient_checkpointing",
    "model.max_seq_length",
    "model.vllm_standby",
    "task.reward_failures",
    "task.reward_seconds",
}


def require_same(config: RunConfig, folder: RunFolder) -> None:
    """Raises ConfigError, a line a key, if the folder's config.yaml describes another run than `config`."""
    before, now = load_config(folder.path / "config.yaml").to_dict(), config.to_dict()
    problems = [
        problem
        for section in ("model", "lora", "task")
        for problem in _differences(section, before[section], now[section], folder)
    ]
    # The seed splits off the held-out problems: under another one the run would train on them.
    problems += _differences("run.seed", before["run"]["seed"], now["run"]["seed"], folder)
    if problems:
        raise ConfigError(problems)


def is_finished(config: RunConfig, folder: RunFolder) -> bool:
    """Whether nothing is left to do: every step taken and evaluated, the final model and the report written.

    FINISHED counts, not the checkpoint: without run.save_every the last one may be of a step long before.
    """
    record = folder.read_json(FINISHED) or {"step": 0}
    there = folder.final.is_dir() and (folder.path / "report.html").is_file()
    return _is_last(config, record["step"]) and there


def is_trained(config: RunConfig, folder: RunFolder) -> bool:
    """Whether the last checkpoint is after the last step, so that only what follows the training is missing."""
    return _is_last(config, folder.step)


def _is_last(config: RunConfig, step: int) -> bool:
    """Whether no step comes after this one. Where epochs decide in place of max_steps, the trainer itself sees it."""
    return 0 < config.grpo["max_steps"] <= step


def model_to_load(config: RunConfig, folder: RunFolder) -> ModelConfig:
    """The model section to load by: what the warm start left, where a resumed run has had one.

    A checkpoint with adapters holds those alone; without the base that they were trained on they mean nothing.
    """
    place = folder.path / WARM_START
    if not (place / "config.json").is_file():
        return config.model
    started: dict[str, Any] = {"name": str(place.resolve()), "revision": None, "tokenizer": None}
    if config.model.loader == "scratch":
        started |= {"loader": "transformers", "scratch": None}
    return config.model.model_copy(update=started)


def restore(trainer: Any, checkpoint: Path) -> None:
    """The checkpoint's weights and state, as after its last step: `trainer.train` would take one more."""
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
    trainer.state.max_steps = trainer.args.max_steps


def _differences(key: str, before: Any, now: Any, folder: RunFolder) -> Iterator[Problem]:
    if isinstance(before, dict) and isinstance(now, dict):
        for word in dict.fromkeys([*before, *now]):
            yield from _differences(join(key, word), before.get(word), now.get(word), folder)
    elif before != now and key not in MAY_CHANGE:
        message = f"{show(now)} differs from the {show(before)} of the run being resumed, {folder.path}"
        yield Problem(key, message, remedy="set it back, or leave --resume out to begin another run")
