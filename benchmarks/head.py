"""The head alone: time and memory of every way to compute it, beside the bare matrix products.

    python -m benchmarks.head                                   # what is installed, every shape
    python -m benchmarks.head --shape 1024x32768 --dtype float32 --trl FOLDER --unsloth FOLDER --liger FOLDER

One process; every round runs every contestant once; medians. Results are added to
``benchmarks/results/head_<device>.json``, row by row, and written out as Markdown beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import (
    PASSES,
    PRODUCTS,
    Contestant,
    Head,
    bare_products,
    full_contestant,
    liger_contestant,
    memhead_contestant,
    onednn_products,
    torch_contestant,
    trl_contestant,
    unsloth_contestant,
)
from benchmarks.measure import interleaved_seconds, machine, peak_bytes, versions

RESULTS = Path(__file__).with_name("results")
# hidden size x vocabulary size: rows. A small head, Llama 3.2 1B's, Qwen 2.5 0.5B's.
SHAPES = {
    "cpu": {"1024x32768": 2048, "2048x128256": 512, "896x151936": 512},
    "cuda": {"1024x32768": 8192, "2048x128256": 8192, "896x151936": 8192, "4096x128256": 8192},
}
# The target for memhead, in multiples of the bare products.
TARGETS = {"frozen": 1.12, "frozen, entropy": 1.25, "no gradient": 1.12, "trainable": 1.15}
FLOOR = "bare products"
MM = "the products by torch.mm"
OURS = "memhead"
FAR = 2.0  # times the fastest: what takes longer is timed only three times
MIB = 2**20


def make_head(rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Head:
    """Random tensors whose logits have the spread of a trained model's."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * (2.0 / hidden_size**0.5)
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    grad = torch.randn(rows, generator=generator)
    return Head(hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), grad.to(device))


def measure_row(head: Head, which: str, contestants: list[Contestant], rounds: int) -> dict[str, Any]:
    """Seconds, multiples of the floor and peak MiB of every contestant in one pass."""
    device = head.hidden.device
    functions = {f"{FLOOR}/{kind}": bare_products(which, head, kind == "out") for kind in ("out", "fresh")}
    onednn = device.type == "cpu" and head.hidden.dtype == torch.float32
    if onednn and torch.backends.cpu.get_cpu_capability() == "AVX512":
        functions[f"{FLOOR}/oneDNN"] = onednn_products(which, head)
    for contestant in contestants:
        function = None if contestant.absent else contestant.run(which, head)
        if function is not None:
            functions[contestant.name] = function
    peaks = {name: peak_bytes(function, device) / MIB for name, function in functions.items()}
    seconds = interleaved_seconds(functions, rounds, device, far=FAR)
    floors = {name: seconds.pop(name) for name in functions if name.startswith(FLOOR)}
    floor, seconds[MM] = min(floors.values()), min(floors[f"{FLOOR}/{kind}"] for kind in ("out", "fresh"))
    peaks[MM] = 0.0
    return {
        "pass": which,
        "products": PRODUCTS[which],
        "floor_seconds": floor,
        "contestants": {
            name: {"seconds": s, "ratio": s / floor, "peak_mib": peaks[name]} for name, s in seconds.items()
        },
    }


def verdict(row: dict[str, Any]) -> list[str]:
    """The targets that memhead misses in this row; empty if it meets them all."""
    ours = row["contestants"].get(OURS)
    if ours is None:
        return ["memhead did not run"]
    misses = []
    target = TARGETS.get(row["pass"])
    if target is not None and ours["ratio"] > target:
        misses.append(f"{ours['ratio']:.2f}x of the products, target {target}x")
    for name, other in row["contestants"].items():
        if name in (OURS, MM):
            continue
        if other["seconds"] < ours["seconds"]:
            misses.append(f"slower than {name}")
        if other["peak_mib"] < ours["peak_mib"]:
            misses.append(f"larger peak than {name}")
    return misses


def markdown(results: dict[str, Any]) -> str:
    """The rows as one table per shape and dtype."""
    lines = ["# The head alone", "", "Written by `python -m benchmarks.head`; see benchmarks/README.md.", ""]
    for key in sorted({(r["shape"], r["dtype"]) for r in results["rows"]}):
        rows = [r for r in results["rows"] if (r["shape"], r["dtype"]) == key]
        names = sorted({n for r in rows for n in r["contestants"]}, key=lambda n: (n != OURS, n != MM, n))
        first = rows[0]
        lines += [
            f"## H x V = {key[0]}, N = {first['num_rows']}, {key[1]}",
            "",
            f"{first['machine']}. Time in multiples of the bare products; peak extra tensor MiB in brackets.",
            "",
            "| pass | products | " + " | ".join(names) + " | memhead misses |",
            "|---|---|" + "---|" * (len(names) + 1),
        ]
        for row in rows:
            cells = [_cell(row["contestants"].get(name)) for name in names]
            floor = f"{row['products']} = {row['floor_seconds']:.2f} s"
            misses = "; ".join(verdict(row)) or "–"
            lines.append(f"| {row['pass']} | {floor} | " + " | ".join(cells) + f" | {misses} |")
        lines += ["", f"`{first['command']}`, {first['date']}, {_listed(first['versions'])}"]
        lines += [f"Absent: {name}: {why}" for name, why in first["absent"].items()]
        lines.append("")
    return "\n".join(lines)


def _cell(entry: dict[str, float] | None) -> str:
    if entry is None:
        return "–"
    return f"{entry['ratio']:.2f}x" + (f" ({entry['peak_mib']:.0f})" if entry["peak_mib"] else "")


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {release}" for name, release in found.items())


def store(rows: list[dict[str, Any]], stem: Path) -> dict[str, Any]:
    """Replace older rows of the same shape, dtype and pass by ``rows``."""
    path = stem.with_suffix(".json")
    results = json.loads(path.read_text()) if path.exists() else {"rows": []}

    def identity(row: dict[str, Any]) -> tuple[str, str, int]:
        return row["shape"], row["dtype"], list(PASSES).index(row["pass"])

    kept = {identity(row): row for row in [*results["rows"], *rows]}
    results["rows"] = [kept[key] for key in sorted(kept)]
    stem.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(results))
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", action="append", help="HxV; may be repeated; default: the device's list")
    parser.add_argument("--rows", type=int, help="N, default: the shape's own")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--pass", dest="passes", action="append", choices=tuple(PASSES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="CPU threads, default: torch's")
    parser.add_argument("--only", action="append", help="contestants whose name starts so")
    for peer in ("trl", "unsloth", "liger"):
        parser.add_argument(f"--{peer}", metavar="FOLDER", help="unpacked package, where not installed")
    parser.add_argument("--output", type=Path, help="where to store, without suffix")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure what the command line asks for, print and store it."""
    options = parse(arguments)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    contestants = [
        memhead_contestant(),
        full_contestant(),
        torch_contestant(),
        trl_contestant(options.trl),
        liger_contestant(options.liger),
        unsloth_contestant(options.unsloth),
    ]
    if options.only:
        contestants = [c for c in contestants if c.name.startswith(tuple(options.only))]
    shapes = options.shape or list(SHAPES[device.type])
    # The command is stored without this machine's folders.
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.head", *("FOLDER" if "/" in a else a for a in given)])
    rows = []
    for shape in shapes:
        hidden_size, vocab_size = map(int, shape.split("x"))
        num_rows = options.rows or SHAPES[device.type].get(shape, 1024)
        for dtype in options.dtype or ["float32", "bfloat16"]:
            head = make_head(num_rows, hidden_size, vocab_size, getattr(torch, dtype), device)
            for which in options.passes or PASSES:
                row = {"shape": shape, "num_rows": num_rows, "dtype": dtype, "rounds": options.rounds}
                row |= measure_row(head, which, contestants, options.rounds)
                row |= {
                    "machine": machine(device),
                    "versions": versions("torch", "triton"),
                    "absent": {c.name: c.absent for c in contestants if c.absent},
                    "command": command,
                    "date": date.today().isoformat(),
                }
                print_row(row)
                rows.append(row)
    return store(rows, options.output or RESULTS / f"head_{device.type}")


def print_row(row: dict[str, Any]) -> None:
    """Print one row before the next is measured."""
    cells = (f"{name} {_cell(entry)}" for name, entry in row["contestants"].items())
    print(
        f"{row['shape']} {row['dtype']} {row['pass']}: {row['products']} products {row['floor_seconds']:.3f} s; "
        + ", ".join(cells),
        flush=True,
    )


if __name__ == "__main__":
    main()
