"""One run folder, one process."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from pathlib import Path
from typing import IO, Any

LOCK = ".lock"


def lock(folder: Path) -> IO[str]:
    """Holds the folder until the file that is returned is closed, or the process dies of anything.

    Raises BlockingIOError, naming the process that holds it. A POSIX record lock: children do not inherit it, so that
    what a killed run leaves behind cannot hold its folder, and network file systems know it.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = _holder(file)
        file.close()
        raise BlockingIOError(
            f"{folder} is in use by process {holder.get('pid', '?')} on {holder.get('host', 'some host')}, since "
            f"{holder.get('since', 'some time')}; wait for it to end, or stop it with: kill {holder.get('pid', 'PID')}"
        ) from None
    file.seek(0)
    file.truncate()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    json.dump({"pid": os.getpid(), "host": platform.node(), "since": since}, file)
    file.flush()
    return file


def _holder(file: IO[str]) -> dict[str, Any]:
    """What the process that holds the lock says of itself; {} where it has not written it yet."""
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except (ValueError, TypeError, RecursionError):
        return {}
