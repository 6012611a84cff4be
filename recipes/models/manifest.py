"""A manifest: every file of a checkpoint, or of a warm start, with its size and sha256, written last.

Nothing is resumed without it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
BASE = "base.json"  # beside an adapter on a warm start's model: the sum of that one's manifest, and so of its files
STATE = "trainer_state.json"
REFERENCE = "reference/model.safetensors"  # where grpo.sync_ref_model moves the reference model
# What each part of a checkpoint is called, by the trainer alone or with DeepSpeed or FSDP.
PARTS = {"optimizer": "optim", "scheduler": "scheduler", "random state": "rng_state", "trainer state": STATE}


def seal(place: Path) -> None:
    """Write the manifest of a folder, and everything through to the disk."""
    files = {}
    for path in _files(place):
        digest = _through_to_disk(path)
        files[str(path.relative_to(place))] = {"size": path.stat().st_size, "sha256": digest}
    (place / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    _through_to_disk(place / MANIFEST)


def condemn(place: Path, reason: str) -> None:
    """Note that the weights in there are of no use, though they are what was written."""
    manifest = _read(place)
    partial = place / f"{MANIFEST}.partial"
    partial.write_text(json.dumps({**manifest, "condemned": reason}, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, place / MANIFEST)


def note_base(place: Path, base: Path) -> None:
    """Note beside an adapter which sealed folder holds its base: another one may come to lie under the same path."""
    noted = {"manifest": _digest(base / MANIFEST)}
    (place / BASE).write_text(json.dumps(noted) + "\n", encoding="utf-8")


def other_base(place: Path, base: Path) -> str:
    """Why a folder is not the one that `note_base` noted beside the adapter in `place`; "" if it is, or nothing is."""
    try:
        noted = json.loads((place / BASE).read_text(encoding="utf-8"))["manifest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        noted = None  # by a version before this one, or somebody else
    if noted is None:
        return ""
    if not (base / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    if noted != _digest(base / MANIFEST):
        return "it is another model: that of another run, or of another start of this one"
    return ""


def damage(place: Path, parts: Mapping[str, str] = PARTS) -> str:
    """Why a folder cannot be resumed from, naming the file; "" if it can. Reads the whole of it.

    parts: what it must have beside the weights, by a word in a file's name.
    """
    if not (place / MANIFEST).is_file():
        return f"{MANIFEST} is missing: it was not written to its end"
    try:
        manifest = _read(place)
        files = {
            str(name): (int(entry["size"]), entry["sha256"]) for name, entry in manifest["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    if "condemned" in manifest:
        return str(manifest["condemned"])
    for part, word in parts.items():
        if not any(word in name for name in files):
            return f"it was written without its {part}"
    for name, (size, digest) in files.items():
        path = place / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, and was written with {size}"
            if _digest(path) != digest:
                return f"{name} is not what was written (another sha256)"
        except OSError as error:  # a bad disk, or a file of another user
            return f"{name} cannot be read ({error.strerror})"
    return _poison(place)


def _poison(place: Path) -> str:
    """Which tensor on the disk is not finite."""
    from safetensors import safe_open

    from recipes.models.finite import first_not_finite

    for path in sorted(place.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:  # one tensor at a time
            name = next((k for k in file.keys() if first_not_finite([(k, file.get_tensor(k))])), None)  # noqa: SIM118
        if name is not None:
            return f"{path.name}: {name} holds NaN or infinity"
    return ""


def _read(place: Path) -> dict[str, Any]:
    return dict(json.loads((place / MANIFEST).read_text(encoding="utf-8")))


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file() and path.name != MANIFEST)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _through_to_disk(path: Path) -> str:
    """The file's sha256, once the disk has it: a rename may otherwise outlive what it names."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
