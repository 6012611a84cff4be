"""Whatever a file or an override contains, the result is a configuration or a ConfigError of printable lines."""

import random
from pathlib import Path

import pytest

from recipes.config.grpo import defaults, import_grpo_config
from recipes.config.load import load_config
from recipes.config.schema import schema_keys
from recipes.problems import ConfigError

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
VALUES = [
    "null", "true", "0", "-1", "2", "3.5", "1e400", ".nan", "-.inf", "9" * 60, "abc", "''", "é", "[]", "{}", "[1, a]",
    "[[1]]", "[null]", "{a: 1}", "{a: {b: c}}", "{1: 2}", "{'': 1}", "!!int x", "&a [*a]", "*x", "{<<: {a: 1}}",
    '"\\x1b"', "? a", "a: b", "|", "\0", "unsloth", "scratch", "bpe", "gsm8k", "auto",
]  # fmt: skip
PIECES = [
    *"[]{}:,&*!|>'\"%@`#-?\n \t\0\x1b\x85\u2028\ud800e9",
    "<<: *a",
    "&a ",
    "!!python/name:os.system ",
    "---\n",
]


def require_refusal_in_words(path, overrides=()):
    lines = ["well"]
    try:
        load_config(path, overrides).to_yaml()
    except ConfigError as error:
        lines = error.lines
    assert lines
    assert all(line.isprintable() for line in lines), ascii(lines)


@pytest.mark.parametrize("seed", range(4))
def test_any_override(seed, without_unsloth):
    rng = random.Random(seed)
    keys = ["task.rewards", "task.dataset", *schema_keys()]
    keys += [f"grpo.{name}" for name in defaults(import_grpo_config(""))]
    for _ in range(60):
        overrides = [f"{rng.choice(keys)}={rng.choice(VALUES)}" for _ in range(rng.randint(1, 3))]
        require_refusal_in_words(rng.choice(CONFIGS), overrides)


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_to_a_file(seed, tmp_path, without_unsloth):
    rng = random.Random(seed)
    for _ in range(40):
        text = rng.choice(CONFIGS).read_text(encoding="utf-8")
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(text))
            end = start + rng.choice([0, 1, 5, 40])
            text = text[:start] + rng.choice(PIECES) * rng.choice([1, 2, 50]) + text[end:]
        path = tmp_path / "damaged.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        require_refusal_in_words(path)
