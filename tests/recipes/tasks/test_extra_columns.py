"""The data's own columns reach the rewards, and a reward that asks for another one is told which there are."""

import json

import pytest

from recipes.data import dataset_of
from recipes.rewards.contract import RewardError
from recipes.tasks import get_task
from recipes.training.rewards import prepare

COLUMNS = {
    "gsm8k": {"question": "How many?", "answer": "Two. #### 2"},
    "math": {"problem": "Double 1.", "answer": "2"},
    "countdown_tinyzero": {"nums": [3, 4, 5], "target": 12},
}
REWARDS = """\
def hard(completions, level, **columns):
    return [float(one) for one in level]


def named(completions, **columns):
    return [len(one) / 10 for one in columns["über"]]


def absent(completions, difficulty, **columns):
    return [0.0] * len(completions)


def by_key(completions, **columns):
    return columns["difficulty"]


"""


def made(task, place, rewards=None, more=None):
    """The task of eight rows of its columns, and some of nobody's."""
    (place / "extra_columns_rewards.py").write_text(REWARDS, encoding="utf-8")
    rows = []
    for number in range(8):
        row = dict(COLUMNS[task]) | {"level": number % 3, "über": "日本"} | (more or {})
        key = "target" if task == "countdown_tinyzero" else next(iter(row))
        row[key] = row[key] + number if key == "target" else f"{row[key]} ({number})"
        row["mixed"] = number if number % 2 else "odd"  # no column of a table
        rows.append(row)
    del rows[0]["level"]
    file = place / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kind = get_task(task)
    return kind(kind.Options(dataset=str(file), held_out=2, rewards=rewards), 0)


@pytest.mark.parametrize("task", COLUMNS)
def test_the_datas_own_columns_are_there(task, tmp_path):
    for rows in ((found := made(task, tmp_path)).train, found.held_out):
        assert {"prompt", "level", "über"} <= set(rows.column_names)
        assert set(rows["über"]) == {"日本"}
    assert "mixed" not in found.train.column_names
    levels = [*found.train["level"], *found.held_out["level"]]
    assert sorted(levels, key=str) == sorted([None, 0, 0, 1, 1, 1, 2, 2], key=str)


def test_the_tasks_columns_and_trls_names_are_not_replaced(tmp_path):
    names = (
        "prompt prompts completion completions completion_ids image images self environment environments "
        "trainer_state log_extra log_metric"
    )
    taken = dict.fromkeys(names.split(), "theirs")
    rows = made("gsm8k", tmp_path, more=taken).train
    assert not {*taken} & {*rows.column_names} - {"prompt"}
    assert rows[0]["prompt"] != "theirs"
    assert rows[0]["answer"] == "2"


@pytest.mark.parametrize("values", [[1, "a"], ["a", 1], [1, 2**64], ["\ud800", "a"]], ids=ascii)
def test_what_no_table_holds_is_no_column(values):
    """Of several kinds, too large a number, half a character."""
    rows = [{"kept": 1, "odd": value} for value in values]
    assert dataset_of(rows, {"prompt": ["a", "b"]}).column_names == ["prompt", "kept"]


def test_rewards_read_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = made("gsm8k", tmp_path, {"extra_columns_rewards.named": 1.0})
    (function,) = prepare(task).functions
    assert function(completions=["a"], prompts=["p"], über=["日本"]) == [0.2]


@pytest.mark.parametrize("name", ["absent", "by_key"])
def test_a_column_that_is_not_there_is_told_from_those_that_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = made("gsm8k", tmp_path, {f"extra_columns_rewards.{name}": 1.0})
    with pytest.raises(RewardError, match=r"'difficulty'.*the columns are prompts, .*answer, .*level, über;"):
        prepare(task)


def test_only_where_a_column_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "extra_columns_other.py").write_text("def one(completions, **_): return 1 / 0\n")
    with pytest.raises(RewardError) as error:
        prepare(made("gsm8k", tmp_path, {"extra_columns_other.one": 1.0}))
    assert "columns are" not in str(error.value)
