"""Files that are complete at every moment: lines of JSON, and text that is replaced atomically."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class LinesFile:
    """A file with one JSON object per line, each written through to the file system at once."""

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
        write_whole(self.path, "".join(lines))

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


def write_whole(path: Path, text: str) -> Path:
    """Writes to a file beside it and renames that, so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


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
    return plain(value.item()) if hasattr(value, "item") else str(value)
