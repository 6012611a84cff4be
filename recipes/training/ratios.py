"""How far the trainer's probabilities are from those that sampled, and why.

    ratio histograms    of every logged step, before anything is clipped
    mismatch            with vLLM, at the first rollout and every `tracking.mismatch_every` steps: of each token's
                        log p(trainer) - log p(vLLM) the part that comes from rounding the head's logits to vLLM's
                        dtype, found by scoring the trainer's own hidden states with such a head, and the rest

The parts of the squared difference add up: sum(head · all) / sum(all²) is the head's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memhead.integrations.trl import installed
from recipes.tracking.ratios import EDGES, KINDS, as_metrics
from recipes.tracking.speed import compute_dtype

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Trainer
else:
    _Trainer = object

_ROWS = 1024  # of rounded logits, held at a time
_PARTS = 6  # sums of `RatioMeter.add_mismatch`


@dataclass
class RatioMeter:
    """Counts of a step, on the device; and when to look at the mismatch again."""

    every: int | None = None
    due: bool = False
    _next: int = 0
    _counts: dict[str, Tensor] = field(default_factory=dict)
    _mismatch: list[Tensor] = field(default_factory=list)

    def begin_rollout(self, step: int) -> None:
        """Decide whether this rollout's mismatch is taken apart."""
        self.due = self.every is not None and step >= self._next
        if self.due and self.every is not None:
            self._next = step + self.every

    def add(self, kind: str, log_ratio: Tensor) -> None:
        """Tokens of any shape; NaN, where the sampler told nothing, is left out."""
        known = log_ratio[~log_ratio.isnan()].detach().float().exp()
        edges = torch.tensor(EDGES, device=known.device)
        found = torch.bucketize(known, edges).bincount(minlength=len(EDGES) + 1)
        self._counts[kind] = self._counts[kind] + found if kind in self._counts else found

    def add_mismatch(self, whole: Tensor, head: Tensor) -> None:
        """Of the same tokens, (N,): log p(trainer) - log p(vLLM), and the part of it that a rounded head explains."""
        known = ~whole.isnan()
        whole, head = whole[known].double(), head[known].double()
        rest = whole - head
        parts = (torch.ones_like(whole), whole.abs(), head.abs(), rest.abs(), whole * whole, whole * head)
        self._mismatch.append(torch.stack([part.sum() for part in parts]))

    def take(self, accelerator: Any) -> dict[str, float]:
        """The metrics since the last call, over all processes; then it starts again.

        Every process has to call it, whatever it has counted: the sums travel as one tensor.
        """
        device, bins = accelerator.device, len(EDGES) + 1
        nothing = torch.zeros(bins, device=device, dtype=torch.double)
        counts = [self._counts.get(kind, nothing).double() for kind in KINDS]
        parts = torch.stack([torch.zeros(_PARTS, device=device, dtype=torch.double), *self._mismatch]).sum(0)
        self._counts.clear()
        self._mismatch.clear()
        sums = accelerator.reduce(torch.cat([*counts, parts]), "sum").tolist()
        found: dict[str, float] = {}
        for number, kind in enumerate(KINDS):
            of_kind = sums[number * bins : (number + 1) * bins]
            if total := sum(of_kind):
                found |= as_metrics(kind, [count / total for count in of_kind])
        tokens, whole_abs, head_abs, rest_abs, squares, shared = sums[-_PARTS:]
        if tokens:
            found |= {
                "mismatch/tokens": tokens,
                "mismatch/mean": whole_abs / tokens,
                "mismatch/head": head_abs / tokens,
                "mismatch/rest": rest_abs / tokens,
                "mismatch/head_share": shared / squares if squares else 0.0,
            }
        return found


@torch.no_grad()
def rounded_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    dtype: torch.dtype,
    *,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """(N,) float32, by a head whose operands and logits are in `dtype`, as an engine's are."""
    found = []
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = weight.to(dtype)
        for start in range(0, len(hidden), _ROWS):
            rows = slice(start, start + _ROWS)
            logits = hidden[rows].to(dtype) @ matrix.T  # (R, V)
            logits = (logits if bias is None else logits + bias.to(dtype)).float() * logit_scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits /= temperature
            found.append(logits.gather(1, targets[rows, None])[:, 0] - logits.logsumexp(1))
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


class RoundedHead:
    """Listens to the installed head and scores the same rows once more, call by call."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.found: list[Tensor] = []

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, **scaling: Any) -> None:
        """What the head was given; of a quantised one nothing is found."""
        if not weight.is_floating_point():
            return
        self.found.append(rounded_logprobs(hidden, weight, bias, targets, self._dtype, **scaling))


@contextmanager
def listening(listener: RoundedHead | None) -> Iterator[None]:
    """While it lasts, the installed head tells the listener what it is given."""
    handle = installed()
    if handle is None or listener is None:
        yield
        return
    handle.listener = listener
    try:
        yield
    finally:
        handle.listener = None


def sampler_dtype(trainer: Any) -> torch.dtype:
    """In which the trainer's vLLM computes: told by an engine in this process, else the trainer's own."""
    llm = getattr(trainer.vllm_generation, "llm", None)
    if llm is not None:
        return llm.llm_engine.model_config.dtype
    return compute_dtype(trainer)


def measured(trainer_class: type, every: int | None) -> type:
    """TRL's trainer that logs these figures; a packed step put before it does so by itself."""
    return type(
        f"Measured{trainer_class.__name__}", (MeasuredRatios, trainer_class), {"mismatch_every": every}
    )


class MeasuredRatios(_Trainer):
    """To be put before TRL's trainer, and before its supports."""

    mismatch_every: int | None
    _rounded_head: RoundedHead | None = None
    _new: Tensor | None = None  # log-probabilities of the loss in hand

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ratios = RatioMeter(self.mismatch_every)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        corrected = self.use_vllm and self.vllm_importance_sampling_correction and self.model.training
        if corrected:
            self._ratios.begin_rollout(self.state.global_step)
            whole_vocabulary = getattr(self, "truncation", None) is None
            if self._ratios.due and whole_vocabulary:
                self._rounded_head = RoundedHead(sampler_dtype(self))
        listener = self._rounded_head
        try:
            tensors = super()._generate_and_score_completions(inputs)
        finally:
            self._rounded_head = None
        if corrected and tensors.get("old_per_token_logps") is not None:
            mask = tensors["completion_mask"].bool()
            old, sampled = (
                tensors[name][mask] for name in ("old_per_token_logps", "sampling_per_token_logps")
            )
            self._ratios.add("sampler", old - sampled)
            if listener is not None and listener.found:
                self._ratios.add_mismatch(old - sampled, old - torch.cat(listener.found))
        return tensors

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        listener, self._rounded_head = self._rounded_head, None  # the old policy's pass is the first
        with listening(listener):
            found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._new = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        self._new = None
        loss = super()._compute_loss(model, inputs)
        if self._new is not None and self.model.training:
            old = inputs.get("old_per_token_logps")
            mask = inputs["completion_mask"].bool()
            self._ratios.add("policy", (self._new - (self._new if old is None else old))[mask])
            if self.accelerator.sync_gradients:
                for name, value in self._ratios.take(self.accelerator).items():
                    self._metrics["train"][name].append(value)
        self._new = None
        return loss
