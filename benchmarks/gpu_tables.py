"""The results of :mod:`benchmarks.head_gpu` as Markdown and as a picture.

python -m benchmarks.gpu_tables benchmarks/results/head_h100.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OURS, FLOOR = "memhead", "bare products"
CLIPPED = 4.0  # longer bars of the picture end here; the figures beside them say how long they are


def write(path: Path) -> None:
    """``head_x.md`` and ``head_x.png`` beside ``head_x.json``."""
    results = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(results))
    plot(results, path.with_suffix(".png"))


def markdown(results: dict[str, Any]) -> str:
    """One table per model, length and distribution; then the errors."""
    versions = ", ".join(f"{name} {release}" for name, release in results["versions"].items())
    lines = [
        "# The head on a GPU",
        "",
        f"{results['machine']}; {versions}; {results['date']}. `{results['command']}`",
        "",
        "bf16. Milliseconds, multiples of the bare products, and in brackets MiB at the peak above inputs and",
        "results. The bare products of *trainable* are four, of *cross entropy* three: full logits, which keep",
        "their logits, need three for either. Peaked: mean p of the target 0.7.",
    ]
    if "stopped" in results:
        lines += ["", f"Stopped {results['stopped']}."]
    for row in _grouped(results["rows"]):
        lines += ["", *_table(row)]
    lines += ["", "## Errors against float64, 2048 rows", "", *_errors(results["errors"])]
    for name, why in results["absent"].items():
        lines += ["", f"Absent: {name}: {why}."]
    return "\n".join(lines) + "\n"


def _grouped(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[str, int, bool], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["shape"]["name"], row["num_rows"], row["peaked"]), []).append(row)
    return list(groups.values())


def _table(rows: list[dict[str, Any]]) -> list[str]:
    shape = rows[0]["shape"]
    names = list(dict.fromkeys(name for row in rows for name in row["contestants"]))
    cap = f", softcap {shape['softcap']:g}" if shape["softcap"] else ""
    lines = [
        f"## {shape['name']} ({shape['hidden_size']} × {shape['vocab_size']}{cap}), "
        f"N = {rows[0]['num_rows']}, {'peaked' if rows[0]['peaked'] else 'near-uniform'} logits",
        "",
        "| | " + " | ".join(row["pass"] for row in rows) + " |",
        "|---|" + "---|" * len(rows),
    ]
    for name in names:
        bold = "**" if name == OURS else ""
        lines.append(f"| {bold}{name}{bold} | " + " | ".join(_cell(row, name) for row in rows) + " |")
    return lines


def _cell(row: dict[str, Any], name: str) -> str:
    entry = row["contestants"].get(name)
    if entry is None:
        return "–"
    if "ms" not in entry:
        return "out of memory"
    if name == FLOOR:
        return f"{entry['ms']:.1f} ms ({row['products']} products)"
    return f"{entry['ms']:.1f} ms, {entry['ratio']:.2f}× ({entry['peak_mib']:.0f})"


def _errors(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model, logits | | log-probability, largest | mean | hidden gradient, relative |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        label = f"{row['shape']}, {'peaked' if row['peaked'] else 'near-uniform'}"
        for name, entry in row["contestants"].items():
            if entry:
                values = (entry["logprob_max"], entry["logprob_mean"], entry["gradient"])
                lines.append(f"| {label} | {name} | " + " | ".join(f"{v:.1e}" for v in values) + " |")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Time and memory at the first shape, one panel per pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = _grouped(results["rows"])[0]
    rows = [row for row in rows if row["pass"] in ("frozen", "no gradient", "trainable")]
    figure, axes = plt.subplots(1, len(rows), figsize=(5.4 * len(rows), 4.2), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        timed = [(name, e) for name, e in row["contestants"].items() if "ms" in e and name != FLOOR]
        timed.sort(key=lambda item: -item[1]["ratio"])
        names = [name for name, _ in timed]
        widths = [min(entry["ratio"], CLIPPED) for _, entry in timed]
        axis.barh(names, widths, color=["C3" if name == OURS else "C0" for name in names])
        for place, (_, entry) in enumerate(timed):
            label = f"{entry['ratio']:.2f}×, {entry['peak_mib']:,.0f} MiB"
            far = entry["ratio"] > CLIPPED / 2
            axis.text(
                widths[place] + (-0.05 if far else 0.05), place, label, va="center", fontsize=8,
                ha="right" if far else "left", color="white" if far else "black",
            )  # fmt: skip
        axis.axvline(1, color="grey", linewidth=0.8, linestyle="--")
        axis.set(xlim=(0, CLIPPED), xlabel="time, multiples of the bare products; peak memory beside it")
        axis.set_title(f"{row['pass']} ({row['products']} product{'s' if row['products'] > 1 else ''})")
        axis.tick_params(axis="y", labelsize=8)
    shape = rows[0]["shape"]
    figure.suptitle(f"{shape['name']} head, N = {rows[0]['num_rows']}, {results['machine']}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
