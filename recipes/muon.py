"""Muon for the matrices of a small model, AdamW for everything else, as one optimizer.

Muon (Keller Jordan, 2024) replaces a matrix's momentum by the nearest matrix whose singular values are all alike, so
that rare directions are learnt as fast as common ones. On the quickstart's model it learns from the same examples about
twice as much as AdamW. `torch.optim.Muon` takes matrices one by one and in bfloat16, which is slow on a CPU; here those
of one shape go through the iteration together, in float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the published quintic iteration
ITERATIONS = 5


class MuonAdamW(torch.optim.Optimizer):
    """Two parameter groups, `"muon": True` and `False`; a scheduler scales the learning rates of both.

    matrices: parameters of two dimensions that are neither embeddings nor head. others: all the rest.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        *,
        matrix_learning_rate: float,
        learning_rate: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        common = {"weight_decay": weight_decay}
        super().__init__(
            [
                {
                    "params": list(matrices),
                    "lr": matrix_learning_rate,
                    "muon": True,
                    "momentum": momentum,
                    **common,
                },
                {"params": list(others), "lr": learning_rate, "muon": False, "betas": betas, **common},
            ],
            {},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            wanted = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"]:
                self._muon(wanted, group)
            else:
                self._adamw(wanted, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Nesterov momentum, made orthogonal, scaled to about the root-mean-square of an AdamW update."""
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        for shape, alike in by_shape.items():
            directions = []
            for parameter in alike:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])  # type: ignore[arg-type]
                directions.append(torch.lerp(parameter.grad, state["momentum"], group["momentum"]))  # type: ignore[arg-type]
            updates = orthogonalize(torch.stack(directions))
            rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(alike, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW as published, with bias correction."""
        first, second = group["betas"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            state["mean"].lerp_(parameter.grad, 1 - first)  # type: ignore[arg-type]
            state["square"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)  # type: ignore[arg-type]
            mean = state["mean"] / (1 - first ** state["step"])
            root = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(1e-8)
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(mean, root, value=-group["lr"])


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest matrices with singular values near 1 (0.7 to 1.2); `matrices` is (count, rows, columns)."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT  # (count, r, r), r the shorter side
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def muon_adamw(
    model: nn.Module, *, matrix_learning_rate: float, learning_rate: float, **options: Any
) -> MuonAdamW:
    """For a transformer: Muon for the matrices inside its layers, AdamW for embeddings, head and norms."""
    outside = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside |= {id(p) for p in head.parameters()} if head is not None else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    return MuonAdamW(
        [p for p in trained if p.ndim == 2 and id(p) not in outside],
        [p for p in trained if p.ndim != 2 or id(p) in outside],
        matrix_learning_rate=matrix_learning_rate,
        learning_rate=learning_rate,
        **options,
    )
