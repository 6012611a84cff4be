"""What every task has, and the defaults of the base class."""

from functools import cached_property

import pytest
from datasets import Dataset

from recipes import tasks
from recipes.problems import ConfigError
from recipes.rewards.contract import RewardError
from recipes.tasks import Task, get_task, task_names
from recipes.training.rewards import prepare

NEEDED = {"math": {"dataset": "none"}, "prompts": {"dataset": "none", "rewards": {"try_rewards.exact": 1.0}}}


@pytest.mark.parametrize("name", task_names())
def test_a_task_is_made_without_reading_anything(name):
    kind = get_task(name)
    task = kind(kind.Options(**NEEDED.get(name, {})), 0)
    assert task.name == name
    assert list(task.weights) == list(task.rewards)  # so that the columns of a report stay in one order


WEIGHTS = {
    "char_count": {"correct": 1.0},
    "countdown": {"correct": 1.0, "well_formed": 1.0},
    "countdown_tinyzero": {"correct": 1.0, "format": 0.1},
    "gsm8k": {"tag_count": 0.5, "soft_format": 0.5, "strict_format": 0.5, "integer": 0.5, "correctness": 2.0},
    "math": {"correctness": 1.0, "boxed_once": 0.1},
    "prompts": {},
}


@pytest.mark.parametrize("name", task_names())
def test_what_each_reward_weighs_unless_told_otherwise(name):
    assert dict(get_task(name).weights) == WEIGHTS[name]


THINK = "<think>\nhm\n</think>\n"
FORMS = [  # task, row, completion, right in the form that was asked for, right in whatever form
    ("gsm8k", {"answer": "4"}, "<reasoning>\n2\n</reasoning>\n<answer>\n4\n</answer>\n", True, True),
    ("gsm8k", {"answer": "4"}, "The answer is 4.", False, True),
    ("gsm8k", {"answer": "4"}, "<answer>5</answer> no, it is 4", False, False),
    ("gsm8k", {"answer": "4"}, "<answer>4</answer> or was it 5", True, True),
    ("gsm8k", {"answer": "4"}, "<answer>40</answer>", False, False),
    ("char_count", {"count": 2}, "\\boxed{2}", True, True),
    ("char_count", {"count": 2}, "It is 2.", False, True),
    ("char_count", {"count": 2}, "\\boxed{12}", False, False),
    ("char_count", {"count": 2}, "\\boxed{3}", False, False),
    ("countdown", {"numbers": [3, 5, 7], "target": 26}, "3*7+5", True, None),
    ("countdown", {"numbers": [3, 5, 7], "target": 26}, "3*7+5=26", False, None),
    ("countdown", {"numbers": [3, 3, 5], "target": 8}, "3+5", False, None),  # a number is left over
    ("countdown", {"numbers": [3, 5, 7], "target": 8}, "3+5", False, None),
    ("countdown", {"numbers": [3, 5, 7], "target": 15}, "3+5+7+3-3", False, None),
    ("countdown_tinyzero", {"nums": [3, 5, 7], "target": 26}, f"{THINK}<answer>3*7+5</answer>", True, True),
    (
        "countdown_tinyzero",
        {"nums": [3, 5, 7], "target": 26},
        f"{THINK}<answer>3*7+5 = 26</answer>",
        False,
        True,
    ),
    ("countdown_tinyzero", {"nums": [3, 5, 7], "target": 26}, "3*7+5", False, True),
    ("countdown_tinyzero", {"nums": [3, 3, 5], "target": 8}, "<answer>3+5</answer>", False, False),
    (
        "countdown_tinyzero",
        {"nums": [7, 2, 1], "target": 3},
        "<answer>7/2-1</answer>",
        False,
        False,
    ),  # not 2.5
]


@pytest.mark.parametrize(("name", "row", "completion", "right", "lenient"), FORMS)
def test_right_in_the_form_asked_for_and_in_any(name, row, completion, right, lenient):
    kind = get_task(name)
    task = kind(kind.Options(**NEEDED.get(name, {})), 0)
    assert task.is_correct(completion, row) is right
    assert task.is_correct_lenient(completion, row) is lenient


class Echo(Task):
    """The smallest possible task."""

    @cached_property
    def train(self):
        return Dataset.from_dict({"prompt": ["a", "b"], "wanted": ["A", "B"]})

    @cached_property
    def held_out(self):
        return Dataset.from_dict({"prompt": ["c"], "wanted": ["C"]})

    def is_correct(self, completion, row):
        assert set(row) >= {"prompt", "wanted"}
        return completion == row["wanted"]


def echo(**options):
    return Echo(Echo.Options(**options), 0)


def test_defaults():
    task = echo()
    assert task.is_correct_lenient("A", task.train[0]) is None
    assert task.answer_of(" A\n") == "A"
    assert task.answer_of("\n") is None
    assert task.corpus() == ["a", "b"]
    assert task.characters == ""
    with pytest.raises(
        ConfigError, match=r"run\.warm_start: the task test_tasks has no examples.*; set it to null"
    ):
        task.warm_start_examples(1)


def test_the_default_reward_is_the_verdict():
    columns = {"prompts": ["a", "b"], "wanted": ["A", "B"], "trainer_state": None, "log_metric": print}
    assert echo().rewards["correct"](["A", "A"], **columns) == [1.0, 0.0]
    chat = [[{"role": "assistant", "content": text}] for text in "AB"]
    assert echo().rewards["correct"](chat, **columns) == [1.0, 1.0]


def test_prepared_with_the_weights_of_the_yaml_or_its_own():
    rewards = prepare(echo())
    assert ([f.__name__ for f in rewards.functions], rewards.weights) == (["correct"], [1.0])
    assert prepare(echo(rewards={"correct": 0.5})).weights == [0.5]
    (function,) = rewards.functions
    assert function(completions=["B"], prompts=["b"], wanted=["B"]) == [1.0]
    with pytest.raises(RewardError, match="reward correct: raised KeyError"):
        prepare(Broken(Broken.Options(), 0))


class Seen(Echo):
    """Keeps what its reward is asked."""

    weights = {"seen": 1.0}

    @property
    def rewards(self):
        return {"seen": self.see}

    def see(self, completions, **columns):
        self.asked = completions, columns
        return [0.0] * len(completions)


@pytest.mark.parametrize("chat", [False, True])
def test_a_reward_is_tried_on_completions_of_its_prompts_kind(chat):
    task = Seen(Seen.Options(), 0)
    if chat:
        prompts = [[{"role": "user", "content": text}] for text in "ab"]
        task.train = Dataset.from_dict({"prompt": prompts, "wanted": ["A", "B"]})
    prepare(task)
    completions, columns = task.asked
    texts = [completion[0]["content"] for completion in completions] if chat else completions
    assert texts[:3] == ["", "I do not know.", "12"]
    assert not chat or completions[0] == [{"role": "assistant", "content": ""}]
    assert columns["wanted"] == ["A", "B", "A", "B", "A", "B"]


class Broken(Echo):
    def is_correct(self, completion, row):
        return row["nothing"]


def test_a_class_without_its_verdict_is_no_task():
    class Half(Task):
        train = held_out = None

    with pytest.raises(TypeError, match="is_correct"):
        Half(Half.Options(), 0)


def test_a_module_has_one_task(monkeypatch):
    with pytest.raises(ValueError, match="'nothing' is no task; use one of char_count, countdown,"):
        get_task("nothing")
    monkeypatch.setattr(tasks.importlib, "import_module", lambda name: pytest)
    with pytest.raises(ValueError, match="pytest defines 0 subclasses of Task; define one there"):
        get_task("countdown")
