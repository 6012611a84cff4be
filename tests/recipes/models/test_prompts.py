"""A chat template that cannot say a task's prompt is refused before a model is loaded, and can do no harm."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

from recipes.config.load import load_config
from recipes.models.prompts import check_longest, check_problems, prompt_lengths
from recipes.models.tokenizers import CHAT_TEMPLATE, bpe_tokenizer, character_tokenizer
from recipes.problems import ConfigError

ROWS = [{"question": f"How many are {i}?", "answer": str(i)} for i in range(20)]
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
SILENT = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}{% endfor %}"


@pytest.fixture
def check(tmp_path, without_unsloth):
    """A function: the check of a run whose tokenizer has this chat template."""

    def checked(template, *overrides, name="gsm8k"):
        tokenizer = bpe_tokenizer(["How many are 1?"], 600)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        options = (
            {"name": name} if name != "gsm8k" else {"name": name, "dataset": str(tmp_path / "rows.jsonl")}
        )
        model = {"loader": "transformers", "name": str(tmp_path / "model")}
        (tmp_path / "run.yaml").write_text(json.dumps({"model": model, "task": {**options, "held_out": 4}}))
        config = load_config(tmp_path / "run.yaml", ["grpo.num_generations=8", *overrides])
        return check_problems(config, config.make_task())

    return checked


def test_a_template_that_can(check):
    assert check(CHAT_TEMPLATE) == []


@pytest.mark.parametrize(
    ("template", "why"),
    [(NO_SYSTEM + CHAT_TEMPLATE, "System role not supported"), (SILENT, "leaves out what the system says")],
)
def test_a_template_without_a_system_role(check, template, why):
    said = rf'task\.system_prompt: the chat template of .* has no system role \(.*{why}.*; set it to "", or set task\.'
    with pytest.raises(ConfigError, match=said) as refused:
        check(template)
    assert len(refused.value.lines) == 1
    assert check(template, "task.system_prompt=''") == []
    assert check(template, "task.prompt=plain") == []


def test_no_template(check):
    with pytest.raises(
        ConfigError, match=r"task: the chat template of .* cannot render .*set task\.prompt: plain"
    ):
        check(None)
    with pytest.raises(ConfigError, match=r"cannot render .*; set model\.tokenizer to one"):
        check(None, "task.train_size=20", name="char_count")


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}",
    "{% for i in range(10**9) %}x{% endfor %}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_stays_in_the_sandbox(check, tmp_path, template):
    with pytest.raises(
        ConfigError, match=r"cannot render a prompt \((SecurityError|OverflowError|UndefinedError)"
    ):
        check(template.replace("MARK", str(tmp_path / "mark")))
    assert not (tmp_path / "mark").exists()


QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
DIGITS = character_tokenizer("0123456789")


def asking(train, held_out=("1",)):
    return SimpleNamespace(
        train=Dataset.from_dict({"prompt": train}),
        held_out=Dataset.from_dict({"prompt": list(held_out)}),
        characters="0123456789",
    )


def of_positions(positions, **rope):
    text = SimpleNamespace(max_position_embeddings=positions, rope_parameters=rope)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))


@pytest.mark.parametrize(
    ("task", "longest"),
    [
        (asking(["12", "12345", "1"]), 5),
        (asking(["12"], ["1", "1234567"]), 7),
        (asking(["1"] * 40 + ["1234"]), 4),
    ],
)
def test_the_longest_prompt_and_its_completion_fill_the_positions_of_the_model(task, longest):
    """Of both sets; a model of one position fewer is refused, one that is stretched to them is not."""
    config = load_config(QUICKSTART, ["grpo.max_completion_length=6"])
    check_longest(config, task, of_positions(longest + 6), DIGITS)
    check_longest(config, task, of_positions(None), DIGITS)
    check_longest(config, task, of_positions(4, factor=3.5), DIGITS)
    for stretched in ({}, {"factor": None}, {"factor": 0.5}):
        said = rf"a prompt of {longest} tokens and grpo\.max_completion_length 6 are more than the {longest + 5} pos"
        with pytest.raises(ConfigError, match=said):
            check_longest(config, task, of_positions(longest + 5, **stretched), DIGITS)


@pytest.mark.parametrize(
    ("prompts", "lengths"),
    [
        (["1", "1234"], (2, 4)),
        (["1234"] * 256 + ["1"] * 500, (4, 4)),
        (["12", "12345", "1234"], (4, 5)),
        (["1"] * 300 + ["12345"] + ["123"] * 20, (1, 5)),
    ],
)
def test_the_mean_length_is_of_the_first_problems_and_the_longest_of_all(prompts, lengths):
    assert prompt_lengths(load_config(QUICKSTART), asking(prompts)) == lengths
