"""docs/tasks.md, followed to the letter in a copy of the source: the task, its config, its plan, its rewards."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
CODE = """
import sys
sys.modules["unsloth"] = None
from recipes.config.load import load_config
from recipes.training.rewards import prepare
config = load_config("configs/reverse.yaml")
task = config.make_task()
rewards = prepare(task)
assert [function.__name__ for function in rewards.functions] == ["correct", "length"], rewards
assert rewards.weights == [1.0, 0.0], rewards
assert not set(task.train["word"]) & set(task.held_out["word"])
assert len(task.held_out[0]["word"]) == 5
assert rewards.functions[0](completions=["edcba", "abcde"], word=["abcde", "abcde"]) == [1.0, 0.0]
print("followed")
"""


def test_the_page_works_as_it_stands(tmp_path):
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    python, yaml = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "yaml"))
    lines = [line for line in python.splitlines() if line.strip()]
    assert len(lines) <= 40
    for name in ("recipes", "configs", "memhead"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_grpo.py", tmp_path)
    (tmp_path / "recipes" / "tasks" / "reverse.py").write_text(python, encoding="utf-8")
    (tmp_path / "configs" / "reverse.yaml").write_text(yaml, encoding="utf-8")

    def run(*arguments):
        call = [sys.executable, *arguments]
        return subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    followed = run("-c", CODE)
    assert followed.stdout.strip() == "followed", followed.stderr
    command = re.search(r'python (train_grpo\.py .*?) --plan --device "16 GB"', page)[1]
    planned = run(*command.split(), "--plan", "--device", "16 GB")
    assert planned.returncode == 0, planned.stderr
    assert "longest completion that fits" in planned.stdout
