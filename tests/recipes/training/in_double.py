"""Everything in float64: models that drop to float32 for norms, softmax and rotations do not."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """Puts float64 wherever torch is asked for float32."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called some hundred thousand times a test, mostly to look at a shape."""
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        for a in args:
            if a is torch.float32:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                break
        if not kwargs:
            return function(*args)
        return function(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()})
