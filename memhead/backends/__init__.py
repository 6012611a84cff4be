"""The same functions twice: ``torch.py`` for every device, ``triton.py`` for GPUs.

The submodules are named after what they use, so this file only imports names from torch, never torch itself.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import device as Device
from torch import dtype as DType
from torch import float64

NAMES = ("torch", "triton")


def get_backend(name: str | None, device: Device, dtype: DType) -> ModuleType:
    """The module that implements ``name``; ``None`` chooses the fastest that runs on ``device``.

    ``dtype`` is that of the logits: float64 is for the torch backend alone.

    Raises:
        ValueError: an unknown name, or "triton" where it is not installed.
    """
    has_triton = find_spec("triton") is not None
    if name is None:
        name = "triton" if device.type in ("cuda", "xpu") and has_triton and dtype != float64 else "torch"
    if name not in NAMES:
        raise ValueError(f"backend={name!r} is not one of {', '.join(NAMES)}")
    if name == "triton" and not has_triton:
        raise ValueError("backend='triton' needs the triton package: pip install triton, or backend='torch'")
    return import_module(f"memhead.backends.{name}")
