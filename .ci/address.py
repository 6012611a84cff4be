"""Writes the repository's address wherever it is published: metadata, badge, notebook, citation, install lines.

    make address ADDRESS=https://github.com/you/memhead

It is kept in pyproject.toml (project.urls); every other place has what stands there and is rewritten with it.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = (
    "pyproject.toml",
    "CITATION.cff",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "memhead/README.md",
    "docs/*.md",
    "notebooks/*.py",
    "notebooks/*.ipynb",
)


def published(root: Path) -> list[Path]:
    """The files that name the address."""
    return [file for pattern in PUBLISHED for file in sorted(root.glob(pattern))]


def slug(root: Path) -> str:
    """owner/name, as pyproject.toml has it."""
    urls = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return urls["Repository"].removeprefix("https://github.com/")


def write(root: Path, address: str) -> list[Path]:
    """Puts the address in the place of the one that is there; the files that changed. Raises ValueError for none."""
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", address)
    if match is None:
        raise ValueError(f"{address!r} is no address such as https://github.com/you/memhead")
    before, changed = slug(root), []
    for file in published(root):
        text = file.read_text(encoding="utf-8")
        if before in text:
            file.write_text(text.replace(before, match[1]), encoding="utf-8")
            changed.append(file)
    return changed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make address ADDRESS=https://github.com/you/memhead")
    try:
        files = write(ROOT, sys.argv[1])
    except ValueError as error:
        sys.exit(f"ADDRESS: {error}")
    print(*(file.relative_to(ROOT) for file in files), sep="\n")
