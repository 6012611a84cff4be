"""A quantised head (bitsandbytes 4-bit and 8-bit), widened one tile at a time.

    from memhead.integrations.bitsandbytes import quantized_weight, quantized_logprobs
    quantized_logprobs(hidden, quantized_weight(model.lm_head), targets).logprobs

The head is frozen, as quantised weights are; hidden gets its exact gradient. In TRL's trainers it
works by itself once :mod:`memhead.integrations.trl` is installed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from memhead import checks
from memhead.arguments import compute_dtype, read_arguments
from memhead.core import Call, Problem, score_with_autograd
from memhead.logprobs import LinearLogprobs, as_results
from memhead.weights import Weight, WeightPart


class Weight8bit:
    """LLM.int8 codes (V, H) with one scale per row."""

    def __init__(self, codes: Tensor, row_maxima: Tensor) -> None:
        self.codes, self.scales = codes, row_maxima.float() / 127

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def parts(self) -> tuple[WeightPart, ...]:
        """See :class:`memhead.weights.Weight`; none, for it is frozen."""
        return ()

    def views(self, dtype: torch.dtype) -> bool:
        """See :class:`memhead.weights.Weight`."""
        return False

    def tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`memhead.weights.Weight`."""
        return (self.codes[start:stop] * self.scales[start:stop, None]).to(dtype)

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`memhead.weights.Weight`."""
        return (self.codes.index_select(0, indices) * self.scales[indices, None]).to(dtype)


class Weight4bit:
    """NF4 or FP4 codes, two to a byte, row after row, with one float32 scale per block of them."""

    def __init__(self, packed: Tensor, state: Any) -> None:
        from bitsandbytes import functional

        if getattr(state, "packing_format_for_cpu", False):
            packed, state = _unpacked_for_cpu(packed, state)
        self._functional, self._state = functional, state
        self.shape: tuple[int, int] = (state.shape[0], state.shape[1])
        self._bytes = packed.reshape(-1).view(torch.uint8)
        scales = state.absmax
        if state.nested:  # the scales are quantised themselves; they are 1/blocksize of the weight
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        self._scales = scales.float()

    @property
    def parts(self) -> tuple[WeightPart, ...]:
        """See :class:`memhead.weights.Weight`; none, for it is frozen."""
        return ()

    def views(self, dtype: torch.dtype) -> bool:
        """See :class:`memhead.weights.Weight`."""
        return False

    def tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`memhead.weights.Weight`."""
        size, block = self.shape[1], self._state.blocksize
        first, last = start * size, stop * size
        # Blocks do not end where rows end unless their sizes agree, so whole blocks are widened.
        from_block, to_block = first // block, -(-last // block)
        end = min(to_block * block, self.shape[0] * size)
        flat = self._widen(
            self._bytes[from_block * block // 2 : -(-end // 2)],
            self._scales[from_block:to_block],
            end - from_block * block,
        )
        begin = first - from_block * block
        return flat[begin : begin + last - first].view(stop - start, size).to(dtype)

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`memhead.weights.Weight`."""
        size, block = self.shape[1], self._state.blocksize
        if size % block:
            return torch.cat([self.tile(i, i + 1, dtype) for i in indices.tolist()])
        codes = self._bytes.view(self.shape[0], size // 2).index_select(0, indices)
        scales = self._scales.view(self.shape[0], size // block).index_select(0, indices)
        return self._widen(codes.view(-1), scales.view(-1), indices.numel() * size).view(-1, size).to(dtype)

    def _widen(self, codes: Tensor, scales: Tensor, count: int) -> Tensor:
        """``count`` values, in the dtype that the weight was quantised from."""
        state = self._functional.QuantState(
            absmax=scales.contiguous(),
            shape=torch.Size([count]),
            code=self._state.code,
            blocksize=self._state.blocksize,
            quant_type=self._state.quant_type,
            dtype=self._state.dtype,
        )
        return self._functional.dequantize_4bit(codes.contiguous().view(-1, 1), state).reshape(-1)


def _unpacked_for_cpu(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes and state in the usual order, from the one that bitsandbytes gives a layer evaluated on a CPU.

    Its own inverse changes the state it is given and quantises the scales again: it gets a copy, and
    the scales, kept transposed, are taken as they are.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    usual = copy.copy(state)
    usual.original_nested = False
    usual.absmax = state.absmax.t().reshape(-1).float()
    return _convert_weight_packed_for_cpu_inverse(packed, usual)


def quantized_weight(layer: nn.Module) -> Weight:
    """The weight of a bitsandbytes ``Linear4bit`` or ``Linear8bitLt``, for :func:`quantized_logprobs`.

    Raises:
        ValueError: another kind of layer, or one that is not quantised yet (it is when moved to a device).
    """
    weight: Any = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        return Weight4bit(weight.data, weight.quant_state)
    row_maxima = getattr(weight, "SCB", None)
    if row_maxima is None:
        row_maxima = getattr(getattr(layer, "state", None), "SCB", None)
    if row_maxima is not None and weight.dtype == torch.int8:
        return Weight8bit(weight.data, row_maxima)
    raise ValueError(
        f"{type(layer).__name__} with a weight of {weight.dtype} is not a quantised bitsandbytes layer; "
        "move it to its device first, that is when it is quantised"
    )


def quantized_logprobs(
    hidden: Tensor,
    weight: Weight,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    extra_outputs: tuple[str, ...] | list[str] = (),
    chunk: int | tuple[int, int] | None = None,
    backend: str | None = None,
) -> LinearLogprobs:
    """:func:`memhead.linear_logprobs` of a frozen weight that only ever exists tile by tile.

    Args:
        hidden: (..., H), floating point; its dtype, or autocast's, is that of the products.
        weight: what :func:`quantized_weight` returns.
        targets: (...), integers in 0..V-1 wherever ``mask`` is true.
        bias: (V,), frozen too.
        mask: see :func:`memhead.linear_logprobs`.
        temperature: likewise.
        softcap: likewise.
        logit_scale: likewise.
        entropy: likewise.
        extra_outputs: likewise.
        chunk: likewise.
        backend: likewise.

    Raises:
        ValueError: arguments that do not fit together; the message names argument, value and rule.
    """
    if isinstance(weight, Tensor | nn.Module):
        raise ValueError(f"weight is a {type(weight).__name__}; pass quantized_weight(lm_head)")
    checks.check_tensor("hidden", hidden)
    checks.check_head(hidden, hidden.new_empty(1).expand(weight.shape), targets, bias)
    if bias is not None and bias.requires_grad:
        raise ValueError("bias requires a gradient; beside a quantised weight it must be frozen")
    labels, kept, row_temperature, settings = read_arguments(
        hidden,
        targets,
        compute_dtype(hidden, hidden),
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        entropy=entropy,
        extra_outputs=extra_outputs,
        chunk=chunk,
        backend=backend,
    )

    def problem(x: Tensor, _: Tensor | None, b: Tensor | None) -> Problem:
        return Problem(x, weight, labels, b, kept, row_temperature, settings)

    call = Call(problem, direction=torch.is_grad_enabled() and hidden.requires_grad)
    results = score_with_autograd(call, hidden.reshape(-1, hidden.shape[-1]), None, bias)
    return as_results(results, settings.spec, targets.shape)
