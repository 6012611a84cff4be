"""memhead beside full logits at one size: time, memory and error, as the notebook shows them.

python -m benchmarks.side_by_side 4096 4096 128256      rows, hidden size, vocabulary
"""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.contestants import Contestant, Head, full_contestant, memhead_contestant
from benchmarks.head import MIB, make_head
from benchmarks.measure import Function, interleaved_seconds, peak_bytes
from recipes.tracking.meters import TensorMeter


def side_by_side(rows: int, hidden_size: int, vocab_size: int, rounds: int = 3) -> Table:
    """Forward and backward of both heads with the weight frozen, in the device's usual precision.

    The errors are against full logits in the next wider precision: the largest of any log-probability and, relative
    to its norm, the gradient's.
    """
    device, dtype = _device()
    head = make_head(rows, hidden_size, vocab_size, dtype, device)
    contestants = [memhead_contestant(), full_contestant()]
    passes = {c.name: c.run("frozen", head) for c in contestants}
    seconds = interleaved_seconds(passes, rounds, device)  # type: ignore[arg-type]
    table = Table(
        title=f"{rows} tokens, {hidden_size} × {vocab_size}, {str(dtype).removeprefix('torch.')} on {device}",
        title_justify="left",
    )
    table.add_column("forward and backward")
    for name in passes:
        table.add_column(name, justify="right")
    table.add_row("milliseconds", *(f"{1e3 * seconds[name]:.1f}" for name in passes))
    table.add_row("peak MiB above its inputs", *(f"{_peak_mib(f, head):.1f}" for f in passes.values()))  # type: ignore[arg-type]
    errors = [_errors(contestant, head) for contestant in contestants]
    table.add_row("largest error of a log-probability", *(f"{score:.1e}" for score, _ in errors))
    table.add_row("error of the gradient, relative", *(f"{gradient:.1e}" for _, gradient in errors))
    return table


def _errors(contestant: Contestant, head: Head) -> tuple[float, float]:
    """Of the log-probabilities, the largest; and of the gradient, relative to its norm."""
    wider = torch.float64 if head.hidden.dtype == torch.float32 else torch.float32
    exact = head._replace(
        hidden=head.hidden.detach().to(wider).requires_grad_(), weight=head.weight.detach().to(wider)
    )
    (scores, gradient), (right, slope) = (
        _answers(c, h) for c, h in ((contestant, head), (full_contestant(), exact))
    )
    return float((scores - right).abs().max()), float((gradient - slope).norm() / slope.norm())


def _answers(contestant: Contestant, head: Head) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) and the gradient of the hidden states (N, H)."""
    with torch.no_grad():
        scores = contestant.logprobs(head.hidden, head.weight, head.targets)  # type: ignore[misc]
    return scores, contestant.run("frozen", head)()[0]  # type: ignore[misc, index]


def _peak_mib(function: Function, head: Head) -> float:
    """Counted like a run's meters: the CUDA allocator's peak, or the bytes of live tensors on a CPU."""
    if head.hidden.is_cuda:
        return peak_bytes(function, head.hidden.device) / MIB
    meter = TensorMeter()
    meter.watch(head)
    inputs = meter.live_bytes
    with meter:
        function()
    return (meter.peak_bytes - inputs) / MIB


def _device() -> tuple[torch.device, torch.dtype]:
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.device("cuda"), half


if __name__ == "__main__":
    Console().print(side_by_side(*map(int, sys.argv[1:4])))
