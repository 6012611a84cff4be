"""A copy of the tree to make mistakes in."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "memhead",
    "recipes",
    "tests",
    "configs",
    "docs",
    "benchmarks",
    "train_grpo.py",
    "pyproject.toml",
    "README.md",
)


def copy_tree(place: Path) -> None:
    """What git knows and what it would take, as it is now; all but caches where there is no git."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        found = [path for part in PARTS for path in (ROOT / part, *(ROOT / part).rglob("*"))]
        names = [str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts]
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
