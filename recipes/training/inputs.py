"""What a run reads beside its configuration, in its environment.json: digests of its problems and its own rewards.

    found = inputs_of(task)         {"problems": {"train": …, "held_out": …}, "rewards": {"my_rewards": …}}
    what_changed_in(found, task, folder)     before a session of the folder goes on: refuses other problems
    keep(found, folder)
    keep_commit(model, folder, before)                of a model that the hub gave: its main branch moves

A file may be another one tomorrow, by the same name: held-out problems among those that are trained on, another reward.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.problems import ABSENT, ConfigError, Problem

if TYPE_CHECKING:
    from datasets import Dataset

    from recipes.tasks import Task
    from recipes.tracking.run_folder import RunFolder

_FILE, _KEY = "environment.json", "inputs"
_AT_A_TIME = 1000  # rows in main memory


def inputs_of(task: Task) -> dict[str, dict[str, str]]:
    """The sha256 of the problems, as the model gets them, and of each module that a reward of the user's is in.

    The rewards have been imported.
    """
    modules = dict.fromkeys(
        name.rpartition(".")[0] for name in task.reward_weights if name not in task.rewards
    )
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in modules}
    return {
        "problems": {"train": _digest(task.train), "held_out": _digest(task.held_out)},
        "rewards": {
            name: hashlib.sha256(Path(file).read_bytes()).hexdigest()
            for name, file in files.items()
            if file is not None and Path(file).is_file()
        },
    }


def _digest(rows: Dataset) -> str:
    found = hashlib.sha256()
    for start in range(0, len(rows), _AT_A_TIME):
        for name, values in rows[start : start + _AT_A_TIME].items():
            found.update(repr((name, values)).encode())
    return found.hexdigest()


def what_changed_in(inputs: dict[str, dict[str, str]], task: Task, folder: RunFolder) -> list[str]:
    """A sentence for each module of rewards that is another than in the session before: those may be mended.

    Raises ConfigError if the problems are others. Of a folder that has recorded neither nothing is said.
    """
    before: dict[str, Any] = (folder.read_json(_FILE) or {}).get(_KEY) or {}
    recorded, rewards = before.get("problems") or {}, before.get("rewards") or {}
    others = [name for name, digest in inputs["problems"].items() if recorded.get(name, digest) != digest]
    if others:
        place = getattr(task.options, "dataset", None)
        message = (
            f"the problems ({' and '.join(others)}) are not those of the run being resumed, {folder.path}: "
            "its figures before and after would be of different ones"
        )
        remedy = "put them back as they were, or leave --resume out to begin another run"
        key, value = ("task", ABSENT) if place is None else ("task.dataset", place)
        raise ConfigError([Problem(key, message, value, remedy)])
    return [
        f"rewards: the module {name} is another from here on than in the session before"
        for name, digest in inputs["rewards"].items()
        if rewards.get(name, digest) != digest
    ]


def keep(inputs: dict[str, dict[str, str]], folder: RunFolder) -> None:
    """Into the session's environment.json."""
    folder.write_json(_FILE, (folder.read_json(_FILE) or {}) | {_KEY: inputs})


def commit_of(folder: RunFolder | None) -> str | None:
    """Of the model, as the folder's last session had it; None where it came from no hub, or nobody recorded it."""
    found = folder and folder.read_json(_FILE)
    return ((found or {}).get(_KEY) or {}).get("model_commit")


def keep_commit(model: Any, folder: RunFolder, before: str | None) -> str:
    """The commit of a model from the hub, into environment.json. A sentence where it was another `before`, or ""."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit is None:
        return ""
    found = folder.read_json(_FILE) or {}
    folder.write_json(_FILE, found | {_KEY: {**(found.get(_KEY) or {}), "model_commit": commit}})
    if before in (None, commit):
        return ""
    return f"model.name: commit {commit} of it from here on, {before} in the session before\n"
