"""The notebook: runs completely on a CPU with its smoke setting, matches its twin, is committed without outputs."""

import base64
import json
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "grpo_llama3_1_8b.ipynb"
NOISE = re.compile(r"Traceback|Warning|warning:|Error\b")


def cells(path):
    return [
        (cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in jupytext.read(path).cells
    ]


def test_the_twins_are_in_step():
    assert cells(NOTEBOOK) == cells(NOTEBOOK.with_suffix(".py"))


def test_it_is_committed_without_outputs():
    code = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_the_badge_opens_what_the_install_cell_clones():
    text = NOTEBOOK.with_suffix(".py").read_text()
    opened = re.search(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/(\S+)\)", text)
    cloned = re.search(r"https://github\.com/([\w.-]+/[\w.-]+)\"", text)
    assert opened[1] == cloned[1]
    assert ROOT / opened[2] == NOTEBOOK
    for name in re.findall(r"requirements-\w+\.lock|(?:configs|notebooks)/[\w.]+\.yaml|docs/\w+\.md", text):
        assert (ROOT / name).is_file()


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run of every cell, and the folder that it wrote to."""
    output = tmp_path_factory.mktemp("runs")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (form,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in {"smoke": True, "output": str(output), "compare_steps": 3}.items():
        form.source, replaced = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", form.source)
        assert replaced == 1
    NotebookClient(notebook, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    return notebook, output


def outputs(notebook, call):
    """The outputs of the one cell that contains `call`."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and call in cell.source)
    return cell.outputs


def text(notebook, call):
    return "".join(o.get("text") or o["data"].get("text/plain", "") for o in outputs(notebook, call))


def pictures(notebook, call):
    data = [o["data"] for o in outputs(notebook, call) if o.output_type == "display_data"]
    return [base64.b64decode(entry["image/png"]) for entry in data if "image/png" in entry]


@pytest.mark.slow
def test_every_cell_runs_without_noise(executed):
    for cell in executed[0].cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            shown = output.get("text") or str(output.data.get("text/plain", ""))
            assert not NOISE.search(shown), shown


@pytest.mark.slow
def test_it_trains_and_shows_the_report(executed):
    notebook, output = executed
    lines = (output / "smoke" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6
    assert "step 6/6" in text(notebook, "run = run_apart(")
    assert "← peak" in text(notebook, "planned.print()")
    assert pictures(notebook, '"report.png"') == [(output / "smoke" / "report.png").read_bytes()]
    assert "model.safetensors" in text(notebook, "apart(export.main")
    assert (output / "smoke" / "final" / "README.md").is_file()


@pytest.mark.slow
def test_it_says_what_the_machine_has_and_how_answers_are_judged(executed):
    notebook, _ = executed
    assert re.search(r"GiB of disk free, [\d.]+ GiB of main memory", text(notebook, "cards()"))
    assert "nothing to install" in text(notebook, "lacking = ")
    said = text(notebook, "judged(config.make_task())")
    assert re.search(
        r"── right: correct 1, well_formed 1\n\S+\n\n── wrong: correct 0, well_formed [01]\n", said
    ), said
    assert "Prompt" in text(notebook, "run = run_apart(")  # completions are shown while it trains


@pytest.mark.slow
def test_it_answers_before_and_after(executed):
    said = text(executed[0], "ask(config, run, question)")
    answer = r"training: (?:right|wrong)\n\S+\n"
    assert re.search(rf"question\n\d{{3}}>\d+=\n.*before {answer}.*after {answer}", said, re.DOTALL), said


@pytest.mark.slow
def test_both_heads_train_alike_and_are_laid_side_by_side(executed):
    notebook, output = executed
    rewards, entropies = {}, {}
    for impl in ("memhead", "full"):
        folder = output / f"short-{impl}"
        head = json.loads((folder / "head.json").read_text())
        assert head["impl"] == impl
        assert head["calls"] >= 3
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        records = [record for record in records if "reward" in record]
        rewards[impl] = [record["reward"] for record in records]
        entropies[impl] = [record["entropy"] for record in records]
    assert len(rewards["full"]) == 3
    assert rewards["memhead"] == pytest.approx(rewards["full"], abs=0.02)
    assert entropies["memhead"] == pytest.approx(entropies["full"], rel=0.01)
    table = text(notebook, "compare([")
    assert "short-memhead" in table
    assert re.search(r"head\.impl\W+memhead\W+full", table)
    assert pictures(notebook, "compare([") == [(output / "smoke" / "side_by_side.png").read_bytes()]
    alone = text(notebook, "display(side_by_side(*size))")
    ours, full = map(float, re.search(r"peak MiB\D+([\d.]+)\D+([\d.]+)", alone).groups())
    assert ours < full / 5
    for what in ("log-probability", "gradient, relative"):
        errors = re.search(rf"{what}\W+([\d.]+e-\d+)\W+([\d.]+e-\d+)", alone).groups()
        ours, full = map(float, errors)
        assert 0 < ours < 2 * full + 1e-6
