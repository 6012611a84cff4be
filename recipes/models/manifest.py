"""A manifest: every file of a folder that a run leaves a model in, with its size and sha256, written last.

seal(place)        when a checkpoint, warm_start/, final/, interrupted/ or merged/ is written
damage(place)      why it cannot be gone on from: nothing is resumed without a manifest
altered(place)     why its model is not the one that was written: what has no manifest is loaded as it is

All is read, however large: a sha256 takes a second for 1.2 to 1.5 GB (2 GiB in the page cache, a thread of an EPYC with
SHA extensions), so the 16 GB of an 8B model some 10 to 14, and what was read the loader need not fetch from the disk
again. A size alone would not tell one adapter from another. Sizes come first: a file that was cut is told at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
BASE = "base.json"  # beside what was made of a sealed model: the sum of that one's manifest, so of its files
STATE = "trainer_state.json"
REFERENCE = "reference/model.safetensors"  # where grpo.sync_ref_model moves the reference model
# What each part of a checkpoint is called, by the trainer alone or with DeepSpeed or FSDP.
PARTS = {"optimizer": "optim", "scheduler": "scheduler", "random state": "rng_state", "trainer state": STATE}
_CARD = "README.md"  # people write into it, and no number comes of it
# What decides a loaded model's numbers; the rest of a checkpoint is what its trainer goes on with.
_LOADED = (
    "model*.safetensors*",
    "pytorch_model.bin*",
    "pytorch_model-*.bin",
    "adapter_model*",
    "config.json",
    "*_config.json",  # the adapter's, the tokenizer's, and which tokens end a completion
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    BASE,
)
# Loaders take these first, whatever other weights lie there.
_TAKEN_FIRST = ("adapter_config.json", "adapter_model.safetensors", "model.safetensors")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

_Entries = dict[str, tuple[int, str]]  # by a file's name its size and sha256


def seal(place: Path) -> None:
    """Write the manifest of a folder, and everything through to the disk."""
    files = {}
    for path in _files(place):
        digest = _through_to_disk(path)
        files[str(path.relative_to(place))] = {"size": path.stat().st_size, "sha256": digest}
    _write(place, {"files": files})


def condemn(place: Path, reason: str) -> None:
    """Note that the weights in there are of no use, though they are what was written."""
    _write(place, {**_read(place), "condemned": reason})


def _write(place: Path, manifest: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = place / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _through_to_disk(partial)
    os.replace(partial, place / MANIFEST)


def note_base(place: Path, base: Path) -> None:
    """Note which sealed folder an adapter lies on or a merged model is of: another may come to lie under its path."""
    noted = {"manifest": _digest(base / MANIFEST)}
    (place / BASE).write_text(json.dumps(noted) + "\n", encoding="utf-8")


def other_base(place: Path, base: Path) -> str:
    """Why a folder is not the one that `note_base` noted in `place`; "" if it is, or nothing is noted."""
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

    parts: what it must have beside the weights, by a word in a file's name. Its model card may be another.
    """
    if not (place / MANIFEST).is_file():
        return f"{MANIFEST} is missing: it was not written to its end"
    try:
        manifest = _read(place)
        files = _entries(manifest)
    except _UNREADABLE:
        return f"{MANIFEST} cannot be read"
    if "condemned" in manifest:
        return str(manifest["condemned"])
    for part, word in parts.items():
        if not any(word in name for name in files):
            return f"it was written without its {part}"
    return _difference(place, files) or _poison(place)


def altered(place: Path) -> str:
    """Why a folder's model is not the one that was sealed in it, naming the file; "" if it is, or nothing was sealed.

    Looked at is what decides the numbers: weights, configurations and tokenizer (`_LOADED`). An optimizer that was
    removed, a model card that was written anew and what was put beside change nothing, unless it is weights that would
    be taken in the place of the sealed ones. A folder that `condemn` condemned is still what was written.
    """
    if not (place / MANIFEST).is_file():
        return ""
    try:
        files = {name: entry for name, entry in _entries(_read(place)).items() if _is_loaded(name)}
    except _UNREADABLE:
        return f"{MANIFEST} cannot be read"
    added = next((name for name in _TAKEN_FIRST if name not in files and (place / name).exists()), None)
    return f"{added} was put there afterwards" if added else _difference(place, files)


def _is_loaded(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _LOADED)


def _entries(manifest: dict[str, Any]) -> _Entries:
    files = manifest["files"].items()
    return {str(name): (int(entry["size"]), entry["sha256"]) for name, entry in files if name != _CARD}


def _difference(place: Path, files: _Entries) -> str:
    """The first file that is not as its entry says, and how; "" without one."""
    for look in (_other_size, _other_digest):
        for name, (size, digest) in files.items():
            try:
                found = look(place / name, size, digest)
            except OSError as error:  # a bad disk, or a file of another user
                found = f"cannot be read ({error.strerror})"
            if found:
                return f"{name} {found}"
    return ""


def _other_size(path: Path, size: int, digest: str) -> str:
    if not path.is_file():
        return "is missing"
    there = path.stat().st_size
    return "" if there == size else f"has {there} bytes, and was written with {size}"


def _other_digest(path: Path, size: int, digest: str) -> str:
    return "" if _digest(path) == digest else "is not what was written (another sha256)"


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
    return sorted(path for path in place.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _through_to_disk(path: Path) -> str:
    """The file's sha256, once the disk has it: a rename may otherwise outlive what it names."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
