"""Imports run one way: train_grpo.py -> recipes, downward through its rooms, -> memhead -> torch. Without a circle."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = (  # from the ground up; those in one line stand beside each other
    {"problems", "processes", "machine", "output", "stops"}, {"escape"}, {"table"},
    {"data"}, {"rewards"}, {"tasks"}, {"config"}, {"models"}, {"plan"}, {"tracking"}, {"training"},
    {"report"}, {"notebook", "ask", "export", "minimal", "packed_trainer"},
)  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
         for folder in ("recipes", "memhead") for path in sorted((ROOT / folder).rglob("*.py"))}  # fmt: skip


def imported(path):
    """The modules that a file imports, anywhere in it: within functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in inside)


def room(module):
    return module.split(".")[1]


RECIPES = [name for name in FILES if name.startswith("recipes.")]


@pytest.mark.parametrize("module", RECIPES)
def test_recipes_import_downward(module):
    targets = [name for name in imported(FILES[module]) if name.startswith("recipes.")]
    upward = [name for name in targets if FLOOR[room(name)] > FLOOR[room(module)]]
    assert not upward, f"{module} imports {', '.join(upward)} from above it"
    assert "train_grpo" not in imported(FILES[module])


def test_no_circle():
    graph = {name: {other for other in imported(path) if other in FILES} for name, path in FILES.items()}
    assert sum(map(len, graph.values())) > 100
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("memhead")])
def test_memhead_stands_alone(module):
    tops = {name.partition(".")[0] for name in imported(FILES[module])}
    assert "recipes" not in tops
    if not module.startswith("memhead.integrations"):
        assert tops <= {"memhead", "torch", "triton", *sys.stdlib_module_names}
