"""Data that a run would fail on is one line before anything is loaded: file, row, column, value, remedy; status 2."""

import gzip
import json
import logging
import os
from fractions import Fraction

import pytest

import recipes.data
import train_grpo
from recipes.config.load import load_config
from recipes.data import BadValue, Column, _local_files, read_rows, text, whole_number
from recipes.models.prompts import check_problems, trained_on_too
from recipes.problems import ConfigError

RUN = """\
model: {{loader: scratch, tokenizer: bpe, scratch: {{vocabulary: 600}}}}
task: {{name: {task}, dataset: {file}, held_out: 4}}
grpo: {{per_device_train_batch_size: 8, num_generations: 2, max_completion_length: 8, max_steps: 1}}
run: {{output_root: {root}}}
"""
COLUMNS = {
    "gsm8k": {"question": "How many?", "answer": "Two. #### 2"},
    "math": {"problem": "Double 1.", "answer": "2"},
    "countdown_tinyzero": {"nums": [3, 4, 5], "target": 12},
}


def _write(folder, task, rows=8, changed=()):
    """A run's YAML beside its data: `rows` good rows of the task, but for (row, column, value)."""
    data = [dict(COLUMNS[task]) for _ in range(rows)]
    for number, row in enumerate(data, 1):
        if task == "countdown_tinyzero":
            row["target"] = number
        else:
            question = "question" if task == "gsm8k" else "problem"
            row[question] += f" ({number})"
    for number, column, value in changed:
        data[number - 1][column] = value
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (folder / "run.yaml").write_text(RUN.format(task=task, file=folder / "rows.jsonl", root=folder / "runs"))
    return str(folder / "run.yaml")


BAD = [
    ("gsm8k", 5, "answer", None, "is null (value null); fill it in or take the row out"),
    ("gsm8k", 1, "answer", ["2"], "is a list (value ['2']); write the number as text"),
    ("gsm8k", 3, "question", None, "is null"),
    ("gsm8k", 3, "question", 7, "is a number (value 7); write it as text"),
    ("gsm8k", 6, "answer", "Each has two. #### twelve", "ends in no number, or in several"),
    ("gsm8k", 7, "answer", int("9" * 300), "ends in no number, or in several"),
    ("gsm8k", 7, "answer", 1e300, "ends in no number, or in several"),
    ("gsm8k", 2, "answer", True, "is true or false (value true)"),
    ("gsm8k", 2, "question", "half \ud800", "holds half a surrogate pair"),
    ("math", 4, "answer", None, "is null"),
    ("math", 1, "answer", ["1", "2"], "is a list (value ['1', '2']); write one text, such as 1, 2"),
    ("math", 2, "answer", {"a": 1}, "is an object (value {'a': 1}); write the answer as text or as a number"),
    ("math", 2, "answer", "$$", "holds no answer (value '$$'); write it out or take the row out"),
    ("math", 2, "answer", r"So $\boxed{}$", "holds no answer"),
    ("math", 2, "answer", r"So \boxed{5", "holds no answer"),
    ("math", 2, "answer", "x" * 1001, "has 1,001 characters, and no final answer has"),
    ("math", 7, "problem", " ", "is empty"),
    ("countdown_tinyzero", 1, "target", "12", "is a text (value '12'); write a whole number"),
    ("countdown_tinyzero", 8, "target", 2**70, "is too large"),
    ("countdown_tinyzero", 2, "nums", "[3, 4]", "is a text (value '[3, 4]'); write a list of whole numbers"),
    ("countdown_tinyzero", 2, "nums", [3, 4.5], "holds what is a number (value [3, 4.5])"),
]


@pytest.mark.parametrize(("task", "row", "column", "value", "said"), BAD)
def test_a_value_is_refused_by_its_place(tmp_path, without_unsloth, task, row, column, value, said):
    config = load_config(_write(tmp_path, task, changed=[(row, column, value)]))
    with pytest.raises(ConfigError) as refused:
        check_problems(config, config.make_task())
    (line,) = refused.value.lines
    assert f"{tmp_path / 'rows.jsonl'}, row {row}: column {column!r} {said}" in line


@pytest.mark.parametrize("mode", [[], ["--plan"]])
def test_the_command_line_ends_with_status_2_and_no_folder(
    tmp_path, without_unsloth, monkeypatch, capsys, mode
):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("recipes.models.load.load", load)
    config = _write(tmp_path, "gsm8k", changed=[(5, "answer", None)])
    assert train_grpo.main(["--config", config, *mode]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert "row 5: column 'answer' is null" in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("rows", "said"), [(0, "has no rows"), (3, "4 of 3 problems leaves none to train on")]
)
def test_a_file_with_too_little(tmp_path, without_unsloth, rows, said):
    config = load_config(_write(tmp_path, "gsm8k", rows=rows))
    with pytest.raises(ConfigError, match=said):
        check_problems(config, config.make_task())


def test_problems_that_are_all_the_same(tmp_path, without_unsloth, capsys):
    path = _write(tmp_path, "countdown_tinyzero", changed=[(row, "target", 12) for row in range(1, 9)])
    for mode in ([], ["--plan"]):
        assert train_grpo.main(["--config", path, *mode]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "every problem is among the 4 held out, or the same as one" in line
    assert not (tmp_path / "runs").exists()


def test_fewer_problems_than_a_batch(tmp_path, without_unsloth):
    path = _write(tmp_path, "gsm8k", rows=7)
    said = r"task\.dataset: .*rows\.jsonl: 3 problems .* beside 4 held out, are fewer than the 4 of a batch; give it"
    for overrides, expected in (
        ([], said),
        (["task.held_out=3", "task.train_size=2"], r"task\.train_size: 2 "),
    ):
        config = load_config(path, overrides)
        with pytest.raises(ConfigError, match=expected):
            check_problems(config, config.make_task())
    config = load_config(path, ["task.held_out=3"])
    assert check_problems(config, config.make_task()) == []


def test_problems_that_are_held_out_and_trained_on_are_told(tmp_path, without_unsloth, capsys):
    path = _write(tmp_path, "gsm8k")
    assert trained_on_too(load_config(path).make_task()) == []  # of one file, none
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    for split, rows in (("train", lines[:6]), ("test", lines[4:8])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    (tmp_path / "rows.jsonl").unlink()
    assert train_grpo.main(["--config", path, f"task.dataset={tmp_path}", "--plan"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 of the 4 held-out problems are among those that are trained on, too" in shown


@pytest.mark.parametrize(("value", "gold"), [(2, 2), (0.5, Fraction(1, 2)), (1.0, 1), ("1,234", 1234)])
def test_gsm8k_takes_a_number_for_an_answer(tmp_path, without_unsloth, value, gold):
    changed = [(row, "answer", value) for row in range(1, 9)]
    task = load_config(_write(tmp_path, "gsm8k", changed=changed)).make_task()
    shown = str(value).removesuffix(".0")
    assert set(task.train["answer"]) == {shown}
    assert task.is_correct(f"<answer>{gold}</answer>", task.train[0])
    assert not task.is_correct(f"<answer>{gold + 1}</answer>", task.train[0])
    assert task.warm_start_examples(1)[0][1].endswith(f"<answer>\n{shown}\n</answer>\n")


def test_math_takes_a_small_number_for_what_it_is(tmp_path, without_unsloth):
    changed = [(row, "answer", 1e-05) for row in range(1, 9)]
    task = load_config(_write(tmp_path, "math", changed=changed)).make_task()
    assert task.train["answer"][0] == "0.00001"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": "x"}\n\n{"a": \n', r"row 3: is no JSON"),
        (b'{"a": "x"}\n[1]\n', r"row 2: is a list"),
        (b'{"a": "x"}\n{"b": 1}\n', r"row 2: lacks 'a', has b; rename one"),
        (b"[" * 100_000, r"row 1: is no JSON"),
        (b'{"a": "x"}\n{"a": "caf\xe9"}\n', r"row 2: is no text in UTF-8 .*caf.*; save the file as UTF-8"),
        (b'{"a": "x", "a": "y"}\n', r"row 1: is no JSON \('a' is there twice\)"),
        (b'{"a": "\xe2\x80\x8b \xef\xbb\xbf"}\n', r"row 1: column 'a' is empty"),
        (
            b'{"a": "' + b"x" * 1_000_001 + b'"}\n',
            r"row 1: column 'a' has 1,000,001 characters .*; take the row out",
        ),
        (gzip.compress(b'{"a": "x"}\n', mtime=0), r"is gzip, no text in UTF-8 .*; unpack it"),
        (b"PAR1\0\0PAR1", r"is Parquet, no text"),
        ('{"a": "x"}\n'.encode("utf-16"), r"is UTF-16, no text in UTF-8 .*; save it as UTF-8"),
    ],
)
def test_a_file_that_is_no_table(tmp_path, content, said):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_rows(str(file), "train", None, [Column("a", text)])


def test_what_is_neither_file_nor_folder(tmp_path):
    link, pipe = tmp_path / "link.jsonl", tmp_path / "pipe.jsonl"
    link.symlink_to(tmp_path / "gone")
    os.mkfifo(pipe)
    for place, said in ((link, "is a link that leads nowhere"), (pipe, "is neither a file nor a folder")):
        with pytest.raises(ConfigError, match=said):
            read_rows(str(place), "train")


LONG, NOBODYS, LONGER = "x" * 300 + ".jsonl", "~who_is_this/rows.jsonl", "y" * 5000
LOOKED_UP = [
    (key, name, mode)
    for key in ("task.dataset", "model.tokenizer")
    for name in (LONG, NOBODYS, LONGER)
    for mode in ([], ["--plan"])
]
# A plan makes no folder, and a home that nobody has is a name there.
LOOKED_UP += [("run.output_root", name, []) for name in (LONG, LONGER, r'"a\0b"')]


@pytest.mark.parametrize(("key", "name", "mode"), LOOKED_UP)
def test_a_name_that_no_system_looks_up(tmp_path, without_unsloth, capsys, key, name, mode):
    command = ["--config", _write(tmp_path, "gsm8k"), f"{key}={name}", *mode]
    assert train_grpo.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    said = (
        "cannot be looked up: File name too long",
        "cannot be looked up: Could not",
        "cannot be looked up: it holds a NUL character",
        "cannot be loaded on th",
    )
    assert line.startswith(tuple(f"{key}: {words}" for words in said)), line
    assert len(line) < 1400


def test_of_what_a_row_has_instead_no_more_is_shown_than_a_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    for row in ({f"column_{number}": 1 for number in range(5000)}, {"k" * 100_000: 1}):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(ConfigError, match=r"row 1: lacks 'a', has [ck]") as refused:
            read_rows(str(file), "train", None, [Column("a", text)])
        assert len(str(refused.value)) < 1200


def test_a_prompt_that_the_model_has_no_positions_for(tmp_path, without_unsloth, capsys):
    path = _write(tmp_path, "gsm8k", changed=[(3, "question", "How many? " * 500)])
    assert train_grpo.main(["--config", path, "model.scratch.max_positions=256"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("task: a prompt of ")
    assert "are more than the 256 positions of the model (value 'How many? How many?" in line


def test_other_files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    file, listed = tmp_path / "rows.parquet", tmp_path / "rows.json"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, None]}), file)
    listed.write_text('\ufeff[{"n": 1},\n {"n": 2}]', encoding="utf-8")
    assert read_rows(str(listed), "train") == [{"n": 1}, {"n": 2}]
    with pytest.raises(ConfigError, match=r"rows\.parquet, row 2: column 'n' is null"):
        read_rows(str(file), "train", None, [Column("n", whole_number)])
    twice = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["n", "n"])
    pyarrow.parquet.write_table(twice, file)
    with pytest.raises(ConfigError, match=r"it has several columns 'n'"):
        read_rows(str(file), "train")
    texts = pyarrow.array([b"fine", None, b"caf\xe9"], pyarrow.binary()).buffers()
    pyarrow.parquet.write_table(
        pyarrow.table({"t": pyarrow.Array.from_buffers(pyarrow.string(), 3, texts)}), file
    )
    with pytest.raises(
        ConfigError, match=r"rows\.parquet, row 3: column 't' is no text in UTF-8 \(value b'caf"
    ):
        read_rows(str(file), "train")
    file.write_bytes(b"PAR1 cut off")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        read_rows(str(file), "train")


def test_a_hub_name_that_needs_a_configuration(tmp_path, monkeypatch):
    """The error is datasets' own, of a folder laid out as the hub's with two configurations."""
    header = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "socratic")
    )
    (tmp_path / "README.md").write_text(header + "---\n")
    for name in ("main", "socratic"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "' + name + '"}\n')
    load = recipes.data.load_dataset
    monkeypatch.setattr(
        recipes.data,
        "load_dataset",
        lambda _, *what, **how: load(str(tmp_path), *what, cache_dir=str(tmp_path / "cache"), **how),
    )
    with pytest.raises(
        ConfigError, match=r"task\.config: some/data needs a configuration; set it to main or socr"
    ):
        read_rows("some/data", "train")
    with pytest.raises(
        ConfigError, match=r"task\.config: some/data has no configuration 'x' \(value 'x'\); set"
    ):
        read_rows("some/data", "train", "x")
    assert read_rows("some/data", "train", "socratic") == [{"question": "socratic"}]


def test_a_folder_that_is_not_there_is_asked_of_the_hub_without_a_word(monkeypatch, caplog):
    """A name without a slash may be either. The error is the real one of a hub that is switched off."""
    load = recipes.data.load_dataset

    def with_retries(*what, **how):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        return load(*what, **how)

    monkeypatch.setattr(recipes.data, "load_dataset", with_retries)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = logging.getLogger("huggingface_hub").level
    with pytest.raises(
        ConfigError,
        match=r"task\.dataset: there is no such folder here, and split 'train' cannot be loaded from",
    ):
        read_rows("my_problems", "train")
    assert not caplog.records
    assert logging.getLogger("huggingface_hub").level == before


def test_the_plan_asks_no_hub(tmp_path, without_unsloth, monkeypatch):
    monkeypatch.setattr(recipes.data, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    config = load_config(_write(tmp_path, "gsm8k"), ["task.dataset=some/data"])
    (note,) = check_problems(config, config.make_task(), network=False)
    assert "some/data" in note


@pytest.mark.parametrize(
    ("value", "said"),
    [(True, "is true or false"), (None, "is null"), (3.0, "is a number"), ("3", "is a text"), (2**63, "is too large"),
     (-(2**63), "is too large"), ([3], "is a list")],
)  # fmt: skip
def test_what_is_no_whole_number(value, said):
    with pytest.raises(BadValue, match=said):
        whole_number(value)


@pytest.mark.parametrize("value", [0, -7, 2**63 - 1])
def test_whole_numbers_stay(value):
    assert whole_number(value) == value


def test_of_a_folder_as_the_hub_lays_it_out_a_split_is_read_alone(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / "data" / f"{name}.parquet").write_bytes(b"")
    assert [file.name[:11] for file in _local_files(str(tmp_path), "train")] == ["train-00000", "train-00001"]
    assert [file.name[:10] for file in _local_files(str(tmp_path), "test")] == ["test-00000"]
