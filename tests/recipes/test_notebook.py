"""A run in a separate process: its output, status and interruption reach the process that started it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from spoken import fail, interrupted_as_it_ends, say, speak, work_until_interrupted
from tiny import made_up_checkpoint

import train_grpo
from recipes.config.load import ConfigError
from recipes.config.source import read_overrides
from recipes.notebook import RunFailed, _overrides, apart, configure, judged, run_apart

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


@pytest.mark.parametrize("status", [0, 3])
def test_output_of_every_kind_and_the_status_arrive(capsys, status):
    assert apart(speak, status) == status
    assert sorted(capsys.readouterr().out.splitlines()) == ["err", "from below", "out ×"]


def test_what_it_says_after_ctrl_c_is_still_shown(tmp_path, capsys):
    begun = tmp_path / "begun"

    def interrupt():
        while not begun.exists():
            time.sleep(0.05)
        for pid in (os.getpid(), int(begun.read_text())):  # as a notebook does: both
            os.kill(pid, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert apart(work_until_interrupted, str(begun)) == 130
    assert "finishing the step" in capsys.readouterr().out


def test_ctrl_c_while_the_process_ends_changes_neither_its_status_nor_its_last_words(capsys):
    """A double press in a notebook: a traceback followed the last sentence, or the status was that of the signal."""
    assert apart(interrupted_as_it_ends, 130) == 130
    assert capsys.readouterr().out == "stopped\n"


def test_a_script_may_call_it_at_its_top_level(tmp_path):
    """The notebook's twin is one: it must not be run again in the process that it starts."""
    script = tmp_path / "script.py"
    script.write_text(
        "from spoken import speak\nfrom recipes.notebook import apart\nprint('status', apart(speak, 3))\n"
    )
    places = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
    )
    assert sorted(done.stdout.splitlines()) == ["err", "from below", "out ×", "status 3"]
    assert done.stderr == ""


def test_a_mistake_is_found_before_a_process_starts(tmp_path):
    with pytest.raises(ConfigError, match="learning_rate"):
        run_apart(train_grpo.main, CONFIG, {"grpo.learning_rat": 1})


def test_a_run_that_fails_says_so(capsys):
    with pytest.raises(RunFailed, match="quickstart ended with exit status 2"):
        run_apart(fail, CONFIG, {"run.seed": 3})
    assert "command line: run.seed=3 is refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value",
    [
        None,
        "007",
        "null",
        "",
        "true",
        True,
        5e-6,
        "5e-6",
        7,
        "a: b",
        "two\nlines",
        [1, "2"],
        {"a.b": "0x1"},
        "é😀",
    ],
)
def test_a_setting_keeps_its_type(value):
    """In the notebook's own process and in the run's, which gets a command line."""
    (argument,) = _overrides({"some.key": value})
    found = read_overrides([argument]).data["some"]["key"]
    assert (found, type(found)) == (value, type(value))


def test_settings_of_a_notebook(tmp_path):
    config = configure(CONFIG, {"run.name": "007", "run.warm_start": None, "run.output_root": tmp_path})
    assert (config.run.name, config.run.warm_start) == ("007", None)
    assert config.run.output_root == str(tmp_path)
    with pytest.raises(ConfigError, match=r"head\.chunk: cannot be written as YAML"):
        configure(CONFIG, {"head.chunk": object()})


def test_a_right_and_a_wrong_answer_are_judged_before_training(tmp_path):
    asked, (right, wrong) = judged(configure(CONFIG, {}).make_task())
    assert re.fullmatch(r"\d{3}>\d\d=", asked)
    assert right[0] == "right"
    assert right[2] == {"correct": 1.0, "well_formed": 1.0}
    assert wrong[0] == "wrong"
    assert wrong[2]["correct"] == 0.0
    lines = [json.dumps({"question": f"{n} nuts?", "answer": f"so #### {n}"}) for n in range(20)]
    (tmp_path / "nuts.jsonl").write_text("\n".join(lines))
    own = {"task.dataset": str(tmp_path / "nuts.jsonl"), "task.held_out": 4}
    asked, (right, wrong) = judged(configure(CONFIG.replace("quickstart", "gsm8k_scratch"), own).make_task())
    number = asked.split()[0]
    assert f"<answer>\n{number}\n</answer>" in right[1]
    assert (right[2]["correctness"], wrong[2]["correctness"]) == (1.0, 0.0)
    assert right[2]["strict_format"] == 1.0


def test_a_session_that_was_lost_is_gone_on_with(tmp_path, capsys):
    settings = {"run.output_root": str(tmp_path)}
    (tmp_path / "quickstart").mkdir()
    run_apart(say, CONFIG, settings, resume=True)
    assert "--resume" not in capsys.readouterr().out  # there is no checkpoint
    made_up_checkpoint(tmp_path / "quickstart", 3)
    run_apart(say, CONFIG, settings, resume=True)
    assert "--resume" in capsys.readouterr().out
    run_apart(say, CONFIG, settings)
    assert "--resume" not in capsys.readouterr().out
