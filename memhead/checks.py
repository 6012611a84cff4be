"""Refuse what cannot be computed, naming the argument, the value and the rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor | None, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices of a head's tensors.

    Raises:
        ValueError: hidden (..., H) and weight (V, H) do not agree or are not floating point,
            targets are not hidden's leading dimensions of integers, bias is not (V,), or the
            tensors are on different devices.
    """
    for name, value in (("hidden", hidden), ("weight", weight)):
        check_whole_tensor(name, value)
    if not hidden.is_floating_point():
        raise ValueError(f"hidden has dtype {hidden.dtype}; it must be floating point")
    if not weight.is_floating_point():
        raise ValueError(
            f"weight has dtype {weight.dtype}; it must be floating point "
            "(for a quantised head see memhead.integrations.bitsandbytes)"
        )
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; "
            "they must be (..., H) and (V, H) with the same H"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows; the vocabulary must hold at least one token")
    if targets is not None:
        check_integers("targets", targets)
        check_rows("targets", targets, hidden)
    if bias is not None:
        check_whole_tensor("bias", bias)
        check_tokens("bias", bias, weight)
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        check_device(name, tensor, hidden)
    if not torch.compiler.is_compiling():
        check_no_tangent(hidden=hidden, weight=weight, bias=bias)


def check_whole_tensor(name: str, value: Any) -> None:
    """``value`` is a tensor, and all of it is here."""
    if isinstance(getattr(value, "weight", None), Tensor):  # the head itself
        update = ", and low_rank=memhead.integrations.peft.low_rank_update(lm_head)"
        raise ValueError(
            f"{name} is a {type(value).__name__}; pass its weight, as lm_head.weight, and bias=lm_head.bias where it "
            f"has one{update if hasattr(value, 'lora_A') else ''}"
        )
    check_tensor(name, value)
    if hasattr(value, "full_tensor"):
        raise ValueError(
            f"{name} is a DTensor {tuple(value.shape)}, of which a part is here (FSDP2, tensor parallelism); call "
            f"memhead inside the module's own forward, where it is whole, or pass {name}.full_tensor(); of a "
            "vocabulary split for good see memhead.parallel"
        )
    if hasattr(value, "ds_shape") and value.shape != value.ds_shape:
        raise ValueError(
            f"{name} is {tuple(value.ds_shape)} but partitioned by ZeRO-3, and none of it is here; call memhead under "
            f"deepspeed.zero.GatheredParameters([{name}]), in the forward and in the backward pass"
        )


def check_tensor(name: str, value: object) -> None:
    """``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; pass a tensor")


def check_names(name: str, value: Sequence[str], known: Sequence[str]) -> None:
    """``value`` holds names that are known."""
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r} is a text; pass a tuple of names, as ({value!r},)")
    if unknown := set(value) - set(known):
        raise ValueError(f"{name} contains {sorted(unknown)}; known are {', '.join(known)}")


def check_no_tangent(**tensors: Tensor | None) -> None:
    """Refuse tensors of forward-mode differentiation: their tangents would be lost."""
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(
                f"{name} carries a tangent: memhead differentiates backward only, not forward (jvp)"
            )


def check_differentiated_once() -> None:
    """Refuse double backward. To be called in a backward pass, where gradients are on only under ``create_graph``.

    Raises:
        RuntimeError: they are on. (torch's ``once_differentiable`` stays silent if the upstream gradient is constant.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "memhead's results can be differentiated once; create_graph=True asks for a second time"
        )


def check_rows(name: str, tensor: Tensor, hidden: Tensor) -> None:
    """``tensor`` holds one value per row of hidden (..., H)."""
    check_tensor(name, tensor)
    if tensor.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(hidden.shape[:-1])}, "
            f"the leading dimensions of hidden {tuple(hidden.shape)}"
        )


def check_tokens(name: str, tensor: Tensor, weight: Tensor) -> None:
    """``tensor`` holds one value per row of weight (V, H)."""
    check_tensor(name, tensor)
    if tensor.shape != weight.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must be ({weight.shape[0]},), one per row of weight"
        )


def check_row_arg(name: str, tensor: Tensor, hidden: Tensor) -> None:
    """``tensor`` (..., *) has hidden's leading dimensions and device."""
    lead = hidden.shape[:-1]
    if not isinstance(tensor, Tensor) or tensor.shape[: len(lead)] != lead:
        got = (
            f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"type {type(tensor).__name__}"
        )
        raise ValueError(
            f"{name} has {got}; it must be a tensor that begins with the leading dimensions {tuple(lead)} of hidden"
        )
    check_device(name, tensor, hidden)


def check_integers(name: str, tensor: Tensor) -> None:
    """``tensor`` holds token numbers."""
    check_tensor(name, tensor)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must hold integers")


def check_device(name: str, tensor: Tensor | None, hidden: Tensor) -> None:
    """``tensor``, if given, is on hidden's device."""
    if tensor is not None and tensor.device != hidden.device:
        raise ValueError(
            f"{name} is on {tensor.device} and hidden on {hidden.device}; they must be on one device"
        )


def check_positive(name: str, value: float) -> None:
    """``value`` is greater than 0, and a number."""
    if not value > 0:
        raise ValueError(f"{name}={value} must be greater than 0")


def check_logit_options(softcap: float | None, logit_scale: float) -> None:
    """A softcap is greater than 0, and neither it nor the scale is a tensor whose gradient would be lost."""
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient and would get none: pass a number (a trained scale multiplies hidden and "
                "bias before the call)"
            )
    if softcap is not None:
        check_positive("softcap", softcap)


def check_at_least_one(name: str, value: int) -> None:
    """``value`` is at least 1."""
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def check_chunk(chunk: int | tuple[int, int] | None) -> None:
    """A chunk is a number of rows or (rows, columns), each at least 1."""
    if chunk is None:
        return
    sizes = (chunk, 1) if isinstance(chunk, int) else chunk
    if not isinstance(sizes, tuple) or len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"chunk={chunk} must be a number of rows or (rows, vocabulary columns)")
    if min(sizes) < 1:
        raise ValueError(f"chunk={chunk} is too small to hold a row; it must be at least 1")


def check_row_chunk(chunk: int | None) -> None:
    """A chunk of whole rows of logits is a number of rows, at least 1."""
    if chunk is not None and not isinstance(chunk, int):
        raise ValueError(f"chunk={chunk} must be a number of rows: whole rows of logits are held at a time")
    check_chunk(chunk)


def check_targets_in_vocabulary(targets: Tensor, vocab_size: int) -> None:
    """Every target is one of 0 .. vocab_size - 1.

    Raises:
        ValueError: on a CPU. On a GPU, where asking would stop the queue, a failing device-side
            assertion reports it at the next synchronisation, as ``torch.nn.functional.cross_entropy`` does.
    """
    if not targets.numel():
        return
    inside = targets.clamp(0, vocab_size - 1) == targets
    if targets.device.type != "cpu":
        torch._assert_async(inside.all())
    elif not bool(inside.all()):
        wrong = int(targets[~inside][0])
        raise ValueError(
            f"targets contains {wrong}, outside the vocabulary 0..{vocab_size - 1}; "
            "leave such rows out with mask= (or ignore_index= in linear_cross_entropy)"
        )


def check_temperatures(temperature: Tensor | None) -> None:
    """Like :func:`check_targets_in_vocabulary`, for per-row temperatures, if given."""
    if temperature is None:
        return
    positive = temperature > 0
    if temperature.device.type != "cpu":
        torch._assert_async(positive.all())
    elif not bool(positive.all()):
        wrong = float(temperature[~positive][0])
        raise ValueError(f"temperature contains {wrong}; every temperature must be greater than 0")
