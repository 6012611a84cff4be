"""The task `prompts`: anybody's data, with rewards of the user's own."""

import asyncio
import json
import time
from pathlib import Path

import pytest
import torch
import try_rewards
import yaml
from datasets import Dataset

import train_grpo
from recipes import ask
from recipes.config.load import load_config
from recipes.models.prompts import check_problems, trained_on_too
from recipes.notebook import judged
from recipes.problems import ConfigError
from recipes.rewards.contract import RewardError
from recipes.tasks.prompts import Prompts
from recipes.tracking.run_folder import RunFolder
from recipes.training.rewards import prepare

pytestmark = pytest.mark.usefixtures("without_unsloth")


def user(content):
    return {"role": "user", "content": content}


def system(content):
    return {"role": "system", "content": content}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(prompts):
    return [{"prompt": prompt, "answer": str(n), "level": n % 3} for n, prompt in enumerate(prompts)]


TEXTS = [f"How much is {n} + 1?" for n in range(12)]
CHATS = [
    [system("Be brief."), user(text), {"role": "assistant", "content": "?"}, user("Go on.")] for text in TEXTS
]


@pytest.fixture
def made(tmp_path):
    """A function: the task of rows in one file."""

    def make(rows, rewards=("try_rewards.exact",), **options):
        weights = rewards if isinstance(rewards, dict) else dict.fromkeys(rewards, 1.0)
        given = {"dataset": write(tmp_path / "rows.jsonl", rows), "held_out": 4, "rewards": weights}
        return Prompts(Prompts.Options(**{**given, **options}), 0)

    return make


def sorted_prompts(task):
    return sorted([*task.train["prompt"], *task.held_out["prompt"]], key=str)


# What the model is asked


def test_a_text_is_a_users_message_or_stands_as_it_is(made):
    rows = rows_of([f"  {text}\n" for text in TEXTS])
    said = sorted(row["prompt"] for row in rows)
    assert sorted_prompts(made(rows)) == [[user(text)] for text in said]
    assert sorted_prompts(made(rows, prompt="plain")) == said
    assert sorted_prompts(made(rows, prompt="plain", system_prompt="Add.")) == [
        f"Add.\n\n{text}" for text in said
    ]
    assert sorted_prompts(made(rows, system_prompt="Add.")) == [[system("Add."), user(text)] for text in said]


def test_chat_messages_are_as_they_stand_but_for_a_system_message_that_they_lack(made):
    assert sorted_prompts(made(rows_of(CHATS))) == sorted(CHATS, key=str)
    assert sorted_prompts(made(rows_of(CHATS), system_prompt="Add.")) == sorted(CHATS, key=str)
    asked = [
        [{**user(text), "name": None}] for text in TEXTS
    ]  # as a table of several kinds of messages has it
    with_system = [[system("Add."), user(text)] for text in TEXTS]
    assert sorted_prompts(made(rows_of(asked), system_prompt="Add.")) == sorted(with_system, key=str)


def test_chat_messages_of_a_parquet_file(tmp_path):
    Dataset.from_list(rows_of(CHATS)).to_parquet(tmp_path / "rows.parquet")
    given = {"dataset": str(tmp_path / "rows.parquet"), "held_out": 4, "rewards": {"try_rewards.exact": 1.0}}
    assert sorted_prompts(Prompts(Prompts.Options(**given), 0)) == sorted(CHATS, key=str)


def test_texts_beside_chat_messages_are_chat_all(made):
    mixed = [*TEXTS[:6], *CHATS[6:]]
    assert all(isinstance(prompt, list) for prompt in sorted_prompts(made(rows_of(mixed))))
    with pytest.raises(
        ConfigError, match=r"row 7: column 'prompt' is a list, and task\.prompt is plain .*; write a"
    ):
        _ = made(rows_of(mixed), prompt="plain").train


BAD = [
    ("", "is empty (value ''); fill it in or take the row out"),
    (" \u200b", "is empty"),
    (None, "is null"),
    (7, "is a number (value 7); write it as text"),
    ({"role": "user", "content": "a"}, "is an object"),
    ([], "is empty"),
    (["How?"], "has no role and content alone in message 1"),
    ([{"from": "human", "value": "How?"}], "has no role and content alone in message 1"),
    ([user("How?"), {**user("x"), "tool_calls": ["f"]}], "has no role and content alone in message 2"),
    ([user("How?"), user("")], "is empty in message 2"),
    ([user([{"type": "image"}])], "is a list in message 1"),
    ([user("How?"), {"role": "assistant", "content": "So."}], "ends in an answer"),
]


@pytest.mark.parametrize(("value", "said"), BAD, ids=str)
def test_what_is_no_prompt_is_told_by_its_place(made, tmp_path, value, said):
    with pytest.raises(ConfigError) as refused:
        _ = made(rows_of([*TEXTS[:2], value, *TEXTS[3:]])).train
    assert f"task.dataset: {tmp_path / 'rows.jsonl'}, row 3: column 'prompt' {said}" in str(refused.value)
    assert len(refused.value.lines) == 1


def test_a_column_that_is_not_there_is_told_from_those_that_are(made):
    rows = [{"question": text} for text in TEXTS]
    with pytest.raises(
        ConfigError, match=r"task\.columns\.prompt: .*row 1: lacks 'prompt', has question; set it to"
    ):
        _ = made(rows).train
    assert len(made(rows, columns={"prompt": "question"}).train) == 8


def test_a_prompt_that_stands_twice_is_on_one_side_alone(made):
    rows = rows_of([*TEXTS, *(f"{text} " for text in TEXTS), *CHATS, *CHATS])
    for form in ("chat", "plain"):
        task = made(rows[: 24 if form == "plain" else None], prompt=form)
        train, held_out = ({str(prompt).replace(" '", "'").strip() for prompt in some["prompt"]}
                           for some in (task.train, task.held_out))  # fmt: skip
        assert train
        assert not train & held_out
        assert trained_on_too(task) == []


def test_prompts_of_the_same_words_in_other_mouths_are_two(made):
    """None of them is taken out of the train prompts because the other one is held out."""
    others = [[system(text), user("Go on.")] for text in TEXTS]
    task = made(rows_of([*others, *([user(text), user("Go on.")] for text in TEXTS)]), held_out=12)
    assert (len(task.train), len(task.held_out)) == (12, 12)


def test_fewer_train_prompts_are_as_many_held_out(made):
    task = made(rows_of(TEXTS), train_size=2)
    assert (len(task.train), len(task.held_out)) == (2, 4)


def test_images_are_not_left_out_in_silence(made):
    with pytest.raises(
        ConfigError, match=r"task\.dataset: has a column 'images', .* text alone .*; take it out"
    ):
        _ = made([{**row, "images": ["a.png"]} for row in rows_of(CHATS)]).train
    assert len(made([{**row, "image": None} for row in rows_of(CHATS)]).train) == 8


def test_splits_of_a_folder_and_what_to_do_without_one(tmp_path):
    options = {"dataset": str(tmp_path), "rewards": {"try_rewards.exact": 1.0}}
    with pytest.raises(ConfigError, match=r"holds no train\.jsonl .*put one there$"):
        _ = Prompts(Prompts.Options(**options), 0).train
    write(tmp_path / "train.jsonl", rows_of(TEXTS))
    with pytest.raises(
        ConfigError, match=r"holds no test\.jsonl .*put one there, or set task\.eval_split: null to hold"
    ):
        _ = Prompts(Prompts.Options(**options), 0).train
    assert len(Prompts(Prompts.Options(**options, eval_split=None, held_out=5), 0).train) == 7
    write(tmp_path / "test.jsonl", rows_of(TEXTS[:3]))
    task = Prompts(Prompts.Options(**options), 0)
    assert task.held_out["prompt"] == [[user(text)] for text in TEXTS[:3]]
    (said,) = trained_on_too(task)
    assert said.startswith("3 of the 3 held-out problems are among those that are trained on")


def test_a_hub_id_without_such_a_split(monkeypatch):
    def load_dataset(dataset, config, split):
        if split != "train":
            raise ValueError(f'Unknown split "{split}". Should be one of ["train"].')
        return rows_of(TEXTS)

    monkeypatch.setattr("recipes.data.load_dataset", load_dataset)
    options = {"dataset": "some/prompts", "rewards": {"try_rewards.exact": 1.0}}
    with pytest.raises(ConfigError, match=r"split 'test' cannot be loaded .*or set task\.eval_split: null"):
        _ = Prompts(Prompts.Options(**options), 0).train
    assert len(Prompts(Prompts.Options(**options, eval_split=None, held_out=2), 0).train) == 10


# Whose rewards, and what is right


CONFIG = """\
model: {{loader: scratch, tokenizer: bpe, scratch: {{vocabulary: 600, hidden_size: 32, layers: 1, heads: 2,
        intermediate_size: 64}}}}
task: {task}
grpo: {{per_device_train_batch_size: 8, num_generations: 2, max_completion_length: 8, max_steps: 2, beta: 0.0}}
run: {{output_root: {root}, save_every: 1, evaluation: {{size: 4, samples: 2}}}}
"""


@pytest.fixture
def configured(tmp_path):
    """A function: the path of a run's YAML over rows in one file."""

    def configure(rows, **task):
        given = {"name": "prompts", "dataset": write(tmp_path / "rows.jsonl", rows), "held_out": 4, **task}
        file = tmp_path / "run.yaml"
        file.write_text(CONFIG.format(task=json.dumps(given), root=tmp_path / "runs"))
        return str(file)

    return configure


MISSING = (
    "functions of your own and their weights; {my_rewards.exact: 1.0} is exact in my_rewards.py, beside where"
)
REFUSED = [
    ({}, f"task.rewards: is missing; set it: {MISSING}"),
    ({"correct": "try_rewards.exact"}, f"task.rewards: is missing; set it: {MISSING}"),
    ({"rewards": None}, f"task.rewards: must be a mapping (value null); {MISSING}"),
    ({"rewards": {}}, "task.rewards: weighs nothing (value {}); give one a weight other than 0"),
    ({"rewards": {"try_rewards.exact": 0}}, "task.rewards: weighs nothing"),
    ({"rewards": {"exact": 1.0}}, "task.rewards.exact: is no reward of this task (value 1); name it as module.fun"),
    ({"rewards": {"try_rewards.exact": 1.0}, "correct": "try_rewards.length"},
     "task.correct: is none of task.rewards; add it there, with weight 0 if it is only to judge (value 'try_rew"),
    ({"rewards": {"try_rewards.exact": 1.0}, "correct_at": "high"}, "task.correct_at: must be a number (value 'high')"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "said"), REFUSED)
def test_what_is_wrong_with_the_rewards_is_one_line(configured, tmp_path, capsys, task, said):
    for mode in ([], ["--plan"]):
        assert train_grpo.main(["--config", configured(rows_of(TEXTS), **task), *mode]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
        assert "own weights" not in line  # this task has none
    assert not (tmp_path / "runs").exists()


def verdicts(task, *texts):
    row = task.held_out[0]
    return task.verdicts(texts, [row] * len(texts))


def test_the_first_reward_says_what_is_right_or_the_one_that_is_named(made):
    rewards = {"try_rewards.graded": 0.5, "try_rewards.length": 1.0}
    assert verdicts(made(rows_of(TEXTS), rewards), "a", "b", "c", "n") == [True, False, False, False]
    assert verdicts(made(rows_of(TEXTS), rewards, correct_at=0.5), "a", "b", "c", "n") == [
        True,
        True,
        False,
        False,
    ]
    named = made(rows_of(TEXTS), rewards, correct="try_rewards.length")
    assert verdicts(named, "a" * 9, "a" * 10) == [False, True]
    assert named.is_correct("a" * 10, named.held_out[0])
    assert named.is_correct_lenient("a" * 10, named.held_out[0]) is None


@pytest.mark.parametrize("prompts", [TEXTS, CHATS], ids=["text", "chat"])
@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_the_judge_gets_what_a_reward_gets_in_training(made, prompts, prompt):
    """The prompts, completions of the same kind, and the data's own columns."""
    if prompts is CHATS and prompt == "plain":
        return
    task = made(rows_of(prompts), ["try_rewards.reads"], prompt=prompt, correct_at=0.2)
    given = prepare(task).functions[0]
    rows = list(task.held_out)
    texts = ["x"] * len(rows)
    said = texts if prompt == "plain" else [[{"role": "assistant", "content": text}] for text in texts]
    asked = {"prompts": [row["prompt"] for row in rows], "level": [row["level"] for row in rows]}
    values = given(completions=said, **asked)
    assert values == pytest.approx([0.1 * row["level"] for row in rows])
    assert task.verdicts(texts, rows) == [row["level"] == 2 for row in rows]


def test_a_reward_of_trls_is_named_alike(made):
    rows = [{"prompt": text, "solution": f"${n}$"} for n, text in enumerate(TEXTS)]
    task = made(rows, ["trl.rewards.accuracy_reward"])
    prepare(task)
    known = task.held_out[0]["solution"].strip("$")
    assert verdicts(task, rf"So \boxed{{{known}}}", r"So \boxed{99}") == [True, False]


@pytest.mark.parametrize("name", ["exact", "exact_async"])
def test_a_batch_is_one_call(made, name):
    task = made(rows_of(TEXTS), [f"try_rewards.{name}"])
    row = task.held_out[0]
    try_rewards.CALLS.clear()
    assert task.verdicts([row["answer"], "x"] * 50, [row] * 100) == [True, False] * 50
    assert try_rewards.CALLS == [64, 36]


def test_what_a_reward_does_wrong_is_a_wrong_answer_and_not_the_end(made):
    for name, bad in (("nan", "nan"), ("raises", "raise"), ("hangs", "hang")):
        task = made(rows_of(TEXTS), [f"try_rewards.{name}"], reward_seconds=0.3)
        texts = ["fine"] * 70 + [bad] + ["fine"] * 29
        assert verdicts(task, *texts) == [text == "fine" for text in texts]


def test_a_completion_that_is_judged_alone_is_judged_by_its_own_row(made):
    task = made(rows_of(TEXTS), ["try_rewards.exact_or_raises"], reward_failures=1.0)
    rows = list(task.held_out)
    texts = [row["answer"] for row in rows]
    assert task.verdicts(["raise", *texts[1:]], rows) == [False, True, True, True]
    assert task.verdicts(["raise", *texts[:-1]], rows) == [False] * 4


@pytest.mark.parametrize("text", ["fine", "raise"])
def test_what_a_judge_sets_for_the_process_does_not_stay(made, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    task = made(rows_of(TEXTS), ["try_rewards.wanders"], reward_failures=1.0)
    prepare(task)
    assert Path.cwd() == tmp_path
    assert torch.is_grad_enabled()
    assert verdicts(task, text) == [text == "fine"]
    assert Path.cwd() == tmp_path
    assert torch.is_grad_enabled()


def test_a_reward_that_takes_its_time_is_waited_for(made):
    task = made(rows_of(TEXTS), ["try_rewards.slow"], reward_seconds=0.5)
    assert verdicts(task, *"x" * 64) == [True] * 64


def test_one_failure_of_a_judge_that_waits_costs_one_call_more(made):
    """Each of the batch is asked alone, all at the same time: one after another they would have no time."""
    task = made(rows_of(TEXTS), ["try_rewards.asks"], reward_seconds=1.0)
    started = time.perf_counter()
    assert verdicts(task, *["fine"] * 30, "raise", "fine") == [True] * 30 + [False, True]
    (function,) = prepare(task).functions
    texts = ["raise", *["fine"] * 31]
    given = asyncio.run(function(completions=texts, prompts=texts))
    assert given == [None, *[1.0] * 31]
    assert time.perf_counter() - started < 5  # 64 calls one after another: 13 s


def test_too_many_failures_end_an_evaluation(made):
    task = made(rows_of(TEXTS), ["try_rewards.raises"])
    said = (
        r"reward try_rewards\.raises: failed on 4 of \d+ completions of an evaluation, more than task\.reward_failures "
        r"0\.05 allows; the last time it raised LookupError: nothing to look up, on .*'raise'"
    )
    with pytest.raises(RewardError, match=said):
        verdicts(task, *["fine"] * 70, *["raise"] * 4)  # in the second batch
    assert verdicts(
        made(rows_of(TEXTS), ["try_rewards.raises"], reward_failures=0.1), *["fine"] * 70, *["raise"] * 4
    )


def test_a_function_that_is_not_there_is_one_line_before_anything_is_loaded(
    configured, tmp_path, capsys, monkeypatch
):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("recipes.models.load.load", load)
    monkeypatch.setattr("recipes.training.evaluation.load_checkpoint", load)
    path = configured(rows_of(TEXTS), rewards={"try_rewards.nothing": 1.0})
    for mode in ([], ["--evaluate", str(tmp_path)]):
        assert train_grpo.main(["--config", path, *mode]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "task.rewards: cannot be imported" in line
        assert "put a function nothing into try_rewards.py" in line
    assert not (tmp_path / "runs").exists()


def test_a_column_that_a_reward_asks_for_in_vain(made):
    rows = [{"prompt": text, "solved": True} for text in TEXTS]
    with pytest.raises(
        RewardError, match=r"try_rewards\.exact: raised TypeError.*the columns are prompts, .*solved"
    ):
        prepare(made(rows))


def test_a_column_of_several_kinds_is_no_column(made):
    rows = [{"prompt": text, "answer": n if n % 2 else str(n)} for n, text in enumerate(TEXTS)]
    with pytest.raises(
        RewardError, match=r"the columns are .*; one whose values are of several kinds is left out\)"
    ):
        prepare(made(rows))


# What else a task may have


def test_a_warm_start_takes_the_column_that_is_named(made):
    task = made(rows_of(TEXTS), columns={"solution": "answer"})
    answers = {str(row["prompt"]): row["answer"] for row in task.train}
    examples = task.warm_start_examples(16)
    assert len(examples) == 16
    assert all(answers[str(prompt)] == answer for prompt, answer in examples)
    assert len({str(prompt) for prompt, _ in examples[:8]}) == 8
    assert {*task.train["answer"], *(prompt[-1]["content"] for prompt in task.train["prompt"])} == {
        *task.corpus()
    }
    assert not {*task.held_out["answer"]} & {*task.corpus()}
    with pytest.raises(
        ConfigError, match=r"run\.warm_start: needs a column .*name it in task\.columns\.solution, or"
    ):
        made(rows_of(TEXTS)).warm_start_examples(1)


def test_a_notebook_shows_a_right_and_a_wrong_answer(made):
    prompt, found = judged(made(rows_of(TEXTS), columns={"solution": "answer"}))
    assert prompt in TEXTS
    assert [(name, given) for name, _, given in found] == [
        ("right", {"try_rewards.exact": 1.0}),
        ("wrong", {"try_rewards.exact": 0.0}),
    ]
    easy = made(rows_of(TEXTS), ["try_rewards.raises"], columns={"solution": "answer"})
    assert [answer for name, answer, _ in judged(easy)[1] if name == "wrong"] == [""]
    with pytest.raises(ConfigError, match=r"run\.warm_start"):
        judged(made(rows_of(TEXTS)))


def test_a_question_is_put_into_the_form_of_the_prompts(made):
    plain = made(rows_of(TEXTS), prompt="plain", system_prompt="Add.")
    assert plain.prompt_of("2 + 2?", plain.held_out[0]["prompt"]) == "Add.\n\n2 + 2?"
    whole = plain.held_out[1]["prompt"]
    assert plain.prompt_of(whole, plain.held_out[0]["prompt"]) == whole
    chat = made(rows_of(CHATS))
    asked = chat.prompt_of("And now?", chat.held_out[0]["prompt"])
    assert asked == [*chat.held_out[0]["prompt"][:-1], user("And now?")]


def test_a_template_that_renders_some_of_the_prompts_only(made, tmp_path):
    from recipes.models.tokenizers import CHAT_TEMPLATE, bpe_tokenizer

    tokenizer = bpe_tokenizer(TEXTS, 600)
    strict = "{% for m in messages if m.role == 'assistant' %}{{ raise_exception('no turns') }}{% endfor %}"
    tokenizer.chat_template = strict + CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    # As long as the other ones, and held out.
    write(tmp_path / "train.jsonl", rows_of([[system("Add."), *[user(text)] * 3] for text in TEXTS]))
    write(tmp_path / "test.jsonl", rows_of([CHATS[0]]))
    options = {"dataset": str(tmp_path), "name": "prompts", "rewards": {"try_rewards.exact": 1.0}}
    model = {"loader": "transformers", "name": str(tmp_path / "model")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": model, "task": options}))
    config = load_config(tmp_path / "run.yaml", ["grpo.num_generations=8"])
    said = r"cannot render a prompt \(.*no turns.*\) \(value \['system', 'user', 'assistant', 'user'\]\); set model"
    with pytest.raises(ConfigError, match=said):
        check_problems(config, config.make_task())


def test_a_template_may_leave_out_what_an_earlier_answer_thought(tmp_path):
    from recipes.models.tokenizers import CHAT_TEMPLATE, bpe_tokenizer

    tokenizer = bpe_tokenizer(TEXTS, 600)
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "message.content", "message.content.split('</think>')[-1]"
    )
    assert tokenizer.chat_template != CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    thought = {"role": "assistant", "content": "<think>Hm.</think>Which?"}
    write(tmp_path / "rows.jsonl", rows_of([[user(text), thought, user("Go on.")] for text in TEXTS]))
    options = {"dataset": str(tmp_path / "rows.jsonl"), "held_out": 4, "name": "prompts",
               "rewards": {"try_rewards.exact": 1.0}}  # fmt: skip
    model = {"loader": "transformers", "name": str(tmp_path / "model")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": model, "task": options}))
    config = load_config(tmp_path / "run.yaml", ["grpo.num_generations=8"])
    assert check_problems(config, config.make_task()) == []


# Whole runs


RUNS = {  # prompts, and what stands under `task`
    "text": (TEXTS, {"rewards": {"try_rewards.length": 1.0, "try_rewards.exact": 0.5}, "prompt": "plain"}),
    "chat": (CHATS, {"rewards": {"try_rewards.length": 1.0, "try_rewards.reads": 1.0}, "correct_at": 0.5}),
    "both": ([*TEXTS[:6], *CHATS[6:]],
             {"rewards": {"try_rewards.exact_async": 1.0, "try_rewards.length": 1.0}, "correct": "try_rewards.length",
              "correct_at": 0.3, "system_prompt": "Add."}),
    "failing": (TEXTS, {"rewards": {"try_rewards.sometimes": 1.0}, "correct_at": 0.1, "reward_failures": 1.0}),
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A function: the folder of a run by the name of its data; each is made once."""
    known = {}

    def run(name):
        if name not in known:
            place = tmp_path_factory.mktemp(name)
            prompts, task = RUNS[name]
            given = {
                "name": "prompts",
                "dataset": write(place / "rows.jsonl", rows_of(prompts)),
                "held_out": 4,
                **task,
            }
            (place / "run.yaml").write_text(CONFIG.format(task=json.dumps(given), root=place / "runs"))
            assert train_grpo.main(["--config", str(place / "run.yaml")]) == 0
            known[name] = place / "runs" / "run"
        return known[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_anybodys_data(ran, name):
    folder = ran(name)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [record for record in records if "accuracy" in record]
    assert {"accuracy", "accuracy_interval", "pass@1", "maj@2"} <= set(first)
    assert (first["step"], last["step"], first["accuracy_problems"]) == (0, 2, 4)
    assert "accuracy_lenient" not in first
    steps = [record for record in records if "rewards" in record]
    assert [set(step["rewards"]) for step in steps] == [set(RUNS[name][1]["rewards"])] * 2
    assert (folder / "report.html").is_file()
    card = (folder / "final" / "README.md").read_text()
    assert "on the task `prompts`" in card
    assert "try_rewards" in card
    assert list(json.loads((folder / "environment.json").read_text())["inputs"]["rewards"]) == ["try_rewards"]
    if name == "failing":
        assert sum(step["trl"]["reward_failures/try_rewards.sometimes"] for step in steps) > 0


def test_the_evaluation_of_a_checkpoint_is_that_of_the_run(ran, capsys):
    folder = ran("chat")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (
        train_grpo.main(["--config", str(folder / "config.yaml"), "--evaluate", str(folder / "final")]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert {"accuracy", "pass@1", "maj@2"} <= set(found)
    assert found["accuracy"] == last["accuracy"]


def test_a_run_goes_on_with_its_own_data_alone(ran, capsys):
    folder = ran("text")
    more = ["--config", str(folder / "config.yaml"), "grpo.max_steps=3", "--resume"]
    assert train_grpo.main(more) == 0
    assert "Resuming from" in capsys.readouterr().out
    rows = folder.parents[1] / "rows.jsonl"
    write(rows, rows_of(TEXTS[::-1]))
    assert train_grpo.main([*more[:2], "grpo.max_steps=4", "--resume"]) == 2
    assert (
        "task.dataset: the problems (train and held_out) are not those of the run" in capsys.readouterr().err
    )


def test_the_model_is_asked_in_the_form_of_its_prompts(ran, capsys):
    folder = ran("both")
    assert ask.main([str(folder), "How much is 7 + 1?", "--base"]) == 0
    assert capsys.readouterr().out.count("──") == 2
    answers = ask.ask(load_config(folder / "config.yaml"), RunFolder(folder))
    assert [name.rpartition(": ")[2] in ("right", "wrong") for name in answers][1:] == [True, True]


def test_a_pilot_and_a_plan(ran, capsys):
    config = str(ran("chat") / "config.yaml")
    assert train_grpo.main(["--config", config, "--plan", "--device", "16 GB"]) == 0
    assert train_grpo.main(["--config", config, "--pilot"]) == 0
    assert "completions a prompt" in capsys.readouterr().out


def test_a_warm_start_on_the_datas_solutions(configured, tmp_path):
    path = configured(rows_of(TEXTS), rewards={"try_rewards.exact": 1.0}, columns={"solution": "answer"})
    start = "run.warm_start={steps: 2, batch_size: 4, target_accuracy: null, check_every: 2}"
    assert train_grpo.main(["--config", path, start, "grpo.max_steps=1"]) == 0
    assert json.loads((tmp_path / "runs" / "run" / "warm_start.json").read_text())["steps"] == 2
