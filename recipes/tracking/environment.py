"""Versions, machine, commit and command of a session: what its environment.json says."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from recipes.table import Table

PACKAGES = (
    "torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "safetensors", "numpy",
    "unsloth", "unsloth_zoo", "vllm", "bitsandbytes", "triton",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, machine, git commit and command: what it takes to repeat a run and to compare it."""
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))}
        | {"torch": str(torch.__version__)},  # which names its CUDA, as a package's version need not
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [_gpu(torch, index) for index in range(torch.cuda.device_count())],
        "git": _git(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def device_name() -> str:
    """The device that a run here takes, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(int(os.environ.get("LOCAL_RANK", "0")))
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'s' * (threads != 1)}"


def environment_table(found: dict[str, Any]) -> Table:
    """environment.json as a table: machine, versions, commit, command. Of an empty one it says so."""
    if not found:
        rows = [("machine", "not known: environment.json is missing or damaged")]
        return Table(("where it ran", ""), rows, numbers=False)
    packages = ", ".join(f"{name} {version}" for name, version in found.get("packages", {}).items())
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in found.get("gpus", [])) or "none"
    git = found.get("git") or {}
    machine = f"{found.get('cpu')}, {found.get('cores')} cores, {found.get('memory_gib')} GiB; GPU: {gpus}"
    rows = [
        ("machine", machine),
        ("versions", f"Python {found.get('python')}, {packages}"),
        ("commit", git.get("commit", "unknown") + (" with changes" if git.get("modified") else "")),
        ("command", shlex.join(found.get("command", []))),
    ]
    return Table(("where it ran", ""), rows, numbers=False)


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
