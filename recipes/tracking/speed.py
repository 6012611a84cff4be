"""How fast a run is, beside how fast it could be: tokens a second by phase, and the share of the matrix rate.

    generation              sampled tokens; with the prompts' pass
    scoring                 tokens of the passes without gradient
    forward and backward    tokens of the loss pass

The share is the time that the phase's arithmetic (`recipes.plan.work`) would take at the rate of a plain matrix product
on this device, measured once when the run begins, of the time it took.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from recipes.models.precision import Precision
from recipes.plan.rate import matrix_rate
from recipes.plan.work import Flow, Work
from recipes.tracking.run_folder import RunFolder

TRAINING = "forward and backward"
WHOLE = "whole step"
TIMED = {  # phase of the clock -> phase here
    "generation": "generation",
    "scoring": "scoring",
    "forward": TRAINING,
    "backward": TRAINING,
}


def compute_dtype(trainer: Any) -> torch.dtype:
    """In which the trainer's products run."""
    return Precision.of(trainer.args).products or trainer.model.dtype


class Speed:
    """Tokens by phase since the last `take`, and what becomes of them beside the clock's seconds."""

    def __init__(self, trainer: Any, folder: RunFolder) -> None:
        planned = (folder.read_json("plan.json") or {}).get("work")
        self._trainer = trainer
        self._work = None if planned is None else Work(**planned)
        self._rate = None if self._work is None else self._measured_rate()
        self._flows: dict[str, Flow] = defaultdict(Flow)
        self._sampled = 0

    def counter(self, phase: str) -> Callable[..., None] | None:
        """What a phase's method is followed by, with its arguments and its result; None for a phase without tokens."""
        return {"generation": self._generated, "scoring": self._scored, "forward": self._trained}.get(phase)

    def begin(self) -> None:
        """Forgets what was computed before the first step."""
        self._flows.clear()
        self._take_packed("scoring")
        self._flows.clear()

    def _generated(self, result: Any, *_: Any, **__: Any) -> None:
        prompts, completions = result[0], result[1]
        lengths = [len(ids) for ids in completions]
        groups = list(map(hash, map(tuple, prompts)))
        self._sampled += sum(lengths)
        self._flows["generation"] += Flow.of_lengths([len(ids) for ids in prompts], lengths, groups)

    def _scored(self, result: Any, *args: Any, **kwargs: Any) -> None:
        if not self._take_packed("scoring") and result is not None and len(args) > 3:
            self._flows["scoring"] += padded_flow(args[2], args[3])

    def _trained(self, result: Any, *args: Any, **kwargs: Any) -> None:
        if self._take_packed(TRAINING):
            return
        inputs = args[1] if len(args) > 1 else kwargs["inputs"]
        if isinstance(inputs, Mapping) and "completion_mask" in inputs:
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            self._flows[TRAINING] += padded_flow(mask, inputs["completion_mask"].shape[1])

    def _take_packed(self, phase: str) -> bool:
        """A packed step knows what it has computed."""
        take = getattr(self._trainer, "take_flow", None)
        if take is None:
            return False
        self._flows[phase] += take()
        return True

    def take(self, seconds: Mapping[str, float], steps: int) -> dict[str, Any]:
        """A record's `speed`: of each phase its tokens a step, tokens a second and share; then starts again.

        seconds: a step, by the clock's phases. `rate` is the device's, in operations a second. Without a plan of the
        model's sizes there are no shares.
        """
        spent: dict[str, float] = defaultdict(float)
        for phase, value in seconds.items():
            if phase in TIMED:
                spent[TIMED[phase]] += value * steps
        counted = {phase: flow for phase, flow in self._flows.items() if flow.tokens and spent.get(phase)}
        needed = {phase: self._operations(phase, flow) for phase, flow in counted.items()}
        rate = self._rate_above(max((needed[phase] / spent[phase] for phase in counted), default=0.0))
        found: dict[str, Any] = {}
        for phase, flow in counted.items():
            tokens = self._sampled if phase == "generation" else flow.tokens
            found[phase] = {"tokens": tokens / max(steps, 1), "per_second": tokens / spent[phase]}
            if rate:
                found[phase]["share"] = needed[phase] / rate / spent[phase]
        whole = sum(seconds.values()) * steps
        if rate and whole and any(needed.values()):
            found[WHOLE] = {"share": sum(needed.values()) / rate / whole}
            found["rate"] = rate
        self._flows.clear()
        self._sampled = 0
        return found

    def _operations(self, phase: str, flow: Flow) -> float:
        """What a phase cannot do without; 0 where the model's sizes are not known."""
        if self._work is None:
            return 0.0
        return self._work.training(flow) if phase == TRAINING else self._work.forward(flow)

    def _rate_above(self, reached: float) -> float | None:
        """The device's rate; measured again where a phase was faster: the product was timed beside other work."""
        if self._rate is not None and self._rate < reached:
            self._rate = max(self._rate, self._measured_rate())
        return self._rate

    def _measured_rate(self) -> float:
        return matrix_rate(self._trainer.accelerator.device, compute_dtype(self._trainer))


def of_all(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A summary's `speed`: as `Speed.take` gives it, over all steps of the records."""
    tokens, seconds, floors = (
        defaultdict[str, float](float),
        defaultdict[str, float](float),
        defaultdict[str, float](float),
    )
    rate = None
    for record in records:
        speed, steps, time_of = record.get("speed") or {}, record.get("steps", 1), record.get("time") or {}
        rate = speed.get("rate", rate)
        for phase, figures in speed.items():
            if phase == "rate" or (phase != WHOLE and not figures.get("per_second")):
                continue
            spent = (
                steps * sum(time_of.values())
                if phase == WHOLE
                else steps * figures["tokens"] / figures["per_second"]
            )
            seconds[phase] += spent
            tokens[phase] += steps * figures.get("tokens", 0.0)
            floors[phase] += spent * figures.get("share", 0.0)
    found: dict[str, Any] = {}
    total_steps = sum(record.get("steps", 1) for record in records) or 1
    for phase, spent in seconds.items():
        found[phase] = {"share": floors[phase] / spent} if floors[phase] and spent else {}
        if tokens[phase]:
            found[phase] |= {"tokens": tokens[phase] / total_steps, "per_second": tokens[phase] / spent}
    return found | ({} if rate is None else {"rate": rate})


def padded_flow(mask: torch.Tensor, width: int) -> Flow:
    """Of TRL's padded batch, the padding left out and every row with its prompt. mask: (B, P + K), K = width."""
    prompts, completions = mask[:, :-width].sum(1).tolist(), mask[:, -width:].sum(1).tolist()
    return Flow.of_lengths(prompts, completions, list(range(len(prompts))))
