"""Mutants by cosmic-ray, tests in forks of a warm process: `make mutants`, and the table of docs/testing.md.

    python tests/mutants/run.py --python .venv/bin/python [--most 60 [--start 2]] [module.py …]

Runs in an environment that has cosmic-ray; `--python` is the one that has what the tests need. Everything happens in a
copy of the tree. `--most`: of each module so many mutants at most, evenly spread over it; `--start`: from another one
on, which gives other mutants.
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import warm
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult
from tree import ROOT, copy_tree

# Of the dozen operators that may take another's place, the one or two that say most. An `X | None` is an annotation.
KEPT = re.compile(
    r"core/(?!ReplaceBinary|ReplaceComparison|ReplaceUnary|Variable|NoOp)"
    r"|core/ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_FloorDiv|Pow_Mul|BitAnd_BitOr)"
    r"|core/ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_(LtE|GtE)|LtE_(Lt|Gt)|Gt_(GtE|LtE)|GtE_(Gt|Lt)|Is_IsNot|IsNot_Is)"
    r"|core/ReplaceUnaryOperator_(USub_UAdd|Delete_Not|Delete_USub)"
)
CONFIG = """\
[cosmic-ray]
module-path = "{module}"
timeout = {timeout:.0f}.0
excluded-modules = []
test-command = {command!r}
[cosmic-ray.distributor]
name = "local"
"""


def silent_places(source: str) -> set[tuple[int, int]]:
    """Line and column of every character of an annotation, which nobody evaluates, and of a signature's bare `*`."""
    spans = (
        node.annotation if isinstance(node, (ast.arg, ast.AnnAssign)) else node.returns
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.arg, ast.AnnAssign, ast.FunctionDef))
    )
    annotations = {
        (span.lineno, column)
        for span in spans
        if span
        for column in range(span.col_offset, span.end_col_offset)
    }
    stars = {
        (number, match.start())
        for number, line in enumerate(source.splitlines(), 1)
        for match in re.finditer(r"\*,", line)
    }
    return annotations | stars


def choose(session: Path, source: str, most: int | None, start: int) -> int:
    """Passes over all but the mutants that are to be run; returns how many there would be."""
    silent = silent_places(source)
    with use_db(session, WorkDB.Mode.open) as db:
        items = sorted(
            db.work_items, key=lambda item: (item.mutations[0].start_pos, item.mutations[0].operator_name)
        )
        wanted = [
            item for item in items
            if KEPT.match(item.mutations[0].operator_name) and item.mutations[0].start_pos not in silent
        ]  # fmt: skip
        count = len(wanted)
        if most is not None and count > most:
            wanted = [wanted[(start + place * count // most) % count] for place in range(most)]
        kept = {item.job_id for item in wanted}
        passed_over = WorkResult(
            output="passed over", test_outcome=None, worker_outcome=WorkerOutcome.SKIPPED
        )
        for item in items:
            if item.job_id not in kept:
                db.set_result(item.job_id, passed_over)
    return count


def results(session: Path) -> list[Any]:
    """(mutation, result) of those that ran."""
    with use_db(session, WorkDB.Mode.open) as db:
        found = {job: result for job, result in db.results if result.worker_outcome == WorkerOutcome.NORMAL}
        return [(item.mutations[0], found[item.job_id]) for item in db.work_items if item.job_id in found]


def same_numbers(diff: str) -> bool:
    """Whether a change is one of spelling: 1e30 and one more are the same number."""
    sides = (
        [line[1:] for line in diff.splitlines() if line.startswith(sign) and not line.startswith(3 * sign)]
        for sign in "-+"
    )
    number = re.compile(r"\s*\b\d+(?:\.\d*)?(?:[eE][-+]?\d+)?\b")
    before, after = (number.sub(lambda match: repr(float(match[0])), "".join(side)) for side in sides)
    return before == after


def run(
    module: str, tests: str, tree: Path, socket: str, python: str, *, most: int | None, start: int
) -> str:
    """One module's row of the table; what survives is printed."""
    words, began = shlex.split(tests), time.monotonic()
    status, output = warm.ask(socket, 600, words)
    if status:
        raise SystemExit(f"{module}: its tests fail without any change\n{output}")
    seconds = time.monotonic() - began
    timeout = max(30.0, 4 * seconds)
    command = [python, str(ROOT / "tests/mutants/warm.py"), "ask", socket, f"{timeout:.0f}", *words]
    session, config = tree.with_name("session.sqlite"), tree.with_name("mutants.toml")
    session.unlink(missing_ok=True)
    config.write_text(CONFIG.format(module=module, timeout=timeout + 20, command=shlex.join(command)))
    ray = [str(Path(sys.executable).with_name("cosmic-ray"))]
    subprocess.run([*ray, "init", str(config), str(session)], cwd=tree, check=True, stdout=subprocess.DEVNULL)
    count = choose(session, (tree / module).read_text(), most, start)
    subprocess.run([*ray, "exec", str(config), str(session)], cwd=tree, check=True)
    found = [pair for pair in results(session) if not same_numbers(pair[1].diff)]
    survived = [pair for pair in found if pair[1].test_outcome == TestOutcome.SURVIVED]
    for mutation, result in survived:
        changed = [line for line in result.diff.splitlines() if re.match(r"[-+][^-+]", line)]
        print(
            f"survived  {module}:{mutation.start_pos[0]}  {mutation.operator_name}",
            *changed,
            sep="\n    ",
            flush=True,
        )
    caught = len(found) - len(survived)
    share = f"{100 * caught / len(found):.1f} %" if found else "–"
    return f"| `{module}` | {count} | {len(found)} | {caught} | {len(survived)} | {share} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="with what the tests need")
    parser.add_argument("--most", type=int, help="mutants of a module, evenly spread")
    parser.add_argument("--start", type=int, default=0, help="the first of them; default: 0")
    parser.add_argument("modules", nargs="*", help="of modules.toml; default: all")
    options = parser.parse_args()
    table = tomllib.loads((ROOT / "tests/mutants/modules.toml").read_text())["modules"]
    python = str(Path(options.python).absolute())
    rows = []
    with tempfile.TemporaryDirectory() as place:
        tree, socket = Path(place) / "tree", f"{place}/socket"
        tree.mkdir()
        copy_tree(tree)
        server = subprocess.Popen([python, str(tree / "tests/mutants/warm.py"), "serve", socket], cwd=tree)
        try:
            for module in options.modules or table:
                chosen = {"most": options.most, "start": options.start}
                rows.append(run(module, table[module]["tests"], tree, socket, python, **chosen))
                print(rows[-1], flush=True)
        finally:
            server.kill()
    print(
        "\n| module | mutants | run | caught | survive | caught of those run |",
        "|---|---|---|---|---|---|",
        *rows,
        sep="\n",
    )


if __name__ == "__main__":
    main()
