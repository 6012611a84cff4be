"""How long a pass takes when the GPU waits for launches, as in a small model's training loop.

    python -m benchmarks.launches            # a minute, on a GPU

benchmarks.head_gpu times a pass behind a full queue, where launching costs nothing. Here calls follow each other
with nothing queued before them: wall time per call, and in brackets how long the CPU took to launch it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.gpu_contestants import contestants
from benchmarks.head_gpu import SHAPES, TOY, make_head
from benchmarks.measure import synchronize

PASSES = ("frozen", "no gradient", "trainable", "cross entropy")
PEERS = ("memhead", "TRL", "unsloth_zoo", "full logits")
CALLS, ROUNDS = 20, 3


def cold(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds per call, and for its launches, from the fastest of a few rounds of consecutive calls."""
    for _ in range(ROUNDS):
        function()
    synchronize(device)
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(CALLS):
            function()
        launched = time.perf_counter()
        synchronize(device)
        rounds.append((1e3 * (time.perf_counter() - began) / CALLS, 1e3 * (launched - began) / CALLS))
    return min(rounds)


def main(argv: list[str] | None = None) -> list[str]:
    """The command line; prints and returns the table's lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="tiny shapes, on a CPU too")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, lengths = ([TOY[0]], (20,)) if options.toy else ([SHAPES[2], SHAPES[0]], (256, 2048, 8192))
    field = [c for c in contestants(None, compiled=False) if c.name.startswith(PEERS) and not c.absent]
    lines = [
        "| head | N | pass | " + " | ".join(c.name for c in field) + " |",
        "|---" * (len(field) + 3) + "|",
    ]
    print(*lines, sep="\n")
    for shape in shapes:
        for num_rows in lengths:
            head = make_head(shape, num_rows, True, device)
            for which in PASSES:
                cells = []
                for contestant in field:
                    function = contestant.run(which, head)
                    try:
                        assert function is not None
                        cells.append("{:.2f} ({:.2f})".format(*cold(function, device)))
                    except Exception as error:  # a peer that fails is a cell of the table
                        cells.append(type(error).__name__)
                lines.append(f"| {shape.name} | {num_rows} | {which} | " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    main()
