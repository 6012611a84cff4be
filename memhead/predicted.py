"""The most likely token of each row, in one product and without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from memhead import checks
from memhead.arguments import compute_dtype
from memhead.planning import default_tile
from memhead.products import as_operand, operand_dtype, result_dtype, tile_product
from memhead.sweep import blocks, row_blocks


@torch.compiler.disable(reason="memhead.predicted_tokens loops over tiles, which a compiler would unroll")
@torch.no_grad()
def predicted_tokens(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, logit_scale: float = 1.0
) -> Tensor:
    """``(logit_scale * (hidden @ weight.T + bias)).argmax(-1)``; of equals the first, as argmax has it on a CPU.

    Where only "is the target the most likely one" is asked, ``is_top1`` of :func:`memhead.linear_logprobs` costs
    nothing. A temperature or a softcap changes no order, so neither is an argument here.

    Args:
        hidden: (..., H), floating point.
        weight: (V, H), floating point.
        bias: (V,); -inf forbids a token.
        logit_scale: factor on the logits.

    Returns:
        (...), int64, without a gradient. Under ``torch.compile`` the call breaks the graph.

    Raises:
        ValueError: arguments that do not fit together.
    """
    checks.check_head(hidden, weight, None, bias)
    compute = compute_dtype(hidden, weight)
    operand = operand_dtype(compute, hidden.device)
    rows, columns = default_tile(hidden.device.type, result_dtype(operand).itemsize)
    flat = hidden.reshape(-1, hidden.shape[-1])
    buffer = flat.new_empty(min(rows, len(flat)) * min(columns, len(weight)), dtype=result_dtype(operand))
    tokens = torch.zeros(len(flat), dtype=torch.int64, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in row_blocks(len(flat), rows):
            x = as_operand(flat[part], compute)  # (R, H)
            best = buffer.new_full((len(x),), float("-inf"))
            for tile in blocks(len(weight), columns):
                logits = tile_product(x, as_operand(weight[tile], compute).t(), buffer)  # (R, C)
                if bias is not None:
                    logits = logits + bias[tile]
                highest, place = (logits * logit_scale).max(-1)
                better = highest > best
                best = torch.where(better, highest, best)
                tokens[part] = torch.where(better, place + tile.start, tokens[part])
    return tokens.view(hidden.shape[:-1])
