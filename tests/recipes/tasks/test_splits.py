"""What a model is trained, started and measured on: nothing in common, for every task, source of data and seed."""

import json

import pytest

from recipes.problems import ConfigError
from recipes.rewards.final_answer import text_of
from recipes.tasks import get_task, task_names

SEEDS = (0, 1, 2)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with train and test, and one file in which every fifth problem stands twice; for each kind of rows."""
    root = tmp_path_factory.mktemp("data")

    def gsm8k(n):
        return {"question": f"How much are {n} and {n}?", "answer": f"{n} + {n} = {2 * n} #### {2 * n}"}

    def math(n):
        return {"problem": f"What is {n} + {n}?", "answer": f"{2 * n}"}

    def prompts(n):
        return {"prompt": [{"role": "user", "content": f"Say {n}."}], "answer": f"{n}"}

    def numbers(n):
        return {"nums": [n, n + 1, 3], "target": 2 * n + 4}

    for name, row in {"gsm8k": gsm8k, "math": math, "prompts": prompts, "nums": numbers}.items():
        (root / name).mkdir()
        write(root / name / "train.jsonl", map(row, range(40)))
        write(root / name / "test.jsonl", map(row, range(40, 52)))
        twice = [{**row(n), **({"nums": [n + 1, 3, n]} if name == "nums" else {})} for n in range(0, 40, 5)]
        write(root / f"{name}.jsonl", [*map(row, range(40)), *twice])
    return root


OWN = {"try_rewards.exact": 1.0}
KINDS = {
    "countdown": ("countdown", {"eval_problems": 40}, 40),
    "char_count": ("char_count", {"train_size": 300, "held_out": 40}, 40),
    "char_count of short words": (
        "char_count",
        {"train_size": 200, "held_out": 20, "min_letters": 3, "max_letters": 3},
        20,
    ),
    "countdown_tinyzero": ("countdown_tinyzero", {"train_size": 300, "held_out": 40}, 40),
    "countdown_tinyzero of a file": ("countdown_tinyzero", {"dataset": "nums.jsonl", "held_out": 12}, 12),
    "gsm8k of a folder": ("gsm8k", {"dataset": "gsm8k"}, 12),
    "gsm8k of a file": ("gsm8k", {"dataset": "gsm8k.jsonl", "held_out": 12}, 12),
    "gsm8k, some of it": ("gsm8k", {"dataset": "gsm8k", "train_size": 5}, 12),
    "math of a folder": ("math", {"dataset": "math"}, 12),
    "math of a file": ("math", {"dataset": "math.jsonl", "held_out": 12}, 12),
    "prompts of a folder": ("prompts", {"dataset": "prompts", "rewards": OWN}, 12),
    "prompts of a file": (
        "prompts",
        {"dataset": "prompts.jsonl", "held_out": 12, "rewards": OWN, "columns": {"solution": "answer"}},
        12,
    ),
}
STARTS = {kind for kind, (name, _, _) in KINDS.items() if name in ("countdown", "char_count", "gsm8k")}
STARTS.add("prompts of a file")  # kinds that can start a model


@pytest.fixture
def made(places):
    def make(kind, seed):
        name, options, _ = KINDS[kind]
        where = {"dataset": str(places / options["dataset"])} if "dataset" in options else {}
        task = get_task(name)
        return task(task.Options(**{**options, **where}), seed)

    return make


def test_every_task_is_here():
    assert {name for name, _, _ in KINDS.values()} == set(task_names())


def problems(rows):
    """Rows as what they ask, whatever the order of their columns."""
    return {json.dumps(prompt) for prompt in rows["prompt"]}


@pytest.mark.parametrize("kind", KINDS)
def test_no_held_out_problem_is_trained_on(made, kind):
    for seed in SEEDS:
        task = made(kind, seed)
        train, held_out = problems(task.train), problems(task.held_out)
        assert train
        assert len(task.held_out) == KINDS[kind][2]
        assert not train & held_out
        assert len(task.train) <= (task.options.train_size or len(task.train))


def test_numbers_in_another_order_are_the_same_problem(made):
    for kind in ("countdown_tinyzero", "countdown_tinyzero of a file"):
        for seed in SEEDS:
            task = made(kind, seed)
            sets = [
                {(*sorted(row["nums"]), row["target"]) for row in rows}
                for rows in (task.train, task.held_out)
            ]
            assert not sets[0] & sets[1]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in STARTS])
def test_a_warm_start_is_shown_right_answers_to_train_problems_alone(made, kind):
    for seed in SEEDS:
        task = made(kind, seed)
        rows = {json.dumps(row["prompt"]): row for row in task.train}
        held_out = problems(task.held_out)
        examples = task.warm_start_examples(60)
        assert len(examples) == 60
        for prompt, answer in examples:
            asked = json.dumps(prompt)
            assert asked not in held_out
            assert task.is_correct(answer, rows[asked])
        assert examples == made(kind, seed).warm_start_examples(60)
        assert examples != made(kind, seed + 1).warm_start_examples(60)
        if kind != "countdown":  # which draws among all solutions of a prompt
            once = [json.dumps(prompt) for prompt, _ in examples[: len(rows)]]
            assert len(set(once)) >= min(len(set(rows)), 60) * 0.8


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in STARTS])
def test_other_tasks_say_that_they_have_no_examples(made, kind):
    with pytest.raises(ConfigError, match=r"run\.warm_start"):
        made(kind, 0).warm_start_examples(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_not_trained_on_what_is_held_out(made, kind):
    task = made(kind, 0)
    read = "\n".join(task.corpus())
    for prompt in task.held_out["prompt"]:
        asked = prompt if isinstance(prompt, str) else text_of(prompt[-1:])
        assert asked not in read


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides_order_and_split(made, kind):
    first, again, other = made(kind, 0), made(kind, 0), made(kind, 1)
    assert first.train.to_list() == again.train.to_list()
    assert first.held_out.to_list() == again.held_out.to_list()
    assert first.train["prompt"][:5] != other.train["prompt"][:5]
    given = kind.endswith(("of a folder", "some of it"))
    # Where the data says what is held out, it is the same in every run.
    assert (first.held_out.to_list() == other.held_out.to_list()) == given


def test_a_file_of_one_problem_repeated_leaves_nothing_to_train_on(tmp_path):
    write(tmp_path / "x.jsonl", [{"question": "1 + 1?", "answer": "2"}] * 9)
    task = get_task("gsm8k")
    with pytest.raises(
        ConfigError, match=r"task\.dataset: every problem is among the 3 held out, or the same"
    ):
        _ = task(task.Options(dataset=str(tmp_path / "x.jsonl"), held_out=3), 0).train
