"""The load-balancing loss of mixture-of-experts models, which their own forward adds to the loss of the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor


def wants_router_loss(model: Any, given: dict[str, Any]) -> bool:
    """Whether the model's own forward, with the arguments ``given`` by name, adds that loss.

    Raises:
        ValueError: the call asks for it and the config does not, so that it was never compared.
    """
    if _function(model) is None:
        return False
    in_config = bool(getattr(model.config, "output_router_logits", False))
    asked = given.get("output_router_logits")
    if asked is None:
        parameter = inspect.signature(type(model).forward).parameters.get("output_router_logits")
        return in_config and parameter is not None and parameter.default is None
    if asked and not in_config:
        raise ValueError(
            "output_router_logits=True asks for a load-balancing loss that the model's config does not; set "
            "config.output_router_logits=True before patch(model), which then compares it with the model's own"
        )
    return bool(asked)


def router_loss(
    model: Any, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What is added to the loss, and the auxiliary loss without its coefficient.

    Args:
        model: one that :func:`wants_router_loss`.
        router_logits: of each layer (tokens, experts).
        attention_mask: (batch, length); padding is not counted.

    Raises:
        ValueError: the model does not say how many experts it has, or how much this loss counts.
    """
    function = _function(model)
    assert function is not None
    aux_loss = function(
        router_logits,
        _setting(model, "num_experts"),
        _setting(model, "num_experts_per_tok"),
        attention_mask,
    )
    return _setting(model, "router_aux_loss_coef", "aux_loss_coef") * aux_loss, aux_loss


def _function(model: Any) -> Callable[..., Tensor] | None:
    """The function that the model's own forward looks up: every architecture has its own copy."""
    forward = inspect.unwrap(type(model).forward)
    return getattr(forward, "__globals__", {}).get("load_balancing_loss_func")


def _setting(model: Any, *names: str) -> Any:
    """The first of these attributes, of the model or else of its text config."""
    for owner in (model, model.config.get_text_config()):
        for name in names:
            if getattr(owner, name, None) is not None:
                return getattr(owner, name)
    raise ValueError(
        f"{type(model).__name__} has none of {', '.join(names)}, which its load-balancing loss needs; "
        "set output_router_logits=False in the model's config to train without that loss"
    )
