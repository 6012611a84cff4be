"""The notebook's cells, one after another in one IPython shell, as a user runs them: seconds of each.

    python -m benchmarks.notebook_gpu --output DIR                    # on a GPU with Unsloth and vLLM
    python -m benchmarks.notebook_gpu --output DIR --shape llama-1b   # sooner
    python -m benchmarks.notebook_gpu --output DIR --untrained        # what needs no trained model, the comparison too
    python -m benchmarks.notebook_gpu --output DIR --smoke --cells 3  # the first three, on a CPU

Without a network: random weights of the Llama-3.1-8B architecture in place of the model, or of a smaller one; questions
in GSM8K's form in place of the data; nothing is installed. Two steps, completions of 256 tokens, the merge on. Needs
IPython. Written after each cell: notebook.json. Status 1 if a cell failed; those after it are not run.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from benchmarks.flagship_gpu import make_model

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "grpo_llama3_1_8b.ipynb"


def cells(settings: dict[str, Any], data: Path | None) -> list[str]:
    """The code cells with these parameters. data: a file of a few hundred questions; None: the configuration's own."""
    found = [
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    for name, value in settings.items():
        found[0], replaced = re.subn(
            rf"(?m)^{name} = .*$", lambda _, v=value, n=name: f"{n} = {v!r}", found[0]
        )
        assert replaced == 1, name
    whole = "\0".join(found).replace('missing("requirements-cuda.lock")', "[]")
    if data is not None:
        configured = "config = configure(path, settings)"
        few = {"task.dataset": str(data), "task.held_out": 64, "run.evaluation.size": 16}
        whole = whole.replace(configured, f"settings |= {few}\n{configured}")
    return whole.split("\0")


def untrained(sources: list[str]) -> list[str]:
    """Without the run, its picture, answers and export; the comparison's picture goes to a folder of its own."""
    first, last = (
        next(i for i, source in enumerate(sources) if source.startswith(line))
        for line in ("import train_grpo", "from benchmarks.side_by_side")
    )
    in_their_place = (
        "import train_grpo\n"
        "from IPython.display import Image, display\n"
        "from recipes.tracking.run_folder import RunFolder\n"
        'run = RunFolder(Path(output) / "untrained")'
    )
    return [*sources[:first], in_their_place, *sources[last:]]


def run(sources: list[str], record: Path) -> bool:
    """Whether all of them ended well; their seconds and first lines go to `record` one by one."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    rows: list[dict[str, Any]] = []
    for source in sources:
        began = time.perf_counter()
        result = shell.run_cell(source)
        row = {
            "cell": source.splitlines()[0],
            "seconds": time.perf_counter() - began,
            "ended": result.success,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        record.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if not result.success:
            return False
    return True


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", choices=["llama-1b", "llama-8b"], default="llama-8b")
    parser.add_argument("--cells", type=int, help="so many from the top, all without")
    parser.add_argument(
        "--untrained", action="store_true", help="leave out what trains, shows and exports a run"
    )
    parser.add_argument("--smoke", action="store_true", help="the notebook's own setting for a CPU")
    options = parser.parse_args(argv)
    root = options.output.resolve()
    settings: dict[str, Any] = {"output": str(root / "runs"), "compare_steps": 2}
    data = None
    if options.smoke:
        settings["smoke"] = True
    else:
        place, data = root / "model", root / "model" / "data.jsonl"
        if not place.is_dir():
            make_model(place, toy=False, name=options.shape)
        settings |= {"model": str(place), "steps": 2, "completion_length": 256, "merge": True}
    root.mkdir(parents=True, exist_ok=True)
    sources = cells(settings, data)
    sources = untrained(sources) if options.untrained else sources
    return int(not run(sources[: options.cells], root / "notebook.json"))


if __name__ == "__main__":
    raise SystemExit(main())
