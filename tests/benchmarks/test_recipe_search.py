"""The comparison of settings: how they are told, and what is read from the runs' folders."""

import json
from argparse import Namespace

from benchmarks.recipe_search import Run, figures, write


def test_a_run_is_a_name_and_its_overrides():
    assert Run.parse("as it stands") == Run("as-it-stands", ())
    run = Run.parse("warmed: grpo.learning_rate=3.0e-6 'grpo.optim_args=a b'")
    assert run == Run("warmed", ("grpo.learning_rate=3.0e-6", "grpo.optim_args=a b"))


def test_figures_leave_out_the_first_generation(tmp_path):
    """Which compiles: with two updates a generation, the lines from the second generation on are averaged."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"step": 0, "accuracy": 0.25}]
    for step, seconds in enumerate([{"generation": 50.0, "forward": 9.0}, {"forward": 9.0}], 1):
        lines.append({"step": step, "time": seconds, "memory": {"forward": {"allocated_peak_mib": 7.0}}})
    for step, seconds in enumerate([{"generation": 4.0, "forward": 1.0}, {"forward": 3.0}], 3):
        lines.append({"step": step, "time": seconds, "memory": {"forward": {"allocated_peak_mib": 5.0}}})
    lines[3]["reward"], lines[4]["accuracy"] = 0.5, 0.375
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = figures(folder)
    assert found == {
        "accuracy": [(0, 0.25), (4, 0.375)],
        "reward": [(3, 0.5)],
        "step_seconds": {"generation": 2.0, "forward": 2.0},
        "peak_mib": 7.0,
    }
    row = {"run": "a", "overrides": (), "status": 0, "seconds": 61.2, **found}
    write([row], Namespace(output=tmp_path, config="x.yaml", overrides=[]))
    last = (tmp_path / "search.md").read_text().splitlines()[-1]
    assert last == "| a | as it stands | 0.250 | 0.375 | 4 | 0.375 | 0.500 | 0.500 | 4.00 | 61 s |"
    assert figures(tmp_path / "nothing")["accuracy"] == []
