"""The folder a run leaves: JSON files, lines of metrics and completions, versions and machine."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from recipes.config.source import read_file
from recipes.problems import ConfigError

PACKAGES = (
    "torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "safetensors", "numpy",
    "unsloth", "unsloth_zoo", "vllm", "bitsandbytes", "triton",
)  # fmt: skip
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
        _write_whole(path, config.to_yaml())

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
        return _write_whole(self.path / name, json.dumps(plain(obj), indent=2, ensure_ascii=False) + "\n")

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


class LinesFile:
    """A file of one JSON object a line, each written through to the file system at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line. After Ctrl-C or a crash every line written before is there, whole."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(record), ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All records. A last line that was cut off in the middle is left out."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines[:-1] if line]
        if lines[-1]:
            try:
                records.append(json.loads(lines[-1]))
            except json.JSONDecodeError:
                pass  # the process was killed while it wrote this line
        return records

    def rewrite(self, records: list[dict[str, Any]]) -> None:
        """Replaces the file by these records, whole or not at all."""
        lines = [json.dumps(plain(record), ensure_ascii=False) + "\n" for record in records]
        _write_whole(self.path, "".join(lines))

    def drop_after(self, step: int) -> None:
        """Removes records of later steps: a resumed run does those steps again."""
        records = self.read()
        kept = [record for record in records if record.get("step", 0) <= step]
        if self.path.is_file():
            self.rewrite(kept)


class MetricsFile(LinesFile):
    """Lines with a `step`, one for each step: a record for the last line's step is merged into it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._last_step: Any = self.read()[-1].get("step") if self.read() else None

    def write(self, record: dict[str, Any]) -> None:
        """Adds the record, or adds its keys to the line of its step (an evaluation beside a logged step)."""
        if self._last_step is not None and record["step"] == self._last_step:
            records = self.read()
            records[-1].update(record)
            self.rewrite(records)
        else:
            self.append(record)
            self._last_step = record["step"]

    def drop_after(self, step: int) -> None:
        """Removes records of later steps: a resumed run does those steps again."""
        super().drop_after(step)
        records = self.read()
        self._last_step = records[-1].get("step") if records else None


def _write_whole(path: Path, text: str) -> Path:
    """Writes beside the file and renames, so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def plain(value: Any) -> Any:
    """The value as JSON can hold it: not a number and infinity become null, paths and the like text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)


def environment() -> dict[str, Any]:
    """Versions, machine, git commit and command: what one needs to run it again and to compare."""
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [_gpu(torch, index) for index in range(torch.cuda.device_count())],
        "git": _git(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}


def _git() -> dict[str, Any] | None:
    """The commit of this source and whether files differ from it; None outside a git checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(here), *arguments]
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
