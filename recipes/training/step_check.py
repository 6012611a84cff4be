"""The step's start-up check: one real micro-batch, as the run computes it and by TRL's padded way, on the loaded model.

    the packed step      -> log-probabilities, and the gradients of a few parameters
    TRL, padded          -> the same, with which the packed step is compared, by layers that are not compiled
    TRL, row by row      -> the same, as a yardstick: what padding alone changes in this precision

The packed step may differ from TRL's padded way by three times as much as TRL's single rows do, plus a floor that
depends on the precision.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memhead.shortage import is_out_of_memory
from recipes.models.compiled import plain_layers
from recipes.models.mode import in_training_mode
from recipes.training.packed_support import half_precision
from recipes.training.packing import PaddedBatch

ALLOWANCE = 3.0
FLOOR = {True: 0.05, False: 1e-4}  # by whether it computes in 16 bits; of both errors
PROMPT_TOKENS = 256  # the last ones of a longer prompt
COMPLETIONS = (1, 14, 9)  # tokens of each prompt's completions: few enough to share a row under a dense mask
PARAMETERS = 8
PROMPTS = 2  # that it takes

# Log-probabilities (B, K) and some parameters' gradients in one vector, both float64.
Result = tuple[Tensor, Tensor]


def try_step(trainer: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """:func:`check_step`; of a step that does not run it returns the ``"error"``."""
    try:
        return check_step(trainer, prompts)
    except Exception as error:  # such as of a kernel that does not take this model's heads, or this card
        if is_out_of_memory(error):
            raise
        return {"passed": False, "error": str(error).strip() or type(error).__name__}


def objection(found: dict[str, Any], place: object, way: str = "TRL's padded way") -> str | None:
    """Why the packed step is not to be trusted with this model, or None.

    Args:
        found: by :func:`try_step`.
        place: where the reader finds it.
        way: what the packed step was compared with.
    """
    if found["passed"]:
        return None
    if "error" in found:
        return f"it does not run on this model: {found['error'].splitlines()[0]}"
    return f"it disagrees with {way} on this model; {place} has the figures"


def check_step(trainer: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Compare the two on these prompts' tokens; returns the errors and ``"passed"``, for the run folder.

    Args:
        trainer: as it is before training. Without the packed step it is compiled layers alone that are checked.
        prompts: token ids. Completions are made of their tokens too.
    """
    model = trainer.model
    batch = micro_batch(prompts, trainer.processing_class.pad_token_id, model.device)
    mask = batch.attention_mask[:, batch.prompt_width :]
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(mask.shape, generator=draw).to(model.device) * mask
    parameters = _some([p for p in model.parameters() if p.requires_grad])

    def result(logps_of: Callable[[Any, PaddedBatch], Tensor], part: PaddedBatch, rows: slice) -> Result:
        with trainer.accelerator.autocast():
            logps = logps_of(model, part) * mask[rows, : part.completion_width]
            loss = (logps.float() * weight[rows, : part.completion_width]).sum()
        found = _gradients(trainer, loss, parameters)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        return logps.detach().double(), torch.cat([g.detach().double().flatten() for g in flat])

    with getattr(trainer, "as_in_the_loss", partial(in_training_mode, model))():
        everything = slice(0, len(mask))
        theirs = getattr(trainer, "padded_logps", partial(_trls_logps, trainer))
        packed = result(getattr(trainer, "packed_logps", theirs), batch, everything)
        with plain_layers(model):
            padded = result(theirs, batch, everything)
            rows = range(len(batch.input_ids))
            alone = [result(theirs, _row(batch, i), slice(i, i + 1)) for i in rows]
    logps = torch.zeros_like(padded[0])
    for i, (found, _) in enumerate(alone):
        logps[i, : found.shape[1]] = found[0]
    by_row = logps, torch.stack([gradient for _, gradient in alone]).sum(0)
    ours, yardstick = _errors(packed, padded, mask), _errors(by_row, padded, mask)
    half = half_precision(model, trainer.args)
    allowed = {name: ALLOWANCE * error + FLOOR[half] for name, error in yardstick.items()}
    return {
        "rows": len(mask),
        "tokens": int(batch.attention_mask.sum()),
        "parameters": len(parameters),
        "packed": ours,
        "row_by_row": yardstick,
        "allowed": allowed,
        "passed": all(ours[name] <= allowed[name] for name in ours),  # a NaN is not
    }


def _gradients(trainer: Any, loss: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    """Of these parameters, which have none yet; None of one that the loss does not depend on."""
    if not getattr(trainer, "backward_within", False):
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))
    loss.backward()
    found = [parameter.grad for parameter in parameters]
    trainer.model.zero_grad(set_to_none=True)
    return found


def _trls_logps(trainer: Any, model: Any, batch: PaddedBatch) -> Tensor:
    """(B, K) by the forward of TRL's trainer."""
    logps: Tensor = trainer._get_per_token_logps_and_entropies(
        model, batch.input_ids, batch.attention_mask, batch.completion_width
    )[0]
    return logps


def micro_batch(prompts: list[list[int]], padding: int, device: Any) -> PaddedBatch:
    """Each prompt with completions of three lengths, taken from the prompts' tokens one after another."""
    prompts = [prompt[-PROMPT_TOKENS:] for prompt in prompts]
    source = [token for prompt in reversed(prompts) for token in prompt]
    width, longest = max(map(len, prompts)), max(COMPLETIONS)
    ids, mask, begin = [], [], 0
    for prompt in prompts:
        for length in COMPLETIONS:
            completion = [source[(begin + i) % len(source)] for i in range(length)]
            left, right = width - len(prompt), longest - length
            ids.append([padding] * left + prompt + completion + [padding] * right)
            mask.append([0] * left + [1] * (len(prompt) + length) + [0] * right)
            begin += length
    return PaddedBatch(torch.tensor(ids, device=device), torch.tensor(mask, device=device), longest)


def _row(batch: PaddedBatch, row: int) -> PaddedBatch:
    """One row without its padding."""
    real = batch.attention_mask[row].bool()
    completion = int(real[batch.prompt_width :].sum())
    return PaddedBatch(batch.input_ids[row, real][None], batch.attention_mask[row, real][None], completion)


def _some(parameters: list[Tensor]) -> list[Tensor]:
    """The first, the last, and some in between."""
    count = min(PARAMETERS, len(parameters))
    return [parameters[i * (len(parameters) - 1) // max(1, count - 1)] for i in range(count)]


def _errors(found: Result, expected: Result, mask: Tensor) -> dict[str, float]:
    """The errors of log-probabilities, in nats, as a root mean square, and of the gradient, relative to its norm."""
    difference = (found[0] - expected[0]) * mask
    return {
        "logprob_error": float((difference.square().sum() / mask.sum()).sqrt()),
        "gradient_error": float((found[1] - expected[1]).norm() / expected[1].norm().clamp_min(1e-30)),
    }
