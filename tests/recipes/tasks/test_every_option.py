"""For every option of every task: what another value of it changes, and that it changes nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from recipes.rewards.contract import choose, guard
from recipes.tasks import get_task, task_names


def rows(split):
    return [str(row) for row in split]


def of_task(task):
    """What a task's options decide."""
    guarded = guard(choose(task.reward_weights, task.rewards), task.options)
    return {
        "train": rows(task.train),
        "held_out": rows(task.held_out),
        "weights": dict(task.reward_weights),
        "right": [task.is_correct(text, task.held_out[0]) for text in RIGHT_FOR.get(task.name, ())],
        "seconds": {function._seconds for function in guarded},
        "failures": {function._share for function in guarded},
    }


PROMPTS_CHANGE = {"train", "held_out"}
OPTIONS: dict[str, dict[str, tuple[Any, Any]]] = {  # option -> another value, and what it changes
    "": {
        "rewards": (lambda task: {next(iter(task.rewards)): 3.0}, {"weights"}),
        "reward_seconds": (1.5, {"seconds"}),
        "reward_failures": (0.5, {"failures"}),
    },
    "countdown": {"eval_problems": (300, PROMPTS_CHANGE), "train_size": (50, {"train"})},
    "char_count": {
        "min_letters": (9, PROMPTS_CHANGE), "max_letters": (9, PROMPTS_CHANGE), "train_size": (70, {"train"}),
        "held_out": (30, PROMPTS_CHANGE)},
    "countdown_tinyzero": {
        "dataset": ("numbers.jsonl", PROMPTS_CHANGE), "config": ("other", set()), "prompt": ("plain", PROMPTS_CHANGE),
        "min_numbers": (4, PROMPTS_CHANGE), "max_numbers": (3, PROMPTS_CHANGE), "train_size": (70, {"train"}),
        "held_out": (30, PROMPTS_CHANGE), "columns": ({"nums": "numbers"}, set())},
    "gsm8k": {
        "columns": ({"question": "problem"}, PROMPTS_CHANGE),
        "dataset": ("other", PROMPTS_CHANGE), "config": ("other", set()), "prompt": ("plain", PROMPTS_CHANGE),
        "system_prompt": ("Think.", PROMPTS_CHANGE), "train_size": (5, {"train"}), "held_out": (9, set())},
    "math": {
        "dataset": ("other", PROMPTS_CHANGE), "config": ("other", set()), "train_split": ("test", {"train"}),
        "eval_split": ("train", {"held_out"}),
        "columns": ({"problem": "question", "answer": "solution"}, PROMPTS_CHANGE), "prompt": ("plain", PROMPTS_CHANGE),
        "system_prompt": ("Think.", PROMPTS_CHANGE), "train_size": (5, {"train"}), "held_out": (9, set())},
    "prompts": {
        "rewards": ({"try_rewards.length": 3.0}, {"weights", "right"}), "correct": ("try_rewards.length", {"right"}),
        "correct_at": (0.5, {"right"}),
        "dataset": ("other", PROMPTS_CHANGE), "config": ("other", set()), "train_split": ("test", {"train"}),
        "eval_split": ("train", {"held_out"}), "columns": ({"prompt": "question"}, PROMPTS_CHANGE),
        "prompt": ("plain", PROMPTS_CHANGE), "system_prompt": ("Think.", PROMPTS_CHANGE), "train_size": (5, {"train"}),
        "held_out": (9, set())},
}  # fmt: skip
RIGHT_FOR = {"prompts": ("a", "b", "c" * 10)}  # completions that the user's own rewards judge
KNOWN: dict[Any, dict[str, Any]] = {}  # of each task before
SMALL = {
    "char_count": {"train_size": 200, "held_out": 40},
    "countdown_tinyzero": {"train_size": 200, "held_out": 40},
}
NEEDED = {"prompts": {"rewards": {"try_rewards.graded": 1.0, "try_rewards.length": 0.5}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    for folder, shift in (("data", 0), ("other", 100)):
        (root / folder).mkdir()
        for split, start in (("train", 0), ("test", 40)):
            lines = [
                {"question": f"{n} and {n}?", "answer": f"{2 * n}", "problem": f"{n} + {n}?", "solution": f"{3 * n}",
                 "prompt": f"Double {n}."}
                for n in range(start + shift, start + shift + 20)
            ]  # fmt: skip
            (root / folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    numbers = [{"nums": [n, 2, 3], "target": n + 5} for n in range(60)]
    (root / "numbers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in numbers))
    return root


def test_every_option_of_every_task_has_an_entry():
    assert set(OPTIONS) == {"", *task_names()}
    for name in task_names():
        assert {*OPTIONS[""], *OPTIONS[name]} == set(get_task(name).Options.model_fields), name


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name in task_names() for option in {**OPTIONS[""], **OPTIONS[name]}],
)
def test_an_option_of_a_task_changes_what_it_should_and_nothing_else(data, name, option, monkeypatch):
    task = get_task(name)
    value, changes = {**OPTIONS[""], **OPTIONS[name]}[option]
    given = (
        {"dataset": str(data / "data")}
        if "dataset" in task.Options.model_fields and name not in SMALL
        else {}
    )
    given = {**SMALL.get(name, {}), **NEEDED.get(name, {}), **given}
    before = task(task.Options(**given), 0)
    if (name, data) not in KNOWN:
        KNOWN[name, data] = of_task(before)
    value = value(before) if callable(value) else value
    changed = {**given, option: str(data / value) if option == "dataset" else value}
    after = task(task.Options(**changed), 0)
    asked = []
    monkeypatch.setattr("recipes.data.load_dataset", lambda *a, **b: asked.append((a, b)) or [])
    found = [KNOWN[name, data], of_task(after)]
    assert {part for part in found[0] if found[0][part] != found[1][part]} == changes
    if option in ("train_size", "held_out", "eval_problems") and changes:
        part = "train" if option == "train_size" else "held_out"
        assert len(found[1][part]) == value
    if option == "train_size" and name != "char_count":
        assert found[1]["train"] == found[0]["train"][:value]


@pytest.mark.parametrize("name", ["gsm8k", "math", "countdown_tinyzero", "prompts"])
def test_a_dataset_of_the_hub_is_asked_for_by_its_configuration(name, monkeypatch):
    """And what is held out of a single file, which a folder does not use."""
    asked = []

    def load_dataset(dataset, config, split):
        asked.append((dataset, config, split))
        n = range(40) if split == "train" else range(40, 52)
        rows = {"question": "q", "problem": "p", "answer": "2", "nums": [1, 2, 3]}
        return [{**rows, "question": f"q{i}", "problem": f"p{i}", "prompt": f"p{i}", "target": i} for i in n]

    monkeypatch.setattr("recipes.data.load_dataset", load_dataset)
    task = get_task(name)
    more = {"held_out": 7} if name == "countdown_tinyzero" else {}
    made = task(task.Options(dataset="some/rows", config="other", **more, **NEEDED.get(name, {})), 0)
    assert len(made.held_out) == (7 if more else 12)
    assert len(made.train) == (33 if more else 40)
    assert asked == [("some/rows", "other", split) for split in (["train"] if more else ["train", "test"])]


@pytest.mark.parametrize("name", ["gsm8k", "math", "prompts"])
def test_what_is_held_out_of_one_file(data, name):
    task = get_task(name)
    file = str(data / "data" / "train.jsonl")
    made = task(task.Options(dataset=file, held_out=9, **NEEDED.get(name, {})), 0)
    assert (len(made.train), len(made.held_out)) == (11, 9)
