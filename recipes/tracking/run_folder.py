"""The folder a run leaves: where its files are, which are a session's, and what is resumed."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from recipes.config.source import read_file
from recipes.models.manifest import MANIFEST, STATE, damage
from recipes.problems import ConfigError, Problem, place_of, visible
from recipes.tracking.environment import environment
from recipes.tracking.files import CompletionsFile, MetricsFile, plain, write_whole
from recipes.tracking.lock import lock

_RELIED_ON: dict[str, dict[str, type]] = {  # without these a file is damaged
    "finished.json": {"step": int},
    "head.json": {"calls": int, "rows": int},
}


class RunFolder:
    """A run's folder. `.path` is where it is; `.metrics` and `.completions` are its files of lines.

    Of the processes of a run the main one writes. The copy that another gets of its object reads, and writes nothing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = MetricsFile(self.path / "metrics.jsonl")
        self.completions = CompletionsFile(self.path / "completions.jsonl")
        self._damaged: list[Path] = []  # checkpoints that were read and are passed over
        self._said: set[str] = set()  # files that were named as damaged
        self._lock: Any = None  # held as long as this object lives
        self._writes = True

    @property
    def name(self) -> str:
        """The folder's own name, also where it was given as "." or "..", which have none."""
        return os.path.basename(os.path.abspath(self.path))

    def __getstate__(self) -> dict[str, Any]:
        """Of the copy that another process gets."""
        state = {**vars(self), "_lock": None, "_writes": False}
        for name in ("metrics", "completions"):
            file = copy.copy(state[name])
            file.writes = False
            state[name] = file
        return state

    @classmethod
    def create(cls, root: str | Path, name: str, config: Any = None) -> RunFolder:
        """Makes `root/name`, or `root/name-2`, `-3`, … if that exists, and begins its first session.

        Raises ConfigError where no folder can be made.
        """
        folder = cls(_make_next(Path(root), name, len(existing(Path(root), name))))
        folder.begin_session(config)
        return folder

    @classmethod
    def to_resume(cls, root: str | Path, name: str) -> RunFolder:
        """The latest of `root/name`, `root/name-2`, … that has a checkpoint; nothing is written yet.

        A folder without one is passed over: a second start by mistake must not hide the first.
        A damaged checkpoint is named on the terminal, and the one before it taken. Raises FileNotFoundError if there
        is none.
        """
        folders = [cls(path) for path in existing(Path(root), name)]
        if not folders:
            raise FileNotFoundError(
                f"no run named {name!r} in {root} to resume; leave --resume out to begin one"
            )
        for folder in reversed(folders):
            if folder._has_sound_checkpoint():
                return folder
        places = ", ".join(str(folder.path / "checkpoints") for folder in folders)
        raise FileNotFoundError(
            f"no whole checkpoint to resume from in {places}; leave --resume out to begin again"
        )

    def with_session(self, config: Any) -> RunFolder:
        """This folder, its next session begun."""
        self.begin_session(config)
        return self

    def begin_session(self, config: Any = None) -> None:
        """Writes config.yaml from a RunConfig, and versions and machine as environment.json.

        Those of the session before are kept as environment.1.json and so on, its configuration where it differs.
        Raises BlockingIOError, naming the process, if another run is at work here.
        """
        self._lock = self._lock or lock(self.path)
        for place in self._damaged:  # out of the way of the one that will be written in its place
            place.rename(_free(place.with_name(f"damaged-{place.name}")))
        self._damaged.clear()
        self._say_what_is_missing()
        self._keep("environment.json")
        self.write_json("environment.json", environment())
        path = self.path / "config.yaml"
        if config is None or (path.is_file() and path.read_text(encoding="utf-8") == config.to_yaml()):
            return
        self._keep("config.yaml")
        write_whole(path, config.to_yaml())

    def say_unreadable(self) -> None:
        """Names the lines of files that were cut off or overwritten: reports go without them."""
        for file in (self.metrics, self.completions):
            if lines := file.unreadable():
                numbers = ", ".join(map(str, lines))
                print(f"{file.path}: line {numbers} was cut off or overwritten and is left out", flush=True)

    def _say_what_is_missing(self) -> None:
        """What is unreadable, and steps before the checkpoint of which no line is left."""
        self.say_unreadable()
        records = self.metrics.read()
        last = max((record.get("step", 0) for record in records), default=0)
        if self.step - last >= max((record.get("steps", 1) for record in records), default=1):
            print(
                f"{self.metrics.path} ends at step {last}, the checkpoint at {self.step}: the steps between are lost"
            )

    @property
    def checkpoint(self) -> Path | None:
        """The latest checkpoint, but for those found damaged, if there is one."""
        whole = [place for place in self._checkpoints() if (place / MANIFEST).is_file()]
        return max((place for place in whole if place not in self._damaged), key=_number, default=None)

    def _checkpoints(self) -> list[Path]:
        places = self.path.glob("checkpoints/checkpoint-*")
        return sorted((place for place in places if place.name[11:].isdecimal()), key=_number)

    def _has_sound_checkpoint(self) -> bool:
        """Reads checkpoints, the latest first, until one is whole; the others are passed over by name."""
        for place in reversed(self._checkpoints()):
            found = damage(place)
            if not found:
                return True
            print(f"{place} is passed over: {found}", flush=True)
            self._damaged.append(place)
        return False

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
        if not self._writes:
            return self.path / name
        return write_whole(self.path / name, json.dumps(plain(obj), indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What `write_json` wrote; None if there is no such file, or it is damaged, which a line says.

        A report or a checkpoint is worth more than what one file adds to it.
        """
        path = self.path / name
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("no object")
            for key, kind in _RELIED_ON.get(name, {}).items():
                if not isinstance(found.get(key), kind):
                    raise ValueError(f"no {key}")
        except (OSError, ValueError, RecursionError) as error:
            if name not in self._said:
                reason = error.strerror if isinstance(error, OSError) else error
                print(visible(f"{path} is damaged ({reason}) and is left out"), file=sys.stderr, flush=True)
                self._said.add(name)
            return None
        return found

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
    Raises ConfigError where nobody can say what is there.
    """
    place_of("run.output_root", str(root))
    numbered = [(1, root / name)] if (root / name).is_dir() else []
    for path in root.glob(f"{name}-*"):
        suffix = path.name.removeprefix(f"{name}-")
        if path.is_dir() and suffix.isdecimal() and int(suffix) > 1:
            numbered.append((int(suffix), path))
    return [path for _, path in sorted(numbered) if _is_run(path, name)]


def _is_run(path: Path, name: str) -> bool:
    """Whether a folder is a run of that name: by what it has recorded, or renamed to it by hand."""
    recorded = _recorded_name(path)
    if recorded in (name, None):
        return True
    return path.name == name and not re.fullmatch(rf"{re.escape(recorded)}-[0-9]+", name)


def _recorded_name(folder: Path) -> str | None:
    """`run.name` in the folder's config.yaml; None if that cannot be read."""
    try:
        run = read_file(folder / "config.yaml").data.get("run")
    except ConfigError:
        return None
    name = run.get("name") if isinstance(run, dict) else None
    return name if isinstance(name, str) else None


def _make_next(root: Path, name: str, taken: int) -> Path:
    """Makes the first free folder; mkdir itself decides between two runs that begin at once."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        number = taken + 1
        while True:
            path = root / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
    except OSError as error:  # a dangling link, a file, a disk that is not mounted or is read-only
        message = f"no folder can be made there: {error.strerror or error}"
        if root.is_symlink() and not root.exists():
            message = f"is a link to {os.readlink(root)}, which is not there"
        remedy = "mount its disk, make the folder, or name another one"
        raise ConfigError([Problem("run.output_root", message, str(root), remedy)]) from error


def _free(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return path if not path.exists() else next(other for other in numbered if not other.exists())
