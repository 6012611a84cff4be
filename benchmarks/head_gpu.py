"""The head on a GPU, beside every peer: time, memory and errors in one process.

    python -m benchmarks.head_gpu --output DIR            # all of it, under 8 minutes on an H100
    python -m benchmarks.head_gpu --output DIR --toy      # the same code at toy shapes, on a CPU too

Every round runs every contestant once, timed with CUDA events behind a queue that is already full, so
that a slow launch does not count as a slow kernel; medians of nine, or of three where a call takes over
150 ms or three times as long as memhead. Memory is the allocator's peak above the inputs and the
results. Errors are against float64 on 2048 rows, with the outputs' memory filled with NaN beforehand.
benchmarks/README.md says how peers are installed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contestants import PASSES, PRODUCTS, Contestant, Head, bare_products
from benchmarks.gpu_contestants import contestants
from benchmarks.gpu_tables import write
from benchmarks.measure import machine, synchronize, versions

MIB = 2**20
FLOOR = "bare products"
OURS = "memhead"
ERROR_ROWS = 2048
ROUNDS, FEW_ROUNDS = 9, 3
# Left out at N = 32768: one call of the first two takes over a second, and the third recompiles for half a minute.
SLOW = ("Liger", "CCE 25", "torch.compile")


class Shape(NamedTuple):
    """A model's head."""

    name: str
    hidden_size: int
    vocab_size: int
    softcap: float | None = None


SHAPES = [
    Shape("Llama-3.1-8B", 4096, 128256),
    Shape("Llama-3.2-1B", 2048, 128256),
    Shape("Qwen2.5-0.5B", 896, 151936),
    Shape("Gemma-2-9B", 3584, 256000, 30.0),
]
ROWS = (8192, 2048, 32768)
TOY = [Shape("toy", 64, 1000), Shape("toy, softcap", 32, 777, 30.0)]


def make_head(shape: Shape, rows: int, peaked: bool, device: torch.device) -> Head:
    """Random weights, logits of unit variance; ``peaked``: like a trained model's.

    Then each hidden state has a component along its target's weight row and one along that of a
    rival, at a distance that differs from token to token, since some tokens are certain and others
    are not: a mean p of the target of about 0.7 and a mean entropy of about 0.5.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32)

    weight = (draw(shape.vocab_size, shape.hidden_size) / shape.hidden_size**0.5).to(torch.bfloat16)
    targets = torch.randint(shape.vocab_size, (rows,), generator=generator, device=device)
    hidden = draw(rows, shape.hidden_size)
    if peaked:
        rivals = torch.randint(shape.vocab_size, (rows,), generator=generator, device=device)
        lead = 1.8 + 2.5 * draw(rows, 1)
        hidden = hidden + 20 * weight[targets].float() + (20 - lead) * weight[rivals].float()
    return Head(hidden.to(torch.bfloat16), weight, targets, draw(rows))


class Exact(NamedTuple):
    """float64 results of full logits."""

    logprobs: Tensor  # (N,)
    by_hidden: Tensor  # (N, H)
    mean_p: float
    mean_entropy: float


def exact(head: Head, softcap: float | None, block: int = 256) -> Exact:
    """Plain full logits in float64, a block of rows at a time."""
    weight = head.weight.double()
    logprobs, gradients, entropies = [], [], []
    for start in range(0, len(head.hidden), block):
        rows = slice(start, start + block)
        z = head.hidden[rows].double() @ weight.t()
        slope = torch.ones((), device=z.device, dtype=z.dtype)
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
            slope = 1 - (z / softcap).square()
        logp = z.log_softmax(-1)
        target = head.targets[rows, None]
        logprobs.append(logp.gather(1, target).squeeze(1))
        p = logp.exp()
        entropies.append(-(p * logp).sum(1))
        d = -p
        d.scatter_add_(1, target, torch.ones_like(target, dtype=d.dtype))
        gradients.append((d * slope) @ weight * head.grad[rows, None].double())
    lp = torch.cat(logprobs)
    return Exact(lp, torch.cat(gradients), lp.exp().mean().item(), torch.cat(entropies).mean().item())


def errors(contestant: Contestant, head: Head, truth: Exact) -> dict[str, float]:
    """Largest and mean error of the log-probabilities, relative error of the hidden gradient."""
    if contestant.logprobs is None or contestant.notes.get("kind") == "loss":
        return {}
    _poison(head.hidden.device)
    hidden = head.hidden.detach().clone().requires_grad_()
    try:
        logprobs = contestant.logprobs(hidden, head.weight, head.targets)
        logprobs.backward(head.grad.to(logprobs.dtype))
    except Exception as error:  # a peer that fails is a cell of the table
        print(f"    {contestant.name}: {type(error).__name__}: {error}"[:300], flush=True)
        return {}
    assert hidden.grad is not None
    distance = (logprobs.double() - truth.logprobs).abs()
    gradient = (hidden.grad.double() - truth.by_hidden).norm() / truth.by_hidden.norm()
    return {
        "logprob_max": distance.max().item(),
        "logprob_mean": distance.mean().item(),
        "gradient": gradient.item(),
    }


def _poison(device: torch.device) -> None:
    """Fill free memory with NaN, so that an output that is never written shows."""
    if device.type == "cuda":
        torch.full((2**28,), torch.nan, device=device)


class Clock:
    """Times functions on a device, interleaved."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def once(self, function: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)  # about 10 ms in which the launches are queued
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def measure(head: Head, which: str, field: list[Contestant]) -> dict[str, dict[str, float]]:
    """Milliseconds and MiB of every contestant that can do the pass, and of the bare products."""
    device = head.hidden.device
    clock = Clock(device)
    first: dict[str, float] = {}
    running: dict[str, Callable[[], object]] = {}
    found: dict[str, dict[str, float]] = {}
    floor = bare_products(which, head, preallocated=device.type != "cuda")
    runs = [(c.name, c.run(which, head)) for c in field if not c.absent]
    for name, function in [(FLOOR, floor), *runs]:
        if function is None:
            continue
        try:
            function()  # compiles everything
            found[name] = {"peak_mib": _peak(function, device)}
            first[name] = clock.once(function)
            running[name] = function
        except torch.OutOfMemoryError:
            found[name] = {"out_of_memory": 1.0}
        except Exception as error:  # a peer that fails is a cell of the table
            print(f"    {name}: {type(error).__name__}: {error}"[:300], flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in running}
    # Another order in every round: what ran before decides how warm and how fast the card is.
    order = random.Random(0)
    for done in range(ROUNDS):
        in_time = [name for name in running if done < FEW_ROUNDS or first[name] < _long(first)]
        for name in order.sample(in_time, len(in_time)):
            function = running[name]
            try:
                milliseconds = clock.once(function)
            except torch.OutOfMemoryError:
                found[name] = {"out_of_memory": 1.0}
                continue
            times[name].append(milliseconds)
    for name, values in times.items():
        if values and "out_of_memory" not in found[name]:
            found[name]["ms"] = statistics.median(values)
    for name, entry in found.items():
        if "ms" in entry and name != FLOOR:
            entry["ratio"] = entry["ms"] / found[FLOOR]["ms"]
    return found


def _long(first: dict[str, float]) -> float:
    """Milliseconds from which a call, slow in itself or beside the others, gets only a few rounds."""
    return min(150.0, 3 * first.get(OURS, 50.0))


def _peak(function: Callable[[], object], device: torch.device) -> float:
    """MiB at the peak above what was there before, less what stays as the results."""
    if device.type != "cuda":
        return 0.0
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = function()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    kept = torch.cuda.memory_allocated(device) - before
    del results
    return (peak - before - kept) / MIB


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All rows that fit the time limit, the most informative ones first; stored after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.monotonic()
    shapes, rows = (TOY, (100,)) if options.toy else (SHAPES, ROWS)
    shapes = [shape for shape in shapes if shape.name.startswith(tuple(options.model))]
    results: dict[str, Any] = {
        "machine": machine(device),
        "versions": versions(
            "torch", "triton", "trl", "liger_kernel", "unsloth_zoo", "cut_cross_entropy", "quack-kernels"
        ),
        "command": "python -m benchmarks.head_gpu --output DIR",
        "date": date.today().isoformat(),
        "rows": [],
        "errors": [],
    }
    # First the reference shape, then the other models, then the other lengths.
    plan = [(shapes[0], n, True) for n in rows] + [(shape, rows[0], True) for shape in shapes[1:]]
    plan += [(shapes[0], rows[0], False)] + [(shape, n, True) for n in rows[1:] for shape in shapes[1:]]
    fields = {shape: contestants(shape.softcap, compiled=shape is SHAPES[0]) for shape in shapes}
    results["absent"] = {c.name: c.absent for c in fields[shapes[0]] if c.absent}
    for shape in shapes:
        for peaked in (False, True):
            head = make_head(shape, min(ERROR_ROWS, 200 if options.toy else ERROR_ROWS), peaked, device)
            truth = exact(head, shape.softcap)
            row = {
                "shape": shape.name,
                "peaked": peaked,
                "mean_p": truth.mean_p,
                "entropy": truth.mean_entropy,
            }
            row["contestants"] = {c.name: errors(c, head, truth) for c in fields[shape] if not c.absent}
            results["errors"].append(row)
            print(
                shape.name, "peaked" if peaked else "flat", f"p {truth.mean_p:.3f} H {truth.mean_entropy:.3f}"
            )
            del head, truth
    for shape, n, peaked in plan:
        head = make_head(shape, n, peaked, device)
        for which in PASSES:
            if which == "cross entropy, frozen" or (n != rows[0] and which == "frozen, entropy"):
                continue
            if time.monotonic() - start > options.limit:
                results["stopped"] = f"at the limit of {options.limit} s, before {shape.name} N={n} {which}"
                return results
            field = [c for c in fields[shape] if n <= rows[0] or not c.name.startswith(SLOW)]
            if which not in ("frozen", "trainable"):
                field = [c for c in field if c.notes.get("kind") != "loss"]
            cells = measure(head, which, field)
            row = {"shape": shape._asdict(), "num_rows": n, "peaked": peaked, "pass": which}
            results["rows"].append(row | {"products": PRODUCTS[which], "contestants": cells})
            ours, floor = cells.get(OURS, {}), cells[FLOOR]
            print(
                f"{time.monotonic() - start:5.0f} s  {shape.name} N={n} {which}: floor {floor.get('ms', 0):.2f} ms, "
                f"ours {ours.get('ratio', 0):.3f}x {ours.get('peak_mib', 0):.0f} MiB",
                flush=True,
            )
            _store(results, options.output, device)
        del head
    return results


def _store(results: dict[str, Any], folder: Path, device: torch.device) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device).split()[1].lower() if device.type == "cuda" else "toy"
    path = folder / f"head_{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    write(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument(
        "--limit", type=float, default=470, help="seconds after which no further row is begun"
    )
    parser.add_argument("--model", nargs="+", default=[""], help="only models whose names begin so")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    results = run(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _store(results, options.output, device)


if __name__ == "__main__":
    main()
