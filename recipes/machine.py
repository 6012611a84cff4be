"""What this machine has, by the standard library alone: asked before anything is installed.

for card in cards(): print(card, too_old(card.driver, "13.0"))
missing("requirements-cuda.lock")       the lines of a lock that are not installed in that version
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

GIB = 2**30
# The least driver of a CUDA version, by NVIDIA's table of compatibility (CUDA toolkit release notes, table 2).
LEAST_DRIVER = {13: 580, 12: 525, 11: 450}


@dataclass(frozen=True)
class Card:
    """A GPU as nvidia-smi tells it."""

    name: str
    driver: str
    memory_gib: float

    def __str__(self) -> str:
        return f"{self.name}, {self.memory_gib:.1f} GiB, driver {self.driver}"


def cards() -> list[Card]:
    """The NVIDIA GPUs here; none where nvidia-smi is missing or fails."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.count(",") == 2]
    return [Card(name, driver, float(mib) / 1024) for name, driver, mib in rows if mib.isdecimal()]


def too_old(driver: str, cuda: str) -> str:
    """Why the driver cannot run software built for this CUDA version; "" where it can, or where that is not known."""
    least = LEAST_DRIVER.get(int(cuda.partition(".")[0]), 0)
    major = driver.partition(".")[0]
    if not major.isdecimal() or int(major) >= least:
        return ""
    return f"the driver {driver} is too old for CUDA {cuda}, which needs {least} or newer"


def missing(lock: str | Path) -> list[str]:
    """The packages of a lock that are not installed in its version, as the lock writes them."""
    lines = Path(lock).read_text(encoding="utf-8").splitlines()
    pinned = [match for line in lines if (match := re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line))]
    return [f"{name}=={version}" for name, version in (m.groups() for m in pinned) if not _has(name, version)]


def _has(name: str, version: str) -> bool:
    try:
        return metadata.version(name).partition("+")[0] == version  # torch's build stands behind the plus
    except metadata.PackageNotFoundError:
        return False


def room(place: str | Path = ".") -> str:
    """Free disk at a place and main memory, in words."""
    free = shutil.disk_usage(place).free / GIB
    try:
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB of main memory"
    except (AttributeError, OSError, ValueError):  # not of every system
        memory = "main memory unknown"
    return f"{free:.1f} GiB of disk free, {memory}"


def why_no_gpu(torch_cuda: str | None) -> str:
    """Why torch finds no GPU here. torch_cuda: `torch.version.cuda`, None for a torch of the CPU."""
    found = cards()
    if not found:
        return "there is none"
    if torch_cuda is None:
        return f"this torch is for the CPU, beside {found[0]}"
    return too_old(found[0].driver, torch_cuda) or f"torch does not reach the {found[0]}"
