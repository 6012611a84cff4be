"""The benchmark that runs the notebook: what it puts in place of a network, and that it stops where a cell fails."""

import json

from benchmarks.notebook_gpu import NOTEBOOK, cells, run


def test_the_cells_are_the_notebooks_but_for_what_needs_a_network(tmp_path):
    data = tmp_path / "data.jsonl"
    found = cells({"model": "a folder", "steps": 2}, data)
    own = [
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    assert len(found) == len(own)
    changed = [place for place, (one, other) in enumerate(zip(found, own, strict=True)) if one != other]
    assert changed == [0, 2, 3]
    given: dict[str, object] = {}
    exec(found[0], given)
    assert (given["model"], given["steps"], given["smoke"]) == ("a folder", 2, False)
    assert "missing(" not in found[2]
    assert f"'task.dataset': '{data}'" in found[3]
    assert found[3].index("task.dataset") < found[3].index("config = configure")


def test_a_cell_that_fails_ends_it(tmp_path, capsys):
    record = tmp_path / "notebook.json"
    assert run(["one = 1", "two = one + 1"], record)
    assert not run(["one = 1", "1 / 0", "three = 3"], record)
    assert [row["ended"] for row in json.loads(record.read_text())] == [True, False]
