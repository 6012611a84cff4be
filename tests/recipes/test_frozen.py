"""What is one value stays one: a dataclass is frozen, unless it is named here as something that changes."""

import ast

from test_imports import FILES

CHANGES = {
    "Truncated",  # counts the calls of a head
    "Document",  # overrides are put into it
    "Rollout",  # its bins are cut when they are asked for
    "EntropyMeter",
    "StepMeter",
    "SamplingGap",
    "RatioMeter",
    "_Call",  # of a reward, seen from outside: its time runs down
}


def test_a_dataclass_is_frozen():
    found = {}
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else []:
                if ast.unparse(decorator).startswith("dataclass"):
                    found[node.name] = "frozen=True" in ast.unparse(decorator)
    assert {name for name, frozen in found.items() if not frozen} == CHANGES
    assert len(found) > 40
