"""Meters of memory, each named for what it measures. All figures are MiB (2**20 bytes).

On CUDA, per phase: `allocated_peak_mib` and `reserved_peak_mib`, the caching allocator's own peaks, and
`device_in_use_mib`, what the device reports in use at the phase's end, other processes and vLLM included. The first two
are without what a sleeping vLLM has given back, which is `asleep_mib`.

On CPU, per phase: `tensor_peak_mib`, the peak of the bytes of all live tensor storages, and `resident_mib`, the
process's resident memory at the phase's end. PyTorch's CPU allocator keeps no statistics, so the first is counted by
watching every operator's outputs; scratch memory that an operator allocates and frees internally is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memhead.shortage import is_out_of_memory
from recipes.tracking.asleep import Asleep

MIB = 2**20


class Meter(Protocol):
    """Measures one stretch of a run at a time."""

    def begin_step(self, step: int, persistent: Iterable[torch.Tensor]) -> None:
        """A new optimizer step: `step` counts from 0; `persistent` are the tensors that outlive it."""

    def measure(self, figures: dict[str, float]) -> Any:
        """A context that puts the measured MiB into `figures` on exit, by the meter's names.

        Also where memory ran out inside: those until then.
        """


class TensorMeter(TorchDispatchMode):
    """Counts the bytes of live tensor storages while active, and their peak.

    A storage counts once, however many views it has, from the first operator that returns it until it is freed. Frees
    are noticed even while the meter is not active.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, tuple[weakref.ref, int]] = {}  # by address of the storage

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors that already exist."""
        for tensor in tensors:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if isinstance(outputs, torch.Tensor):
            self._see(outputs)
        elif isinstance(outputs, (tuple, list)):
            for output in outputs:
                if isinstance(output, torch.Tensor):
                    self._see(output)
        return outputs

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return
        size = storage.nbytes()
        self._storages[address] = (weakref.ref(storage, lambda _: self._forget(address)), size)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, address: int) -> None:
        entry = self._storages.pop(address, None)
        if entry is not None:
            self.live_bytes -= entry[1]


class CpuMeter:
    """Tensor bytes on chosen steps, resident memory on every step.

    Watching every operator takes time, so it is done on the first two steps, where a run usually shows its peak, and on
    every `every`-th after them, in case lengths grow.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._tensors = TensorMeter()
        self._active = False
        self._process = psutil.Process()

    def begin_step(self, step: int, persistent: Iterable[torch.Tensor]) -> None:
        """Decides whether the step's tensors are counted; weights, gradients, optimizer state count too."""
        self._active = step < 2 or step % self._every == 0
        if self._active:
            self._tensors.watch(persistent)

    @contextmanager
    def measure(self, figures: dict[str, float]) -> Iterator[None]:
        """Puts `tensor_peak_mib` (on chosen steps) and `resident_mib` into `figures`."""
        if self._active:
            self._tensors.peak_bytes = self._tensors.live_bytes
            with _read_at_end(self._peak, figures), self._tensors:
                yield
        else:
            yield
        figures["resident_mib"] = self._process.memory_info().rss / MIB

    def _peak(self, figures: dict[str, float]) -> None:
        figures["tensor_peak_mib"] = self._tensors.peak_bytes / MIB


class CudaMeter:
    """The caching allocator's peaks, reset for each stretch, and what the device has in use at its end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.asleep = Asleep(device)

    def begin_step(self, step: int, persistent: Iterable[torch.Tensor]) -> None:
        """Does nothing: the allocator keeps its own statistics."""

    @contextmanager
    def measure(self, figures: dict[str, float]) -> Iterator[None]:
        """Puts `allocated_peak_mib`, `reserved_peak_mib` and `device_in_use_mib` into `figures`."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self.asleep.begin()
        with _read_at_end(self._read, figures):
            yield

    def _read(self, figures: dict[str, float]) -> None:
        free, total = torch.cuda.mem_get_info(self._device)
        asleep = self.asleep.least
        figures["allocated_peak_mib"] = (torch.cuda.max_memory_allocated(self._device) - asleep) / MIB
        figures["reserved_peak_mib"] = (torch.cuda.max_memory_reserved(self._device) - asleep) / MIB
        figures["device_in_use_mib"] = (total - free) / MIB
        if self.asleep.now:
            figures["asleep_mib"] = self.asleep.now / MIB


@contextmanager
def _read_at_end(read: Callable[[dict[str, float]], None], figures: dict[str, float]) -> Iterator[None]:
    """Other errors than a lack of memory pass untouched: a device that they left broken cannot be asked."""
    try:
        yield
    except BaseException as error:
        if is_out_of_memory(error):
            read(figures)
        raise
    read(figures)


def make_meter(device: torch.device, every: int | None) -> Meter:
    """The meter for the device. `every`: steps between two that count tensors on CPU; None: 10."""
    return CudaMeter(device) if device.type == "cuda" else CpuMeter(every or 10)


def persistent_tensors(model: torch.nn.Module, optimizer: Any) -> Iterator[torch.Tensor]:
    """What lives from step to step: parameters, their gradients, buffers and the optimizer's state."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    state = getattr(optimizer, "state", {})
    for entry in state.values() if isinstance(state, Mapping) else ():
        yield from (value for value in entry.values() if isinstance(value, torch.Tensor))


HEADLINE = {"cuda": "allocated_peak_mib", "cpu": "tensor_peak_mib"}  # the figure that tables and plots show
MEANING = {
    "allocated_peak_mib": "peak of the CUDA allocator",
    "reserved_peak_mib": "peak reserved by the CUDA allocator",
    "device_in_use_mib": "in use on the device, all processes",
    "asleep_mib": "given back by a sleeping vLLM",
    "tensor_peak_mib": "peak of live tensor bytes",
    "resident_mib": "resident memory of the process",
}
