"""docs/tasks.md, followed to the letter in a copy of the source: one's own data; a task, its plan, its run."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import yaml as reader

from benchmarks.every_command import make_model
from recipes.config.load import load_config

TINY = [
    "model.scratch.layers=1",
    "grpo.max_steps=1",
    "grpo.per_device_train_batch_size=16",
    "grpo.max_completion_length=8",
    "run.warm_start.steps=2",
    "run.evaluation.size=8",
]
TINY_SCRATCH = [word for word in TINY if "warm_start" not in word]
TINY_MODEL = [*(word for word in TINY_SCRATCH if "scratch" not in word), "model.name=model"]
PROMPTS = "## Your own prompts"
ROOT = Path(__file__).parents[3]
FOLLOWED = """
import json
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
assert len(task.held_out[0]["word"]) == 4
assert rewards.functions[0](completions=["dcba", "abcd"], word=["abcd", "abcd"]) == [1.0, 0.0]
import train_grpo
for arguments in json.loads(sys.argv[1]):
    print("== command", flush=True)
    assert train_grpo.main(arguments) == 0
"""


def test_the_page_works_as_it_stands(tmp_path):
    """In one process beside this one: what it imports takes longer than what it does."""
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    own, python, yaml = (
        re.search(rf"```{kind}\n(.*?)```", page[page.index(title) :], re.DOTALL)[1]
        for kind, title in (("python", PROMPTS), ("python", "## Adding"), ("yaml", "## Adding"))
    )
    lines = [line for line in python.splitlines() if line.strip()]
    assert len(lines) <= 42
    for name in ("recipes", "configs", "memhead"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_grpo.py", tmp_path)
    (tmp_path / "recipes" / "tasks" / "reverse.py").write_text(python, encoding="utf-8")
    (tmp_path / "configs" / "reverse.yaml").write_text(yaml, encoding="utf-8")
    mine = tmp_path / "my_problems"  # "Your own data"
    mine.mkdir()
    row = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    for split in ("train", "test"):
        lines = [json.dumps({**row, "solution": str(number)}) for number in range(16)]
        (mine / f"{split}.jsonl").write_text("\n".join(lines))
    mine = tmp_path / "my_prompts"  # "Your own prompts and rewards"
    mine.mkdir()
    rows = re.search(r"```json\n(.*?)```", page[page.index(PROMPTS) :], re.DOTALL)[1].splitlines()
    for split in ("train", "test"):
        lines = [row.replace("Peru", f"land {number}") for row in rows for number in range(16)]
        (mine / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "my_rewards.py").write_text(own, encoding="utf-8")
    make_model(tmp_path)
    on_prompts = re.findall(r"python train_grpo\.py (.* task\.name=prompts .*|.*/own_data.yaml)\n", page)
    given = load_config(ROOT / "configs" / "own_data.yaml").to_dict()["task"]
    shown = re.search(r"```yaml\n(.*?)```", page[page.index(PROMPTS) :], re.DOTALL)[1]
    assert reader.safe_load(shown)["task"].items() <= given.items()
    task, size = re.search(r'python train_grpo\.py (.*?) --plan --device "(16 GB)"', page).groups()
    numbers = re.search(r"python train_grpo\.py (\S+ \S+ task\.dataset=my_problems .*)", page)[1]
    commands = [
        [*task.split(), "--plan", "--device", size],
        [*task.split(), *TINY, "run.warm_start.batch_size=8"],
        [*shlex.split(numbers), *TINY, "run.warm_start.batch_size=4", "run.evaluation.samples=0"],
        *(
            [*shlex.split(words), *(TINY_MODEL if "own_data" in words else TINY_SCRATCH)]
            for words in on_prompts
        ),
    ]
    done = subprocess.run(
        [sys.executable, "-c", FOLLOWED, json.dumps(commands)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, planned, trained, trained_on_mine, of_a_model, of_nothing = done.stdout.split("== command\n")
    assert "longest completion that fits" in planned
    assert "reverse: a new Llama" in trained
    for said in (trained_on_mine, of_a_model, of_nothing):
        assert "of 8 held-out problems" in said
    for said in (of_a_model, of_nothing):
        assert "learns prompts by GRPO" in said
        assert "my_rewards.exact" in said
