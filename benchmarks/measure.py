"""Time and memory of functions that are compared with each other."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

Function = Callable[[], Any]


FEW_ROUNDS = 3


def interleaved_seconds(
    functions: Mapping[str, Function], rounds: int, device: torch.device, *, far: float = float("inf")
) -> dict[str, float]:
    """Median seconds of each function; every round runs each once, so that a slow minute slows all of them.

    Each has been called before, so that all are warm. Those that take ``far`` times as long as the fastest, or more,
    sit out after three rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for done in range(rounds):
        medians = {name: statistics.median(values) for name, values in seconds.items() if values}
        for name, function in functions.items():
            if done >= FEW_ROUNDS and medians[name] >= far * min(medians.values()):
                continue
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(function: Function, device: torch.device) -> int:
    """Largest sum of tensor bytes that ``function`` held at one time beyond what existed before it.

    Its results, gradients included, count. On a CPU every allocation of the process's tensor
    allocator is seen, even inside an operator, but not what a BLAS library allocates for itself.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = function()
    del result
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, if it has one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> str:
    """The hardware that a figure belongs to, in one line."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu_name()}, {torch.get_num_threads()} threads, {capability}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions by name; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
