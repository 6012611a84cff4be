"""The report of a run and the comparison of two, from a run folder's files."""

import io
import re

import pytest
from made_up import LONG, run_folder
from PIL import Image
from rich.console import Console

from recipes.report import compare as compare_module
from recipes.report import page as report_module
from recipes.report.model_card import _front_matter, model_card
from recipes.tracking.files import CannotWrite
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


def test_report_is_one_self_contained_page_and_a_picture_for_a_readme(tmp_path):
    folder = folder_of(tmp_path, "one", "memhead")
    page = report_module.write_report(folder).read_text()
    with Image.open(folder.path / "report.png") as picture:
        assert picture.width > 1000
    # Nothing to load: a reference is to a mark inside the same picture, an address names a kind of XML.
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import|<script|<link', page)
    assert set(re.findall(r"https?://[^\s\"<]+", page)) <= {"http://www.w3.org/1999/xlink"}
    for text in ("0.400", "0.500", "300.0 MiB", "a CPU", "impl: memhead", "&lt;b&gt;&amp;", "right 1.000"):
        assert text in page
    assert "<b>&" not in page


def test_the_verdict_stands_first_and_completions_are_first_middle_and_last(tmp_path):
    folder = run_folder(tmp_path, steps=11)
    page = report_module.write_report(folder).read_text()
    body = page[page.index("<body") :]
    sentence = "It learned: accuracy on 1000 held-out problems rose from 43.0 % to 83.0 %, by 40.0 points"
    assert 0 < body.index(sentence) < body.index("<svg")
    assert re.findall(r"<h3>(.*?)</h3>", body) == ["First: step 1", "Middle: step 6", "Last: step 11"]
    assert body.count("<details><summary><pre") == 3  # the long one of each
    assert f"all {len(LONG)} characters" in body
    assert body.count("&lt;reasoning&gt;") == 2 * 3 + 1  # head and whole of each, and the configuration
    assert "form &lt;b&gt; – · advantage −0.50" in body
    assert "<reasoning>" not in page


@pytest.mark.parametrize(
    ("text", "folded"),
    [("a" * 400, False), ("a" * 401, True), ("a\n" * 11 + "a", False), ("a\n" * 12 + "a", True)],
    ids=["400 characters", "401 characters", "12 lines", "13 lines"],
)
def test_which_texts_are_folded(text, folded):
    assert report_module.Text(text).folded is folded


@pytest.mark.parametrize(
    ("advantage", "shown"), [(0.5, "advantage +0.50"), (-1.25, "advantage −1.25"), (None, "right 1.000")]
)
def test_an_advantage_has_its_sign(advantage, shown):
    sample = {"step": 1, "prompt": "1>", "completion": "2", "rewards": {"right": 1.0}, "advantage": advantage}
    (step,) = report_module._samples([sample])
    assert step["completions"][0]["rewards"].split(" · ")[-1] == shown


def test_report_without_accuracy_or_memory(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write({"step": 1, "reward": 0.5})
    assert "1 steps are few" in report_module.write_report(folder).read_text()  # nothing learned: what to do


def test_a_machine_that_was_not_recorded_has_no_figures(tmp_path):
    folder = folder_of(tmp_path, "one", "memhead")
    (folder.path / "environment.json").unlink()
    page = report_module.write_report(folder).read_text()
    assert "not known: environment.json is missing or damaged" in page
    assert "None cores" not in page


def test_report_of_a_folder_that_is_no_run(tmp_path, capsys):
    assert report_module.main([str(tmp_path)]) == 2
    assert "give the folder of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        report_module.main(["--help"])
    assert ended.value.code == 0
    assert "RUN_FOLDER" in capsys.readouterr().out


def test_a_picture_that_finds_no_room_is_named_with_a_remedy(tmp_path):
    folder = folder_of(tmp_path, "run", "memhead")
    (folder.path / "report.png").symlink_to("/dev/full")  # which has room for nothing
    with pytest.raises(
        CannotWrite, match=r"report\.png could not be written, .* MiB are free there: .* make room"
    ):
        report_module.write_report(folder)


def test_two_runs_side_by_side(tmp_path, capsys):
    one, two = folder_of(tmp_path, "one", "memhead"), folder_of(tmp_path, "two", "full", gain=0.1)
    out = tmp_path / "both"
    assert compare_module.main([str(one.path), str(two.path), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for text in ("one", "two", "head.impl", "memhead", "full", "0.500", "0.400"):
        assert text in shown
    assert "run.name" not in shown
    assert "one and two part at step 1, the first whose completions differ in reward" in " ".join(
        shown.split()
    )
    with Image.open(out.with_name("both.png")) as picture:
        assert picture.width > 1000
    page = out.with_name("both.html").read_text()
    assert "one and two part at step 1" in page
    assert (
        page.count("Accuracy on held-out problems went from 40.0 % to 50.0 %; no interval was recorded.") == 2
    )


def test_a_key_in_which_the_last_of_three_differs_is_shown_and_names_are_no_markup(tmp_path):
    runs = [
        folder_of(tmp_path, name, impl)
        for name, impl in (("a[b]", "full"), ("two", "full"), ("three", "trl"))
    ]
    console = Console(file=io.StringIO(), width=200)
    compare_module.compare([run.path for run in runs], console=console)
    shown = console.file.getvalue()
    assert re.search(r"head\.impl\W+full\W+full\W+trl", shown)
    assert "a[b] and two are equal" in shown


def test_memory_is_labelled_by_each_runs_own_kind(tmp_path):
    one, two = folder_of(tmp_path, "one", "memhead"), folder_of(tmp_path, "two", "full")
    lines = two.metrics.path.read_text().replace("tensor_peak_mib", "allocated_peak_mib")
    two.metrics.path.write_text(lines.replace('"device": "cpu"', '"device": "cuda"'))
    console = Console(file=io.StringIO(), width=200)
    compare_module.compare([one.path, two.path], console=console)
    shown = console.file.getvalue()
    assert re.search(r"highest peak of live tensor bytes\W+300\.0 MiB\W+–", shown)
    assert re.search(r"highest peak of the CUDA allocator\W+–\W+300\.0 MiB", shown)


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


@pytest.mark.parametrize("count", [1, 6])
def test_two_to_five_runs_are_compared(tmp_path, capsys, count):
    paths = [str(folder_of(tmp_path, f"run{number}", "memhead").path) for number in range(count)]
    assert compare_module.main(paths) == 2
    assert f"runs: {count} given; give two to 5 run folders" in capsys.readouterr().err


def test_a_run_is_not_compared_with_itself(tmp_path, capsys):
    path = str(folder_of(tmp_path, "one", "memhead").path)
    assert compare_module.main([path, path, path]) == 2
    assert "is given twice" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(path)
    assert compare_module.main([path, str(tmp_path / "link")]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_wherever_they_are_given_from(tmp_path, capsys, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    for root in (tmp_path / "elsewhere", tmp_path):
        folder_of(root, "one", "memhead")
    monkeypatch.chdir(tmp_path)
    assert compare_module.main(["elsewhere/one", "one"]) == 0
    assert "elsewhere/one and one are equal" in " ".join(capsys.readouterr().out.split())


def test_the_folder_at_hand_has_its_own_name(tmp_path, capsys, monkeypatch):
    one, two = folder_of(tmp_path, "one", "memhead"), folder_of(tmp_path, "two", "memhead")
    monkeypatch.chdir(one.path)
    page = report_module.write_report(RunFolder(".")).read_text(encoding="utf-8")
    assert "<title>one</title>" in page
    assert compare_module.main([".", str(two.path)]) == 0
    assert "one and two are equal" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["both", "both.html", "both.png", "both-0.5"])
def test_a_comparison_is_written_where_it_was_asked_for(tmp_path, capsys, name):
    runs = [str(folder_of(tmp_path, name, "memhead").path) for name in ("one", "two")]
    place = tmp_path / "not" / "yet"
    assert compare_module.main([*runs, "--out", str(place / name)]) == 0
    written = name.removesuffix(".html").removesuffix(".png")
    assert sorted(path.name for path in place.iterdir()) == [f"{written}.html", f"{written}.png"]
    assert capsys.readouterr().out.endswith(f"{place / written}.html\n")


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_comparison_needs_a_name(tmp_path, capsys, out):
    runs = [str(folder_of(tmp_path, name, "memhead").path) for name in ("one", "two")]
    assert compare_module.main([*runs, "--out", out]) == 2
    assert capsys.readouterr().err.startswith(f"--out {out}: is a folder; name a file in it")


def test_figures_of_another_version_and_of_nothing_sampled_are_reported(tmp_path):
    """A phase that this source does not know counts as other; of phases without tokens there is no rate."""
    folder = folder_of(tmp_path, "one", "memhead")
    new = {
        "time": {"forward": 1.0, "dreaming": 3.0},
        "speed": {"generation": {"tokens": 0.0, "per_second": 0.0}},
    }
    folder.metrics.write({"step": 11, "reward": 0.5, "steps": 1, "device": "cpu", **new})
    folder.write_json("plan.json", {"phases": None})
    page = report_module.write_report(folder).read_text()
    assert re.search(r"<td>other</td><td class=\"n\">4\.0</td>", page)  # ten times 0.1, and 3


def test_damaged_files_of_a_run_are_named_or_left_out(tmp_path, capsys):
    folder, other = folder_of(tmp_path, "one", "memhead"), folder_of(tmp_path, "two", "full")
    lines = ['{"step": 11, "reward": NaN}', '{"step": "x", "reward": 1}', '{"step": null}', "[1]"]
    with folder.metrics.path.open("a") as metrics:
        metrics.write(
            "\n".join(
                [
                    *lines,
                    '{"step": 12, "rewards": {"a": "x"}}',
                    '{"step": 12, "rewards": 5, "time": "x"}',
                    '{"step": 13, "rew',
                ]
            )
        )
    with folder.completions.path.open("a") as completions:
        completions.write('{"a": 1}\n"x"\n')
        completions.write('{"step": 11, "prompt": "1", "completion": "2", "rewards": {"a": "1e9"}}\n')
    assert [record["step"] for record in folder.metrics.read()][-2:] == [10, 11]
    assert folder.metrics.unreadable() == [13, 14, 15, 16, 17, 18]
    assert report_module.main([str(folder.path)]) == 0
    wrong = [
        ("environment.json", '{"cpu": '),
        ("plan.json", "5"),
        ("plan.json", ""),
    ]
    for name, text in wrong:
        kept = (
            (folder.path / name).read_text()
            if (folder.path / name).exists()
            else '{"parts": {}, "phases": {}}'
        )
        (folder.path / name).write_text(text)
        (folder.path / "report.html").unlink()
        assert report_module.main([str(folder.path)]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{folder.path / name} is damaged (")
        assert line.endswith(") and is left out")
        assert (folder.path / "report.html").is_file()
        (folder.path / name).write_text(kept)
    (folder.path / "config.yaml").write_text("head: [")
    assert compare_module.main([str(folder.path), str(other.path)]) == 2
    assert f"{folder.path / 'config.yaml'}:1: not valid YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.44, "59.4 s"), (65.4, "1 min 05 s"), (3599.6, "1 h 00 min"), (3 * 3600 + 5 * 60 + 47, "3 h 05 min")],
)
def test_how_long_in_words(seconds, text):
    assert report_module.duration(seconds) == text


def test_the_card_names_the_problems_of_the_last_evaluation(tmp_path):
    folder = run_folder(tmp_path)
    last = folder.metrics.read()[-1]
    folder.metrics.write({"step": last["step"] + 1, "accuracy": 0.5, "accuracy_problems": 77})
    (folder.path / "config.yaml").write_text("model: {}\ntask: {name: a}\nrun: {}\nhead: {impl: memhead}\n")
    assert "greedy accuracy on 77 problems" in model_card(folder.path)


@pytest.mark.parametrize(("start", "told"), [("null", False), ("{steps: 5}", True)])
def test_the_card_tells_of_a_supervised_start_and_a_models_name_is_no_markup(tmp_path, start, told):
    folder = run_folder(tmp_path)
    (folder.path / "config.yaml").write_text(
        f"model: {{name: me/<b>}}\ntask: {{name: a}}\nrun: {{warm_start: {start}}}\nhead: {{impl: memhead}}\n"
    )
    opening = model_card(folder.path).split("\n## Configuration")[0]
    assert ("after a supervised start on right answers" in opening) is told
    assert "me/<b>, trained" not in opening


def test_the_card_tells_how_exact_the_head_was(tmp_path):
    folder = run_folder(tmp_path)
    (folder.path / "config.yaml").write_text("model: {}\ntask: {name: a}\nrun: {}\nhead: {impl: memhead}\n")
    assert "The head was called" not in model_card(folder.path)
    folder.write_json("head.json", {"calls": 123, "rows": 4567})
    errors = {"logprob_error": 2.5e-7, "gradient_error": 4e-6}
    folder.write_json("head_check.json", {"memhead": errors, "full_logits": dict.fromkeys(errors, 1.0)})
    said = "largest error of a log-probability 2.5e-07, error of the gradient 4.0e-06."
    assert f"The head was called 123 times. Against full logits in float64 at the start: {said}" in (
        model_card(folder.path)
    )


@pytest.mark.parametrize(
    ("name", "named"),
    [("org/model", True), ("model", False), ("home/me/model", False), ("/model", False), ("./model", False),
     ("~/model", False), (None, False)],
)  # fmt: skip
def test_a_card_names_what_lies_on_the_hub_and_no_path_of_this_machine(name, named):
    text = _front_matter({"model": {"name": name}, "task": {"dataset": name}})
    assert ("base_model: org/model" in text, "- org/model" in text) == (named, named)
    assert named or "model\n" not in text


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (
            "task: {name: countdown, rewards: {correct: 1.0, well_formed: 0.0}}",
            {"correct": 1.0, "well_formed": 0.0},
        ),
        ("task: {name: countdown, rewards: null}", {}),
        ("task: {name: countdown, rewards: [correct]}", {}),
        ("task: countdown", {}),
        ("task: {", {}),
        ("", {}),
    ],
)
def test_the_weights_of_a_runs_rewards_are_those_of_its_configuration(config, weights):
    assert report_module._weights(config) == weights
