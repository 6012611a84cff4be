"""Every command of the README and of docs/ is run at toy size, in one process; benchmarks are read at least."""

import importlib
import importlib.util
import json
import re
import shlex
import shutil
import sys

import pytest
from published import ROOT, blocks, name, text

import train_grpo
from benchmarks.every_command import make_model

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMAND = re.compile(r"(?:^|\s)(python (?:-m )?[\w./]+[^`]*)")
TOY = [
    "model.scratch.hidden_size=32",
    "model.scratch.layers=1",
    "model.scratch.intermediate_size=32",
    "grpo.max_steps=2",
    "grpo.per_device_train_batch_size=16",
    "grpo.num_generations=4",
    "grpo.max_completion_length=8",
    "run.warm_start.steps=2",
    "run.warm_start.batch_size=8",
    "run.evaluation.size=8",
    "run.evaluation.samples=0",
]
TOY_OF_A_REAL_MODEL = [  # its weights are not here: a tiny model stands in their place
    "model.name=model",
    "task.train_size=64",
    "task.held_out=8",
    "grpo.gradient_accumulation_steps=1",
    "grpo.steps_per_generation=1",
    "grpo.warmup_steps=0",
    "grpo.entropy_coef=1.0",
    "run.evaluation.batch_size=8",
]
OF_OTHER_TESTS = {  # what a page's own test follows to the letter
    "configs/reverse.yaml": "tests/recipes/tasks/test_docs_tasks.py",
    "my_problems": "tests/recipes/tasks/test_docs_tasks.py",
    "configs/own_data.yaml": "tests/recipes/tasks/test_docs_tasks.py",
    "my_prompts": "tests/recipes/tasks/test_docs_tasks.py",
    "my_rewards.": "test_rewards_page.py",
    "recipes.config": "tests/recipes/config/test_config.py",
    "-m pytest": "itself",
    "-m pip": "tests/memhead/test_wheel.py",
}


def commands():
    """(page, command): lines of blocks without a language, and inline code, without comments and placeholders."""
    found = {}
    for page in PAGES:
        inline = re.findall(r"`(python [^`]+)`", re.sub(r"^```.*?^```$", "", text(page), flags=re.M | re.S))
        lines = [
            line for block in blocks(page, "") for line in block.splitlines() if line.startswith("python ")
        ]
        for line in (*lines, *inline):
            plain = re.sub(
                r"\[section\.key=value …\]|\[key=value …\]|\s+# .*|[\[\]]", "", " ".join(line.split())
            )
            found.setdefault(plain.strip(), name(page))
    return [(page, command) for command, page in found.items()]


def elsewhere(command):
    return next((place for part, place in OF_OTHER_TESTS.items() if part in command), None)


HERE = [(page, command) for page, command in commands() if elsewhere(command) is None]
RUN = [(page, command) for page, command in HERE if "benchmarks" not in command]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two runs: quickstart, which is also a, and RUN, with adapters, which is also b."""
    root = tmp_path_factory.mktemp("commands")
    (root / "configs").symlink_to(ROOT / "configs")
    rows = [json.dumps({"question": f"{n} nuts?", "answer": f"#### {n}"}) for n in range(24)]
    for split in ("train", "test"):
        (root / f"{split}.jsonl").write_text("\n".join(rows))
    make_model(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for run, more in (
            ("quickstart", ["run.save_every=2"]),
            ("RUN", ["lora={r: 4}", "grpo.learning_rate=0.05", "grpo.entropy_coef=1.0"]),
        ):
            named = [f"run.name={run}", *more, *(["run.output_root=."] if run == "RUN" else [])]
            assert train_grpo.main(["--config", "configs/quickstart.yaml", *TOY, *named]) == 0
    for other, run in (("a", "quickstart"), ("b", "../RUN")):
        (root / "runs" / other).symlink_to(run)
    return root


def words_of(command, root):
    """The arguments, with what stands for something filled in, and a training run made small."""
    words = [word.replace("…", "357>26=") for word in shlex.split(command)]
    if "train_grpo.py" in command:
        words = [word if word != "357>26=" else "configs/quickstart.yaml" for word in words]
        words = [word if word != "CHECKPOINT" else "runs/quickstart/final" for word in words]
        if "--plan" not in words:
            words += (
                [word.replace("max_steps=2", "max_steps=4") for word in TOY] if "--resume" in words else TOY
            )
            if "smollm2" in command:
                words = [word for word in words if "scratch" not in word] + TOY_OF_A_REAL_MODEL
            words += [f"task.dataset={root}"] if "gsm8k_scratch" in command else []
    return words


@pytest.mark.parametrize(("page", "command"), RUN, ids=[command for _, command in RUN])
def test_a_command_runs_as_it_stands(place, monkeypatch, capsys, page, command):
    monkeypatch.chdir(place)
    _, *words = words_of(command, place)
    module = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
    arguments = words[2:] if words[0] == "-m" else words[1:]
    if "--gguf" in arguments:
        arguments.remove("--gguf")  # llama.cpp's converter is not here
    if module == "recipes.export" and "RUN" not in arguments:
        arguments.insert(0, "RUN")
    shutil.rmtree(place / "RUN" / "merged", ignore_errors=True)
    monkeypatch.setitem(
        sys.modules, "unsloth", None
    )  # importing it would replace TRL for the rest of the suite
    monkeypatch.setattr("builtins.input", lambda *_: "")
    status = importlib.import_module(module).main(arguments)
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert shown.out


@pytest.mark.parametrize("command", [c for _, c in HERE if (_, c) not in RUN])
def test_a_benchmarks_command_names_what_is_there(command):
    _, *words = shlex.split(command)
    file = ROOT / (words[0] if words[0] != "-m" else words[1].replace(".", "/") + ".py")
    source = file.read_text(encoding="utf-8")
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in source, f"{file.name} has no {option}"


def test_there_are_commands_and_they_are_found():
    assert len(RUN) >= 8
    assert any("recipes.ask" in command for _, command in RUN)
    assert any("--plan" in command for _, command in RUN)
    for part, test in OF_OTHER_TESTS.items():
        assert any(part in command for _, command in commands()), part
        assert test == "itself" or (ROOT / test).is_file() or (ROOT / "tests" / "docs" / test).is_file()


def test_the_options_of_the_run_are_named_in_the_readme():
    readme = text(ROOT / "README.md")
    for option in ("--resume", "--plan", "--device", "--evaluate"):
        assert option in readme
    assert importlib.util.find_spec("recipes.ask") is not None
