"""The start-up check: the head against full logits in float64, on a handful of real rows of the loaded model.

    hidden states and weight of the model -> log-probabilities and d(sum)/d(hidden) by memhead
                                          -> the same by full logits in float64
                                          -> the same by full logits in the run's own precision, as a yardstick

memhead's error may be three times that of the plain computation in the same precision, plus 1e-5.

The rows tell one thing more: a model that finds its own prompts far less likely than a guess would has weights that are
finite, and far too large. Such a run is not stopped; a sentence says it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memhead import linear_logprobs
from memhead.integrations.transformers import head_options
from memhead.reference import full_logprobs
from recipes.models.adapters import without_adapters
from recipes.models.generation import NO_CHAT, encode
from recipes.models.mode import in_evaluation_mode
from recipes.models.precision import AS_WEIGHTS, Precision
from recipes.processes import by_main
from recipes.tracking.phases import in_phase
from recipes.training.session import RunError, Session

ALLOWANCE, FLOOR = 3.0, 1e-5
LOST = 10.0  # times log(vocabulary), which is what a guess costs a token; a trained model may well cost twice that

# Log-probabilities (N,) and their gradient with respect to hidden (N, H), both float64.
Result = tuple[Tensor, Tensor]


@in_phase("the check of the head")
def require_exact_head(session: Session) -> None:
    """Check the session's head, keep the figures as head_check.json. Raises RunError if they are too far off.

    Does nothing where `run.checks` is off.
    """
    config = session.config
    if not config.run.checks:
        return
    found = by_main(
        lambda: check_head(
            session.model,
            session.tokenizer,
            session.task.held_out[:4]["prompt"],  # or as many as there are
            temperature=config.grpo["temperature"],
            chunk=config.head.chunk,
            backend=config.head.backend,
            chat=config.chat_template_kwargs,
            precision=session.precision,
        )
    )
    path = session.folder.write_json("head_check.json", found)
    if not found["passed"]:
        raise RunError(f"memhead disagrees with full logits in float64 on this model; {path} has the figures")
    if sentence := lost(found):
        print(sentence, flush=True)


def lost(found: Mapping[str, Any]) -> str:
    """What to say of a model whose weights seem far too large, by `check_head`'s figures; "" of others."""
    guess = math.log(found["vocabulary"])
    if found["prompt_nats"] <= LOST * guess:
        return ""
    return (
        f"The model gives its own prompts {found['prompt_nats']:.0f} nats a token, where guessing among "
        f"{found['vocabulary']} costs {guess:.1f}: its weights are finite, but look far too large (a wrong scale or "
        "dtype, or a training that diverged); nothing may be learned from them"
    )


def check_head(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    backend: str | None = None,
    rows: int = 64,
    chat: Mapping[str, Any] = NO_CHAT,
    precision: Precision = AS_WEIGHTS,
) -> dict[str, Any]:
    """Compare on the first `rows` tokens of `prompts`; returns the errors and `"passed"`, for the run folder.

    chat: what the chat template is told beside the messages. precision: that of the run.
    """
    batch = encode(tokenizer, prompts, chat).to(model.device)
    with precision.autocast(model.device):
        hidden, targets = _real_rows(model, batch, rows)
    head, scaling = model.get_output_embeddings(), head_options(model.config)
    weight, bias = head.weight.detach(), getattr(head, "bias", None)
    options: dict[str, Any] = {
        "bias": None if bias is None else bias.detach(),
        "temperature": temperature,
        "softcap": scaling.softcap,
        "logit_scale": scaling.logit_scale,
    }

    def memhead(h: Tensor) -> Tensor:
        with precision.autocast(h.device):
            return linear_logprobs(h, weight, targets, chunk=chunk, backend=backend, **options).logprobs

    def plain(h: Tensor) -> Tensor:
        with precision.autocast(h.device):
            return full_logprobs(h, weight, targets, widen=False, **options).logprobs

    def exact(h: Tensor) -> Tensor:
        return full_logprobs(h, weight, targets, dtype=torch.float64, **options).logprobs

    truth = _run(exact, hidden.double())
    ours, theirs = _errors(_run(memhead, hidden), truth), _errors(_run(plain, hidden), truth)
    return {
        "rows": len(targets),
        "vocabulary": weight.shape[0],
        "hidden_size": weight.shape[1],
        "dtype": str(weight.dtype).removeprefix("torch."),
        "precision": precision.describe(model),
        **{name: value for name, value in options.items() if name != "bias"},
        "memhead": ours,
        "full_logits": theirs,
        "prompt_nats": float(-_plainly(hidden, weight, targets, options).mean()),
        "allowed": {name: ALLOWANCE * error + FLOOR for name, error in theirs.items()},
        "passed": all(ours[name] <= ALLOWANCE * theirs[name] + FLOOR for name in ours),
    }


@torch.no_grad()
def _plainly(hidden: Tensor, weight: Tensor, targets: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Log-probabilities in float64 (N,), at temperature 1."""
    plain = {**options, "temperature": 1.0}
    return full_logprobs(hidden.double(), weight, targets, dtype=torch.float64, **plain).logprobs


@torch.no_grad()
def _real_rows(model: PreTrainedModel, batch: Any, rows: int) -> tuple[Tensor, Tensor]:
    """What the head receives, (N, H), and the tokens that follow, (N,), for up to `rows` tokens without padding."""
    with in_evaluation_mode(model):
        # The model without its head: Unsloth's forward multiplies with the weight and never calls the module.
        hidden = without_adapters(model).base_model(**batch).last_hidden_state
    real = (batch["attention_mask"][:, :-1] * batch["attention_mask"][:, 1:]).bool()
    hidden = hidden.to(model.get_output_embeddings().weight.dtype)
    return hidden[:, :-1][real][:rows], batch["input_ids"][:, 1:][real][:rows]


def _run(logprobs: Callable[[Tensor], Tensor], hidden: Tensor) -> Result:
    """Log-probabilities and the gradient of their sum."""
    leaf = hidden.detach().clone().requires_grad_()
    values = logprobs(leaf)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach().double(), gradient.double()


def _errors(found: Result, exact: Result) -> dict[str, float]:
    """The largest absolute error of a log-probability, and the gradient's error relative to its norm."""
    return {
        "logprob_error": float((found[0] - exact[0]).abs().max()),
        "gradient_error": float((found[1] - exact[1]).norm() / exact[1].norm().clamp_min(1e-30)),
    }
