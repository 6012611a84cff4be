"""docs/rewards.md opens with a whole reward and its command: they are followed to the letter, in few steps."""

import contextlib
import io
import json
import shlex
import sys

import pytest
from published import ROOT, blocks

import train_grpo
from recipes import ask
from recipes.models.manifest import damage

TINY = [
    "model.scratch.layers=1",
    "grpo.max_steps=2",
    "run.save_every=2",
    "grpo.per_device_train_batch_size=16",
    "run.warm_start.steps=2",
    "run.warm_start.batch_size=8",
    "run.evaluation.size=8",
]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """Where the page was followed, and what the run printed."""
    place, page = tmp_path_factory.mktemp("followed"), ROOT / "docs" / "rewards.md"
    (place / "my_rewards.py").write_text(blocks(page, "python")[0], encoding="utf-8")
    python, script, *words = shlex.split(blocks(page, "")[0])
    assert (python, script) == ("python", "train_grpo.py")
    (place / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(place)
        patch.setattr(
            sys, "path", [*sys.path]
        )  # the folder comes first in it: my_rewards is imported from there
        patch.setitem(sys.modules, "unsloth", None)
        assert train_grpo.main([*words, *TINY]) == 0
    assert sys.modules.pop("my_rewards").__file__ == str(place / "my_rewards.py")
    return place / "runs" / "quickstart", printed.getvalue()


def test_the_rewards_are_weighed_in(followed):
    lines = [json.loads(line) for line in (followed[0] / "metrics.jsonl").read_text().splitlines()]
    (first, *_) = [line for line in lines if "rewards" in line]
    given = first["rewards"]
    weights = {"correct": 1.0, "my_rewards.short": 0.2, "my_rewards.starts_with_the_largest": 0.1}
    # The base file's well_formed stays, at its weight of 0.
    assert set(given) == {*weights, "well_formed"}
    assert first["reward"] == pytest.approx(sum(weight * given[name] for name, weight in weights.items()))
    assert given["my_rewards.short"] > 0


def test_the_terminal_says_what_happens(followed):
    folder, printed = followed
    lines = printed.splitlines()
    assert lines[0] == "Reading configs/quickstart.yaml"
    first = "quickstart: a new Llama (scratch, every weight) learns countdown by GRPO; head memhead, step packed, on "
    assert lines[1].startswith(first)
    assert lines[2] == "Everything is kept in runs/quickstart"
    assert "GRPO learns from what the model itself writes" in lines[3]
    assert any(line.startswith("before GRPO: accuracy 0.") for line in lines)
    assert any(
        line.startswith("after GRPO: accuracy 0.") and "of 8 held-out problems" in line for line in lines
    )
    assert "report:     runs/quickstart/report.html" in lines
    assert "ask it:     python -m recipes.ask runs/quickstart" in lines
    assert "Not shown to have learned" in printed
    assert lines[-1].endswith("docs/troubleshooting.md#the-reward-stays-flat")
    assert "Writing model shards" not in printed
    assert folder.is_dir()


def test_the_troubleshooting_page_names_every_field_of_the_metrics(followed):
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.partition("## What metrics.jsonl holds")[2].partition("\n## ")[0]
    for line in (followed[0] / "metrics.jsonl").read_text().splitlines():
        for field in json.loads(line):
            assert f"`{field}`" in table, field


def test_checkpoints_and_the_final_model_carry_our_card(followed):
    folder, _ = followed
    for place in (folder / "checkpoints" / "checkpoint-2", folder / "final", folder / "checkpoints"):
        card = (place / "README.md").read_text(encoding="utf-8")
        assert "trained by GRPO after a supervised start" in card, place
        assert "my_rewards.short" in card  # the configuration
        assert "[More Information Needed]" not in card
    assert damage(folder / "checkpoints" / "checkpoint-2") == ""  # the card is among what was summed


def test_the_model_is_asked_as_the_last_line_says(followed, monkeypatch, capsys):
    folder, _ = followed
    monkeypatch.setitem(sys.modules, "unsloth", None)
    assert ask.main([str(folder), "357>26=", "--base"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("──")] == [
        "── after training",
        "── before training",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("123>06=\nhello\n\n"))
    assert ask.main([str(folder)]) == 0
    talked = capsys.readouterr().out
    assert talked.count("> ") == 3
    assert talked.count("no token for some of that") == 1  # of hello
