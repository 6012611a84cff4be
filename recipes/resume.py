"""Going on with a run: a resumed run must be the same model, adapters, task and data as before.

The rest may change from one session to the next: more steps, another batch, other tracking.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from recipes.config import ConfigError, RunConfig, load_config
from recipes.config_errors import Problem, join, show
from recipes.runfolder import RunFolder

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


def _differences(key: str, before: Any, now: Any, folder: RunFolder) -> Iterator[Problem]:
    if isinstance(before, dict) and isinstance(now, dict):
        for word in dict.fromkeys([*before, *now]):
            yield from _differences(join(key, word), before.get(word), now.get(word), folder)
    elif before != now and key not in MAY_CHANGE:
        message = f"{show(now)} differs from the {show(before)} of the run being resumed, {folder.path}"
        yield Problem(key, message, remedy="set it back, or leave --resume out to begin another run")
