"""The report of a run and the comparison of two, from a run folder's files."""

import re

import pytest
from PIL import Image

from recipes.report import compare as compare_module
from recipes.report import page as report_module
from recipes.report.plots import smooth
from recipes.tracking.run_folder import RunFolder


def folder_of(root, name, impl, *, gain=0.2):
    """A run folder with made-up lines: the files of a short run."""
    folder = RunFolder(root / name)
    folder.path.mkdir()
    folder.metrics.write({"step": 0, "accuracy": 0.4})
    for step in range(1, 11):
        memory = {
            "forward": {"tensor_peak_mib": 300.0, "resident_mib": 900.0},
            "backward": {"resident_mib": 950.0},
        }
        figures = {"reward": 0.3 + gain * step / 10, "reward_std": 0.2, "steps": 1, "device": "cpu"}
        folder.metrics.write(
            {"step": step, **figures, "time": {"forward": 0.1, "other": 0.1}, "memory": memory}
        )
    folder.metrics.write({"step": 10, "accuracy": 0.5})
    sample = {
        "prompt": "1<2>",
        "completion": "<b>&",
        "rewards": {"right": 1.0, "none": None},
        "advantage": 0.0,
    }
    folder.completions.append({"step": 1, **sample})
    folder.write_json(
        "environment.json", {"cpu": "a CPU", "packages": {"torch": "2"}, "command": ["train_grpo.py"]}
    )
    (folder.path / "config.yaml").write_text(f"head:\n  impl: {impl}\nrun:\n  name: {name}\n")
    return folder


def test_report_is_one_picture_and_one_self_contained_page(tmp_path):
    folder = folder_of(tmp_path, "one", "memhead")
    page = report_module.write_report(folder).read_text()
    with Image.open(folder.path / "report.png") as picture:
        assert picture.width > 1000
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    for text in ("0.400", "0.500", "300.0 MiB", "a CPU", "impl: memhead", "&lt;b&gt;&amp;", "right 1.000"):
        assert text in page
    assert "<b>" not in page


def test_report_without_accuracy_or_memory(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write({"step": 1, "reward": 0.5})
    assert report_module.write_report(folder).is_file()


def test_report_of_a_folder_that_is_no_run(tmp_path, capsys):
    assert report_module.main([str(tmp_path)]) == 2
    assert "give the folder of a run" in capsys.readouterr().err


def test_two_runs_side_by_side(tmp_path, capsys):
    one, two = folder_of(tmp_path, "one", "memhead"), folder_of(tmp_path, "two", "full", gain=0.1)
    out = tmp_path / "both"
    assert compare_module.main([str(one.path), str(two.path), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for text in ("one", "two", "head.impl", "memhead", "full", "0.500", "0.400"):
        assert text in shown
    assert "run.name" not in shown
    assert out.with_name("both.png").is_file()
    assert "data:image/png;base64," in out.with_name("both.html").read_text()


def test_memory_is_labelled_by_each_runs_own_kind(tmp_path, capsys):
    one, two = folder_of(tmp_path, "one", "memhead"), folder_of(tmp_path, "two", "full")
    lines = two.metrics.path.read_text().replace("tensor_peak_mib", "allocated_peak_mib")
    two.metrics.path.write_text(lines.replace('"device": "cpu"', '"device": "cuda"'))
    compare_module.compare([one.path, two.path])
    shown = capsys.readouterr().out
    assert re.search(r"highest peak of live tensor\W+300\.0 MiB\W+–", shown)
    assert re.search(r"highest peak of the CUDA\W+–\W+300\.0 MiB", shown)


def test_a_value_with_tags_stays_text(tmp_path):
    one, two = folder_of(tmp_path, "one", "memhead"), folder_of(tmp_path, "two", "full")
    (two.path / "config.yaml").write_text("task: {prompt: 'think in <reasoning>[bold]'}")
    page = compare_module.compare([one.path, two.path], tmp_path / "both").read_text()
    assert "think in &lt;reasoning&gt;[bold]" in page
    assert "<reasoning>" not in page


def test_comparison_names_the_folder_that_is_no_run(tmp_path):
    one = folder_of(tmp_path, "one", "memhead")
    with pytest.raises(FileNotFoundError, match="nothing"):
        compare_module.compare([one.path, tmp_path / "nothing"])


def test_smoothing_keeps_length_and_mean_of_a_constant():
    assert smooth([2.0] * 100) == [2.0] * 100
    assert smooth([1.0]) == [1.0]
    assert smooth([]) == []
