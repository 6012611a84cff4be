"""Files that are complete at every moment: lines of JSON, and text that is replaced atomically."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

_NEXT_TO_NOTHING = 2**20  # bytes: with less, whatever failed in writing failed by that
# What safetensors and torch.save say of a failed write, without its number: under a quota much may be free.
_OF_WRITING = ("I/O", "inline_container", "PytorchStreamWriter", "iostream error")


class LinesFile:
    """A file with one JSON object per line, each written through to the file system at once."""

    kinds: ClassVar[Mapping[str, Any]] = {}  # of a record's values; a line with another was overwritten

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes = True  # or only reads what another process writes

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line. After Ctrl-C or a crash every line written before is there, whole. Raises CannotWrite."""
        if not self.writes:
            return
        line = (json.dumps(plain(record), ensure_ascii=False) + "\n").encode()
        with naming_what_failed(self.path), self.path.open("ab", buffering=0) as file:
            whole = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    file.truncate(whole)  # half a line would spoil the next one
                raise

    def read(self) -> list[dict[str, Any]]:
        """All records. What cannot be read is left out: `unreadable` has its lines."""
        return [record for record in self._lines() if record is not None]

    def unreadable(self) -> list[int]:
        """The numbers of lines, from 1, that were cut off or overwritten."""
        return [number for number, record in enumerate(self._lines(), 1) if record is None]

    def _lines(self) -> Iterator[dict[str, Any] | None]:
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            if line:
                yield _record(line, self.kinds)

    def rewrite(self, records: list[dict[str, Any]]) -> None:
        """Replaces the file by these records, whole or not at all."""
        if not self.writes:
            return
        lines = [json.dumps(plain(record), ensure_ascii=False) + "\n" for record in records]
        write_whole(self.path, "".join(lines))

    def drop_after(self, step: int) -> None:
        """Removes records of later steps: a resumed run does those steps again."""
        records = self.read()
        kept = [record for record in records if record.get("step", 0) <= step]
        if self.path.is_file():
            self.rewrite(kept)


class CompletionsFile(LinesFile):
    """A sample of what the model wrote, with what it earned."""

    kinds: ClassVar[Mapping[str, Any]] = {
        "step": int,
        "prompt": (str, list),
        "completion": (str, list),
        "rewards": dict,
        "advantage": (int, float),
    }


class MetricsFile(LinesFile):
    """Lines with a `step`, one for each step: a record for the last line's step is merged into it."""

    kinds: ClassVar[Mapping[str, Any]] = {
        "step": int,
        **dict.fromkeys(("loss", "reward", "reward_std", "grad_norm", "learning_rate"), (int, float)),
        **dict.fromkeys(("entropy", "kl", "accuracy", "completion_length", "step_time", "at"), (int, float)),
        **dict.fromkeys(("rewards", "time", "memory", "tokens", "trl", "warm_start"), dict),
    }

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


def write_whole(path: Path, text: str) -> Path:
    """Writes to a file beside it and renames that, so that a reader never sees half of it. Raises CannotWrite."""
    partial = path.with_name(path.name + ".partial")
    with naming_what_failed(path):
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    return path


_MAKE_ROOM = "make room, or move the run to another disk (run.output_root)"
_REMEDIES = {
    errno.ENOENT: "its folder was moved or deleted while the run was at work: put it back",
    errno.EISDIR: "a folder is in its place: move it away",
    errno.ENOTDIR: "a file is in the place of its folder: move it away",
    errno.EEXIST: "a file is in the place of its folder: move it away",
    errno.EACCES: "allow writing there",
    errno.EPERM: "allow writing there",
    errno.EROFS: "its disk takes no writing any more: mount it anew",
    errno.EFBIG: "a file may not be so large (ulimit -f, or the disk's own limit)",
}


class CannotWrite(OSError):
    """A file could not be written; the message says which, why, and what to do."""


@contextmanager
def naming_what_failed(
    place: Path, then: str = "--resume goes on from the last whole checkpoint"
) -> Iterator[None]:
    """Turns what torch, safetensors and the system say of a failed write into one line. Raises CannotWrite.

    then: how to go on once what failed is mended.
    """
    try:
        yield
    except CannotWrite:
        raise
    except Exception as error:  # SafetensorError, RuntimeError of torch.save, OSError
        free = shutil.disk_usage(next(path for path in place.absolute().parents if path.exists())).free
        of_writing = isinstance(error, OSError) or any(words in str(error) for words in _OF_WRITING)
        if not of_writing and free > _NEXT_TO_NOTHING:
            raise
        remedy = _REMEDIES.get(getattr(error, "errno", None) or 0, _MAKE_ROOM)
        raise CannotWrite(
            f"{place} could not be written, {free / 2**20:,.1f} MiB are free there: {error}; {remedy}; {then}"
        ) from error


def _record(line: str, kinds: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    right = all(record[key] is None or isinstance(record[key], kinds[key]) for key in kinds.keys() & record)
    if right and isinstance(rewards := record.get("rewards"), dict):
        right = all(value is None or isinstance(value, (int, float)) for value in rewards.values())
    return record if right and record.get("step", 0) is not None else None


def plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinity become null, paths and the like text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)  # of torch or numpy
