"""The start-up check: the head against full logits in float64, on a handful of real rows of the loaded model.

    hidden states and weight of the model -> log-probabilities and d(sum)/d(hidden) by memhead
                                          -> the same by full logits in float64
                                          -> the same by full logits in the model's own precision, as a yardstick

memhead may be off by three times what the plain computation in the same precision is off, plus 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memhead import linear_logprobs
from recipes.models.generation import NO_CHAT, encode

ALLOWANCE, FLOOR = 3.0, 1e-5

Result = tuple[
    Tensor, Tensor
]  # log-probabilities (N,) and their gradient with respect to hidden (N, H), float64


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
) -> dict[str, Any]:
    """Compare on the first `rows` tokens of `prompts`; returns the errors and `"passed"`, for the run folder.

    chat: what the chat template is told beside the messages.
    """
    hidden, targets = _real_rows(model, encode(tokenizer, prompts, chat).to(model.device), rows)
    head = model.get_output_embeddings()
    weight, bias = head.weight.detach(), getattr(head, "bias", None)
    options: dict[str, Any] = {"temperature": temperature, **_scaling(model.config)}

    def memhead(h: Tensor) -> Tensor:
        return linear_logprobs(
            h, weight, targets, bias=bias, chunk=chunk, backend=backend, **options
        ).logprobs

    def plain(h: Tensor) -> Tensor:
        return _full(h, weight, bias, targets, **options)

    exact = _run(lambda h: _full(h, weight.double(), _double(bias), targets, **options), hidden.double())
    ours, theirs = _errors(_run(memhead, hidden), exact), _errors(_run(plain, hidden), exact)
    return {
        "rows": len(targets),
        "vocabulary": weight.shape[0],
        "hidden_size": weight.shape[1],
        "dtype": str(weight.dtype).removeprefix("torch."),
        **options,
        "memhead": ours,
        "full_logits": theirs,
        "allowed": {name: ALLOWANCE * error + FLOOR for name, error in theirs.items()},
        "passed": all(ours[name] <= ALLOWANCE * theirs[name] + FLOOR for name in ours),
    }


@torch.no_grad()
def _real_rows(model: PreTrainedModel, batch: Any, rows: int) -> tuple[Tensor, Tensor]:
    """What the head receives, (N, H), and the tokens that follow, (N,), for at most `rows` tokens without padding."""
    was_training = model.training
    model.eval()
    try:  # the model without its head: Unsloth's forward multiplies with the weight and never calls the module
        hidden = getattr(model, "get_base_model", lambda: model)().base_model(**batch).last_hidden_state
    finally:
        model.train(was_training)
    real = (batch["attention_mask"][:, :-1] * batch["attention_mask"][:, 1:]).bool()
    hidden = hidden.to(model.get_output_embeddings().weight.dtype)
    return hidden[:, :-1][real][:rows], batch["input_ids"][:, 1:][real][:rows]


def _scaling(config: Any) -> dict[str, float]:
    """What stands between product and softmax in some models: Gemma's softcap, Cohere's and Granite's scale."""
    found: dict[str, float] = {}
    if softcap := getattr(config, "final_logit_softcapping", None):
        found["softcap"] = float(softcap)
    if scale := getattr(config, "logit_scale", None):
        found["logit_scale"] = float(scale)
    elif divisor := getattr(config, "logits_scaling", None):
        found["logit_scale"] = 1.0 / float(divisor)
    return found


def _full(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Log-probabilities (N,) by the whole matrix of logits (N, V), in the dtype of its inputs."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _run(logprobs: Callable[[Tensor], Tensor], hidden: Tensor) -> Result:
    """Log-probabilities and the gradient of their sum."""
    leaf = hidden.detach().clone().requires_grad_()
    values = logprobs(leaf)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach().double(), gradient.double()


def _errors(found: Result, exact: Result) -> dict[str, float]:
    """The largest absolute error of a log-probability, and the gradient's error in proportion to its norm."""
    return {
        "logprob_error": float((found[0] - exact[0]).abs().max()),
        "gradient_error": float((found[1] - exact[1]).norm() / exact[1].norm().clamp_min(1e-30)),
    }


def _double(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().double()
