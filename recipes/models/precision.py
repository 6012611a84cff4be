"""The one precision of a run: warm start, scoring, loss, every evaluation and the head's check compute in it.

TRL wraps the model in autocast when training begins. Whatever ran before then, or beside the trainer, would compute in
the weights' own dtype, and that alone can change an accuracy (docs/benchmarks.md has a case). So everything that calls
the model does it inside `Precision.autocast`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from recipes.processes import spread

if TYPE_CHECKING:
    from recipes.config.load import RunConfig


@dataclass(frozen=True)
class Precision:
    """The dtype in which products run; None: the weights' dtype, without autocast."""

    products: torch.dtype | None = None

    @classmethod
    def of(cls, arguments: Any) -> Precision:
        """The trainer's precision, from its GRPOConfig (`bf16`, `fp16`)."""
        if arguments.bf16:
            return cls(torch.bfloat16)
        return cls(torch.float16 if arguments.fp16 else None)

    def autocast(self, device: torch.device | str) -> AbstractContextManager[Any]:
        """The context in which the model is called. Inside the trainer's own autocast it changes nothing."""
        if self.products is None:
            return nullcontext()
        return torch.autocast(torch.device(device).type, dtype=self.products)

    def describe(self, model: Any) -> dict[str, str]:
        """In words for environment.json and the report: the weights' dtypes, the products', the logits'."""
        trained = sorted({_name(p.dtype) for p in model.parameters() if p.requires_grad})
        frozen = sorted({_name(p.dtype) for p in model.parameters() if not p.requires_grad})
        return {
            "trained_weights": ", ".join(trained) or "none",
            "frozen_weights": ", ".join(frozen) or "none",
            "products": _name(self.products) if self.products is not None else "as the weights",
            "logits": "float32",
        }


AS_WEIGHTS = Precision()
_HALVES = (torch.bfloat16, torch.float16)


def rounded_away(config: RunConfig, model: Any) -> str:
    """A sentence where a full fine-tuning's own weights are in half precision, which keeps few of its updates; or "".

    DeepSpeed keeps float32 ones beside them; adapters are small, begin at 0 and have a rate ten times as high.
    """
    halves = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype in _HALVES}
    if config.lora is not None or not halves or spread() == "DeepSpeed":
        return ""
    dtype = min(halves, key=str)
    coarse = f"{torch.finfo(dtype).eps / 2:.1g}"
    return (
        f"model.dtype: the weights that are trained are {_name(dtype)}, which rounds to {coarse} of each; an update "
        f"of AdamW is about grpo.learning_rate, {config.grpo['learning_rate']:g}, so that most change nothing. "
        "model.dtype=auto trains in float32, at four bytes a weight; adapters (lora) need neither"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
