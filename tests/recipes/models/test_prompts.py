"""A chat template that cannot say a task's prompt is refused before a model is loaded, and can do no harm."""

import json

import pytest

from recipes.config.load import load_config
from recipes.models.prompts import check_problems
from recipes.models.tokenizers import CHAT_TEMPLATE, bpe_tokenizer
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
