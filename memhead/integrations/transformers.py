"""memhead inside a transformers model: a call with ``labels`` computes its loss from hidden states.

    from memhead.integrations import transformers as memhead_transformers
    handle = memhead_transformers.patch(model)
    model(input_ids=ids, labels=ids).loss.backward()   # no logits; a bare loop and Trainer alike
    model.generate(...)                                 # untouched: a call without labels is the model's own
    memhead_transformers.unpatch(model)

TRL's trainers bring their own patch of ``forward``; for those see :mod:`memhead.integrations.trl`.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput, MoeCausalLMOutputWithPast

from memhead.cross_entropy import linear_cross_entropy
from memhead.integrations.handle import Handle
from memhead.integrations.transformers_moe import router_loss, wants_router_loss
from memhead.logprobs import LowRankUpdate, linear_logprobs

PATCHED = "memhead_patched"  # an attribute of our forward: its handle
OWN_FORWARD = "_memhead_own_forward"  # the forward that the model itself held before, not its class; or None
# What the causal language model's forward takes for itself and its backbone does not know.
OF_THE_HEAD = (
    "labels",
    "shift_labels",
    "num_items_in_batch",
    "logits_to_keep",
    "return_dict",
    "ignore_index",
)


class HeadOptions(NamedTuple):
    """What a model does to its logits after the product."""

    softcap: float | None
    logit_scale: float


def head_options(config: Any) -> HeadOptions:
    """Softcap and scale of the logits, as the architectures of transformers name them in their configs."""
    text = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        value = getattr(text, name, None)
        if value is not None:
            scale = float(value)
            break
    else:
        divisor = getattr(text, "logits_scaling", None)  # Granite; HyperCLOVA X multiplies by it
        if divisor is not None:
            scale = float(divisor) if text.model_type == "hyperclovax" else 1.0 / float(divisor)
    return HeadOptions(getattr(text, "final_logit_softcapping", None), scale)


def patch(
    model: nn.Module,
    *,
    chunk: int | tuple[int, int] | None = None,
    backend: str | None = None,
    check: bool = True,
) -> Handle:
    """Give ``model`` a forward that, called with labels, returns its loss and ``logits=None``.

    A copy (``copy.deepcopy``) is patched like the model; one that was pickled is not. ``nn.DataParallel`` calls
    the model, not its replicas: use one process a GPU.

    Args:
        model: a causal language model of transformers, or a PEFT model around one; patched in place.
        chunk: see :func:`memhead.linear_logprobs`.
        backend: see :func:`memhead.linear_logprobs`.
        check: compare one small loss with the model's own before anything is trained, so that an
            architecture that treats its logits in a way unknown here is refused, not mistrained.

    Raises:
        ValueError: no model of transformers, but something around one; patched already; no output embedding, a
            quantised one, or no backbone; another loss than next-token cross entropy; or the check failed.
    """
    base = _base(model)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"{type(base).__name__} is not a model of transformers; patch the model inside it")
    if _handle_of(base) is not None:
        raise ValueError(f"{type(base).__name__} is patched already; call unpatch(model) first")
    if (head := base.get_output_embeddings()) is None:
        raise ValueError(f"{type(base).__name__} has no output embedding to compute a loss with")
    if not head.weight.is_floating_point():
        raise ValueError(
            f"{type(base).__name__} has a quantised output embedding, with a weight of {head.weight.dtype}; leave it "
            "out of the quantisation, or use memhead.integrations.bitsandbytes"
        )
    if base.base_model is base:
        raise ValueError(
            f"{type(base).__name__} has no backbone of the name {base.base_model_prefix!r}, which it says it has; "
            "memhead needs the hidden states before the head"
        )
    if base.loss_type not in (None, "ForCausalLM"):
        raise ValueError(
            f"{type(base).__name__} has loss_type={base.loss_type!r}; memhead computes 'ForCausalLM'"
        )
    options = head_options(base.config)
    signature = inspect.signature(type(base).forward)

    def restore() -> None:
        if _handle_of(base) is handle:  # not a later patch's
            unpatch(model)

    handle = Handle("memhead", restore, f"{type(base).__name__}.forward with labels")

    @functools.wraps(type(base).forward)  # generate() and Trainer read the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        given.pop("self")
        given |= given.pop("kwargs", {})
        if given.get("labels") is None and given.get("shift_labels") is None:
            return _own_forward(self)(*args, **kwargs)
        output, rows = _forward_with_loss(self, given, options, chunk, backend)
        handle.count(rows)
        return output

    setattr(forward, PATCHED, handle)
    # Bound methods, which a copy of the model binds to itself; nothing else here knows which model it is.
    setattr(base, OWN_FORWARD, vars(base).get("forward"))
    base.forward = types.MethodType(forward, base)
    if check:
        try:
            _check(base)
        except BaseException:
            unpatch(model)
            raise
        handle.calls = handle.rows = 0
    return handle


def unpatch(model: nn.Module) -> None:
    """Give the model its own forward back; a model that is not patched is left alone.

    What was put around the patched forward since (accelerate's mixed precision: ``prepare``) goes with it.
    """
    base = _base(model)
    if _handle_of(base) is None:
        return
    original = getattr(base, OWN_FORWARD)
    delattr(base, OWN_FORWARD)
    if original is None:
        del base.forward
    else:
        base.forward = original


def _handle_of(base: Any) -> Handle | None:
    """The handle of a patch, which something else may have wrapped since."""
    forward = inspect.unwrap(base.forward, stop=lambda f: hasattr(f, PATCHED))
    return getattr(forward, PATCHED, None)


def _own_forward(base: Any) -> Any:
    """The forward of a patched model without the patch."""
    own = getattr(base, OWN_FORWARD)
    return types.MethodType(type(base).forward, base) if own is None else own


def _base(model: Any) -> Any:
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def _forward_with_loss(
    model: Any,
    given: dict[str, Any],
    options: HeadOptions,
    chunk: int | tuple[int, int] | None,
    backend: str | None,
) -> tuple[Any, int]:
    """(output with the loss, number of tokens scored); ``given`` are the forward's arguments by name."""
    own = {name: given.pop(name, None) for name in OF_THE_HEAD}
    balanced = wants_router_loss(model, given)
    if balanced:
        given["output_router_logits"] = True
    keep = own["logits_to_keep"]
    if isinstance(keep, Tensor) or keep:
        raise ValueError(f"logits_to_keep={keep} with labels: leave it out, the loss needs every position")
    hidden, outputs = _backbone(model, given)
    ignore_index = -100 if own["ignore_index"] is None else own["ignore_index"]
    targets = own["shift_labels"]
    if targets is None:
        # The last position predicts nothing; keeping it, masked, spares a copy of the others.
        targets = nn.functional.pad(own["labels"].long(), (0, 1), value=ignore_index)[..., 1:]
    targets = targets.to(hidden.device)
    counted = targets != ignore_index
    weight, bias, update = _head(model)
    shared: dict[str, Any] = {
        "bias": bias,
        "softcap": options.softcap,
        "logit_scale": options.logit_scale,
        "chunk": chunk,
        "backend": backend,
    }
    if update is None:
        total = linear_cross_entropy(
            hidden, weight, targets, ignore_index=ignore_index, reduction="sum", **shared
        )
    else:
        scored = linear_logprobs(hidden, weight, targets, mask=counted, low_rank=update, **shared)
        total = -scored.logprobs.sum()
    items = own["num_items_in_batch"]
    items = (
        counted.sum() if items is None else items.to(hidden.device) if isinstance(items, Tensor) else items
    )
    loss = total / items
    fields = {
        name: getattr(outputs, name, None) for name in ("past_key_values", "hidden_states", "attentions")
    }
    output: ModelOutput
    if balanced:
        added, aux_loss = router_loss(model, outputs.router_logits, given.get("attention_mask"))
        output = MoeCausalLMOutputWithPast(
            loss=loss + added.to(loss.device),
            aux_loss=aux_loss,
            logits=None,
            router_logits=outputs.router_logits,
            **fields,
        )
    else:
        output = CausalLMOutputWithPast(loss=loss, logits=None, **fields)
    return (output.to_tuple() if own["return_dict"] is False else output), targets.numel()


def _backbone(model: Any, given: dict[str, Any]) -> tuple[Tensor, Any]:
    outputs = model.base_model(**given, return_dict=True)
    return outputs.last_hidden_state, outputs


def _head(model: Any) -> tuple[Tensor, Tensor | None, LowRankUpdate | None]:
    """Weight (V, H), bias (V,) and LoRA update of the output embedding, as they are at this moment."""
    head = model.get_output_embeddings()
    update = None
    if hasattr(head, "base_layer"):
        from memhead.integrations.peft import is_lora, low_rank_update

        if not is_lora(head):
            raise ValueError(
                f"the language-model head carries {type(head).__module__}.{type(head).__name__}; of adapters "
                "memhead computes plain LoRA: leave the head out of the adapter's target_modules"
            )
        update = low_rank_update(head)
        if update is not None:
            update = update._replace(a=_whole(update.a), b=_whole(update.b))
    weight, bias = head.weight, getattr(head, "bias", None)
    return _whole(weight), None if bias is None else _whole(bias), update


def _whole(parameter: Any) -> Tensor:
    """A parameter that FSDP2 has sharded by itself, gathered; its gradient becomes the processes' mean, as FSDP's."""
    if not hasattr(parameter, "full_tensor"):  # no DTensor
        return parameter  # type: ignore[no-any-return]
    from torch.distributed.tensor import Partial

    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _check(model: Any) -> None:
    """Compare the loss of eight tokens with the model's own, and that with what its own logits give.

    The first comparison allows for half precision, in which a small term of a loss could hide; the second does not.

    Raises:
        ValueError: they differ.
    """
    device = model.get_input_embeddings().weight.device
    vocab_size = model.get_output_embeddings().weight.shape[0]
    tokens = (torch.arange(1, 9, device=device) * 7919 % vocab_size)[None]  # (1, 8)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # dropout would make any two passes differ
    try:
        with torch.no_grad():
            ours = model(input_ids=tokens, labels=tokens, use_cache=False)
            plain = _own_forward(model)(input_ids=tokens, labels=tokens, use_cache=False)
    finally:
        for module, mode in modes:
            module.training = mode
    ours_loss, plain_loss = float(ours.loss), float(plain.loss)
    if not _close(ours_loss, plain_loss, model.get_output_embeddings().weight.dtype):
        raise ValueError(
            f"{type(model).__name__} computes a loss of {plain_loss:.6f} where its hidden states and head give "
            f"{ours_loss:.6f}: it treats its logits in a way that memhead does not know"
        )
    if getattr(ours, "aux_loss", None) is not None:
        return  # the router's loss, which the first comparison has seen
    of_logits = float(nn.functional.cross_entropy(plain.logits[0, :-1].float(), tokens[0, 1:]))
    if not _close(of_logits, plain_loss, plain.loss.dtype):
        raise ValueError(
            f"{type(model).__name__} computes a loss of {plain_loss:.6f} where the cross entropy of its logits is "
            f"{of_logits:.6f}: memhead does not know what it adds"
        )


def _close(a: float, b: float, dtype: torch.dtype) -> bool:
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    return abs(a - b) <= tolerance * max(1.0, abs(b))
