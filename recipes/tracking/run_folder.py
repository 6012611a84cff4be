"""The folder a run leaves: where its files are, which are a session's, and what is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.config.source import read_file
from recipes.problems import ConfigError
from recipes.tracking.environment import environment
from recipes.tracking.files import LinesFile, MetricsFile, plain, write_whole

STATE = "trainer_state.json"  # what the trainer writes into a checkpoint last


class RunFolder:
    """A run's folder. `.path` is where it is; `.metrics` and `.completions` are its files of lines."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = MetricsFile(self.path / "metrics.jsonl")
        self.completions = LinesFile(self.path / "completions.jsonl")

    @classmethod
    def create(cls, root: str | Path, name: str, config: Any = None) -> RunFolder:
        """Makes `root/name`, or `root/name-2`, `-3`, … if that exists, and begins its first session."""
        folder = cls(_make_next(Path(root), name, len(existing(Path(root), name))))
        folder.begin_session(config)
        return folder

    @classmethod
    def to_resume(cls, root: str | Path, name: str) -> RunFolder:
        """The latest of `root/name`, `root/name-2`, … that has a checkpoint; nothing is written yet.

        A folder without one is passed over: a second start by mistake must not hide the first.
        Raises FileNotFoundError if there is none.
        """
        folders = [cls(path) for path in existing(Path(root), name)]
        if not folders:
            raise FileNotFoundError(
                f"no run named {name!r} in {root} to resume; leave --resume out to begin one"
            )
        for folder in reversed(folders):
            if folder.checkpoint is not None:
                return folder
        places = ", ".join(str(folder.path / "checkpoints") for folder in folders)
        raise FileNotFoundError(
            f"no checkpoint to resume from in {places}; leave --resume out to begin again"
        )

    def begin_session(self, config: Any = None) -> None:
        """Writes config.yaml from a RunConfig, and versions and machine as environment.json.

        Those of the session before are kept as environment.1.json and so on, its configuration where it differs.
        """
        self._keep("environment.json")
        self.write_json("environment.json", environment())
        path = self.path / "config.yaml"
        if config is None or (path.is_file() and path.read_text(encoding="utf-8") == config.to_yaml()):
            return
        self._keep("config.yaml")
        write_whole(path, config.to_yaml())

    @property
    def checkpoint(self) -> Path | None:
        """The latest whole checkpoint, if there is one."""
        states = self.path.glob(f"checkpoints/checkpoint-*/{STATE}")
        return max((state.parent for state in states), key=_number, default=None)

    @property
    def step(self) -> int:
        """The optimizer step of the latest checkpoint; 0 without one."""
        if self.checkpoint is None:
            return 0
        return int(json.loads((self.checkpoint / STATE).read_text(encoding="utf-8"))["global_step"])

    @property
    def final(self) -> Path:
        """Where the trained model goes."""
        return self.path / "final"

    def write_json(self, name: str, obj: Any) -> Path:
        """Writes `obj` as readable JSON into the folder, whole or not at all."""
        return write_whole(self.path / name, json.dumps(plain(obj), indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote, or None if there is no such file."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _keep(self, name: str) -> None:
        """Moves a file of an earlier session aside."""
        path = self.path / name
        if path.is_file():
            count = len(list(self.path.glob(f"{path.stem}.*{path.suffix}")))
            path.rename(path.with_name(f"{path.stem}.{count + 1}{path.suffix}"))


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def existing(root: Path, name: str) -> list[Path]:
    """The folders of the runs called `name`, oldest first: name, name-2, name-3, …

    The name that a run has recorded decides: `llama-3` is the third run of `llama`, or the first of `llama-3`.
    """
    numbered = [(1, root / name)] if (root / name).is_dir() else []
    for path in root.glob(f"{name}-*"):
        suffix = path.name.removeprefix(f"{name}-")
        if path.is_dir() and suffix.isdecimal() and int(suffix) > 1:
            numbered.append((int(suffix), path))
    return [path for _, path in sorted(numbered) if _recorded_name(path) in (name, None)]


def _recorded_name(folder: Path) -> str | None:
    """`run.name` in the folder's config.yaml; None if that cannot be read."""
    try:
        run = read_file(folder / "config.yaml").data.get("run")
    except ConfigError:
        return None
    return run.get("name") if isinstance(run, dict) else None


def _make_next(root: Path, name: str, taken: int) -> Path:
    """Makes the first free folder; mkdir itself decides between two runs that begin at once."""
    number = taken + 1
    while True:
        path = root / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
