"""What a run reads beside its configuration: recorded by digest, and looked at before a session goes on."""

import hashlib
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from datasets import Dataset

from recipes.problems import ConfigError
from recipes.tasks import get_task
from recipes.tracking.run_folder import RunFolder
from recipes.training.inputs import commit_of, inputs_of, keep, keep_commit, what_changed_in
from recipes.training.rewards import prepare


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A function that makes the task anew from its files; and a folder whose session has read them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "inputs_rewards", raising=False)
    for split, count in (("train", 6), ("test", 3)):
        rows = [{"question": f"{split} {number}?", "answer": str(number)} for number in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "inputs_rewards.py").write_text(
        "def one(completions, **_): return [1.0] * len(completions)\n"
    )

    def made(task="gsm8k", **options):
        kind = get_task(task)
        more = {"dataset": str(tmp_path), "rewards": {"inputs_rewards.one": 1.0}} if task == "gsm8k" else {}
        found = kind(kind.Options(**more, **options), 0)
        prepare(found)
        return found

    folder = RunFolder.create(tmp_path / "runs", "read")
    keep(inputs_of(made()), folder)
    return made, folder


def test_the_same_files_say_nothing(begun):
    made, folder = begun
    assert what_changed_in(inputs_of(made()), made(), folder) == []
    recorded = folder.read_json("environment.json")
    assert recorded["inputs"] == inputs_of(made())
    assert recorded["python"]  # what was there stays


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_problems_by_the_same_name_are_refused(begun, tmp_path, split):
    made, folder = begun
    file = tmp_path / f"{split}.jsonl"
    file.write_text(file.read_text().replace(f"{split} 1?", "another?"))
    with pytest.raises(ConfigError) as error:
        what_changed_in(inputs_of(made()), made(), folder)
    (line,) = error.value.lines
    which = "train" if split == "train" else "held_out"
    assert line.startswith(f"task.dataset: the problems ({which}) are not those of the run being resumed, ")
    assert str(tmp_path) in line
    assert "leave --resume out" in line


def test_a_reward_that_was_changed_is_said(begun, tmp_path):
    made, folder = begun
    with (tmp_path / "inputs_rewards.py").open("a") as module:
        module.write("# mended\n")
    said = "rewards: the module inputs_rewards is another from here on than in the session before"
    assert what_changed_in(inputs_of(made()), made(), folder) == [said]


def test_a_folder_that_has_recorded_nothing_is_not_refused(begun):
    made, folder = begun
    folder.write_json("environment.json", {"python": "3"})
    assert what_changed_in(inputs_of(made()), made(), folder) == []


def test_problems_that_a_task_makes_are_recorded_too(begun):
    made, folder = begun
    task = made("countdown", eval_problems=10)
    found = inputs_of(task)
    assert found["rewards"] == {}
    keep(found, folder)
    with pytest.raises(ConfigError, match=r"^task: the problems"):
        what_changed_in(inputs_of(made("countdown", eval_problems=11)), task, folder)


def digests(train, *rewards):
    """Of a task whose held-out problem is one."""
    held_out = Dataset.from_dict({"prompt": ["?"]})
    weights = dict.fromkeys(rewards, 1.0)
    task = SimpleNamespace(
        train=Dataset.from_dict(train), held_out=held_out, reward_weights=weights, rewards={}
    )
    return inputs_of(task)


def test_every_row_and_every_name_of_a_column_counts():
    """Of more rows than are read at a time; a text may hold any character."""
    prompts = [f"\0 {number} 日本 \x85" for number in range(1001)]
    others = [
        {"prompt": [*prompts[:-1], "?"]}, {"prompt": ["?", *prompts[1:]]}, {"prompt": prompts[:-1]}, {"asked": prompts},
    ]  # fmt: skip
    found = {digests(rows)["problems"]["train"] for rows in [{"prompt": prompts}, *others]}
    assert len(found) == 5
    assert digests({"prompt": prompts})["problems"]["train"] in found


def test_the_file_of_a_reward_is_that_of_its_own_module(tmp_path, monkeypatch):
    """In a package, too; a module of the interpreter's, or of an archive, has none."""
    files = {"inputs_a": "a.py", "inputs_a.b": "b.py", "inputs_zip": "pack.zip/c.py", "inputs_own": None}
    for name, file in files.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].__file__ = file and str(tmp_path / file)
    (tmp_path / "a.py").write_text("outer")
    (tmp_path / "b.py").write_text("inner")
    rewards = digests({"prompt": ["?"]}, "inputs_a.b.one", "inputs_zip.one", "inputs_own.one")["rewards"]
    assert rewards == {"inputs_a.b": hashlib.sha256(b"inner").hexdigest()}


def test_the_commit_of_a_model_of_the_hub_is_kept_and_another_one_said(begun):
    made, folder = begun
    model = SimpleNamespace(config=SimpleNamespace(_commit_hash="0123"))
    assert commit_of(None) is None
    assert commit_of(folder) is None
    assert keep_commit(SimpleNamespace(config=SimpleNamespace()), folder, None) == ""
    assert keep_commit(model, folder, None) == ""
    assert commit_of(folder) == "0123"
    assert folder.read_json("environment.json")["inputs"]["problems"] == inputs_of(made())["problems"]
    assert keep_commit(model, folder, "0123") == ""
    said = "model.name: commit 0123 of it from here on, 4567 in the session before\n"
    assert keep_commit(model, folder, "4567") == said


def test_transformers_says_the_commit(tmp_path, monkeypatch):
    """Of a model in the hub's cache, by the name of an attribute that is transformers' own."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # else it asks again for half a minute
    commit = "01" * 20
    place = tmp_path / "models--me--tiny"
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **shape)).save_pretrained(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    model = AutoModelForCausalLM.from_pretrained("me/tiny", cache_dir=tmp_path, local_files_only=True)
    folder = RunFolder.create(tmp_path / "runs", "hub")
    keep_commit(model, folder, None)
    assert commit_of(folder) == commit
