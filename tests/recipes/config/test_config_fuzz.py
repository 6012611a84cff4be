"""Whatever a file or an override contains, the result is a configuration or a ConfigError of harmless lines, soon."""

import re
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from recipes.config.grpo import defaults, import_grpo_config
from recipes.config.load import load_config
from recipes.config.schema import schema_keys
from recipes.config.source import read_text
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


# What moves a cursor, begins a line, turns the reading direction, or cannot be written to a file.
HARMFUL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SECONDS = 1.0  # of this process, for any file
KEYS = [
    "task.rewards",
    "task.dataset",
    *schema_keys(),
    *(f"grpo.{name}" for name in defaults(import_grpo_config(""))),
]
# A seed that stands still: the same test every time, and seconds in all.
bounded = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
pytestmark = pytest.mark.usefixtures("without_unsloth")


@pytest.fixture(autouse=True, scope="module")
def _imported():
    """What a first configuration imports takes seconds and is no part of its reading."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "unsloth", None)
        for path in CONFIGS:
            load_config(path)


def require_refusal_in_words(read):
    began, lines = time.process_time(), ["well"]
    try:
        read()
    except ConfigError as error:
        lines = error.lines
    assert time.process_time() - began < SECONDS
    assert lines
    assert not any(HARMFUL.search(line) for line in lines), ascii(lines)


scalars = st.one_of(
    st.sampled_from(VALUES), st.integers().map(str), st.floats().map(str), st.text(max_size=8)
)
flows = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.dictionaries(scalars, inner, max_size=3).map(
            lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"
        ),
    ),
    max_leaves=8,
)
overrides = st.builds("{}={}".format, st.one_of(st.sampled_from(KEYS), st.text(max_size=12)), flows)


@bounded
@given(st.sampled_from(CONFIGS), st.lists(overrides, min_size=1, max_size=3))
def test_any_override(path, given_overrides):
    require_refusal_in_words(lambda: load_config(path, given_overrides).to_yaml())


damages = st.tuples(
    st.floats(0, 1, exclude_max=True), st.sampled_from([0, 1, 5, 40]), st.sampled_from(PIECES),
    st.sampled_from([1, 2, 50]),
)  # fmt: skip


@bounded
@given(st.sampled_from(CONFIGS), st.lists(damages, min_size=1, max_size=4))
def test_any_damage_to_a_file(tmp_path, path, given_damages):
    text = path.read_text(encoding="utf-8")
    for place, removed, piece, times in given_damages:
        start = int(place * len(text))
        text = text[:start] + piece * times + text[start + removed :]
    damaged = tmp_path / "damaged.yaml"
    damaged.write_bytes(text.encode("utf-8", "surrogatepass"))
    require_refusal_in_words(lambda: load_config(damaged).to_yaml())


repeated = st.lists(st.tuples(st.sampled_from([*PIECES, *VALUES]), st.integers(1, 3000)), max_size=5).map(
    lambda parts: "".join(piece * times for piece, times in parts)
)


@settings(bounded, max_examples=400)
@given(st.one_of(st.text(max_size=80), st.lists(st.sampled_from([*PIECES, *VALUES])).map("".join), repeated))
@example("[" * 20_000)
@example("a: " * 20_000)
@example("? " * 20_000)
@example("- " * 20_000)
@example("&a " * 20_000)
@example("!" * 20_000)
@example("'" + "\n" * 100_000)
def test_any_text_as_a_file(text):
    require_refusal_in_words(lambda: read_text(text, "any.yaml"))


@bounded
@given(st.binary(max_size=60))
def test_any_bytes_as_a_file(tmp_path, data):
    path = tmp_path / "any.yaml"
    path.write_bytes(data)
    require_refusal_in_words(lambda: load_config(path))
