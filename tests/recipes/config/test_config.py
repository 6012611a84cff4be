"""The configuration: what it accepts, and that each mistake is one readable line and exit status 2."""

import dataclasses
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import ready
import yaml

from recipes.config import load
from recipes.config.checks import _check_lengths
from recipes.config.grpo import GONE, OWNED, REFUSED, defaults, grpo_section, import_grpo_config, loss_types
from recipes.config.load import ConfigError, load_config
from recipes.config.reference import markdown
from recipes.config.schema import ModelConfig
from recipes.config.source import dump, read_file, read_text
from recipes.problems import unknown_key, visible
from recipes.tasks.gsm8k import Gsm8k

ROOT = Path(__file__).parents[3]
GOOD = """\
model:
  loader: scratch
task:
  name: countdown
grpo:
  learning_rate: 5e-6
  num_generations: 4
"""


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def error_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return caught.value


def test_reads_numbers_as_yaml_1_2(good):
    config = load_config(good, ["grpo.weight_decay=1e-3", "run.name=no"])
    assert config.grpo["learning_rate"] == 5e-6
    assert config.grpo["weight_decay"] == 1e-3
    assert config.run.name == "no"  # YAML 1.1 reads false


def test_defaults_and_name(good):
    config = load_config(good)
    assert config.run.name == "good"
    assert config.head.impl == "memhead"
    assert (config.step.impl, config.step.token_budget) == ("packed", None)
    assert config.lora is None
    assert config.model.scratch.hidden_size == 128


def test_resolved_yaml_gives_an_equal_config(good, tmp_path):
    overrides = ["lora.r=8", "run.warm_start.steps=10", "grpo.loss_type=dr_grpo", "head.chunk=128"]
    config = load_config(good, overrides)
    again = load_config(write(tmp_path, "resolved.yaml", config.to_yaml()))
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    assert config != load_config(good)


def test_a_step_that_nobody_named_stays_unnamed_in_the_resolved_yaml(good):
    """The default gives way where it is not exact, the name does not: a rerun would end where the run went on."""
    assert "impl" not in yaml.safe_load(load_config(good).to_yaml())["step"]
    named = load_config(good, ["step.impl=packed"])
    assert yaml.safe_load(named.to_yaml())["step"]["impl"] == "packed"


def test_the_first_step_is_logged_however_many_lie_between_two_logs(good, tmp_path):
    arguments = load_config(good, ["tracking.logging_every=7"]).grpo_config(tmp_path)
    assert (arguments.logging_steps, arguments.logging_first_step) == (7, True)


@pytest.mark.parametrize(
    "value", ["5e-6", "no", "010", "1:30", "null", "", "a: b", "true", "2026-01-01", "é"]
)
def test_dump_keeps_texts_texts(value):
    assert read_text(dump({"key": value}), "x").data == {"key": value}


def test_grpo_config_gets_every_field_by_its_name(good, tmp_path):
    overrides = [
        "grpo.beta=0",
        "grpo.scale_rewards=none",
        "run.seed=7",
        "tracking.logging_every=3",
        "run.save_every=5",
    ]
    arguments = load_config(good, overrides).grpo_config(tmp_path)
    assert arguments.learning_rate == 5e-6
    assert arguments.num_generations == 4
    assert arguments.seed == 7
    assert arguments.logging_steps == 3
    assert arguments.save_steps == 5
    assert arguments.report_to == []
    assert arguments.output_dir == str(tmp_path)
    assert arguments.gradient_checkpointing is False


def test_lora_becomes_a_peft_config(good):
    peft_config = load_config(
        good, ["lora.r=8", "lora.alpha=8", "lora.target_modules=[q_proj]", "run.warm_start.steps=1"]
    ).lora.peft_config()
    assert (peft_config.r, peft_config.lora_alpha, peft_config.target_modules) == (8, 8, {"q_proj"})
    assert peft_config.task_type == "CAUSAL_LM"


def test_grpo_is_complete_and_grpo_given_is_what_was_written(good):
    """Every field that may be set, with the value that TRL's own class would have."""
    config = load_config(good)
    assert config.grpo_given == {"learning_rate": 5e-6, "num_generations": 4}
    plain = {field.name: field for field in dataclasses.fields(import_grpo_config(""))}
    assert set(config.grpo) == set(plain) - set(OWNED) - set(REFUSED)
    for name in set(config.grpo) - set(config.grpo_given):
        factory = plain[name].default_factory
        default = plain[name].default if factory is dataclasses.MISSING else factory()
        assert config.grpo[name] == default, name
    assert (config.grpo["learning_rate"], config.grpo["num_generations"]) == (5e-6, 4)
    assert yaml.safe_load(config.to_yaml())["grpo"] == {"learning_rate": 5e-6, "num_generations": 4}


def test_grpo_config_of_the_complete_section_is_that_of_the_given_fields(good, tmp_path):
    made = load_config(good).grpo_config(tmp_path)
    owned = {name: getattr(made, name) for name in OWNED if name != "output_dir"}
    kept = {"project": "memhead", "use_cpu": made.use_cpu, "bf16": made.bf16, "fp16": made.fp16}
    kept["ddp_find_unused_parameters"] = False
    plain = import_grpo_config("")(str(tmp_path), learning_rate=5e-6, num_generations=4, **owned, **kept)
    assert made.to_dict() == plain.to_dict()


# base: files


def test_a_mistake_is_where_it_was_written_last(good, tmp_path):
    """In the file that replaces the key; what is right there is no mistake of the file below."""
    child = write(tmp_path, "child.yaml", "base: good.yaml\n\n\ngrpo:\n  learning_rate: -1\n")
    assert str(error_of(child)).startswith(f"{child}:5: grpo.learning_rate: out of range")
    grandchild = write(tmp_path, "grandchild.yaml", "base: child.yaml\ngrpo: {learning_rate: 1e-6}\n")
    assert load_config(grandchild).grpo["learning_rate"] == 1e-6
    assert str(error_of(grandchild, "grpo.learning_rate=-2")).startswith("command line: grpo.learning_rate")


def test_base_is_merged_and_the_child_says_what_differs(good, tmp_path):
    child = write(
        tmp_path,
        "child.yaml",
        "base: good.yaml\ngrpo:\n  num_generations: 8\nlora: {r: 4}\nrun: {warm_start: {}}\n",
    )
    grandchild = write(tmp_path, "grandchild.yaml", "base: child.yaml\nlora: null\n")
    assert load_config(child).grpo_given == {"learning_rate": 5e-6, "num_generations": 8}
    assert load_config(child).lora.r == 4
    assert load_config(grandchild).lora is None


def test_base_that_leads_back_to_itself(tmp_path):
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    path = write(tmp_path, "b.yaml", "base: a.yaml\n")
    assert "base: goes round in a circle: b.yaml -> a.yaml -> b.yaml" in str(error_of(path))


def test_a_base_by_another_way_to_it_is_the_same_file(tmp_path):
    """Each round would lead there by a longer path, until the system takes no more of it."""
    path = write(tmp_path, "a.yaml", f"base: ../{tmp_path.name}/a.yaml\n")
    assert "base: goes round in a circle: a.yaml -> a.yaml" in str(error_of(path))


def test_base_that_is_missing(tmp_path):
    path = write(tmp_path, "a.yaml", "base: none.yaml\n")
    assert str(error_of(path)) == f"{path}:1: base: no such file (value 'none.yaml'); " + (
        "the path is relative to the file that names it"
    )
    path = write(tmp_path, "a.yaml", "base: .\n")  # a folder
    assert str(error_of(path)).startswith(f"{path}:1: base: no such file (value '.')")


def test_an_error_in_a_base_names_the_base(good, tmp_path):
    write(tmp_path, "wrong.yaml", GOOD + "  learning_rte: 1\n")
    path = write(tmp_path, "child.yaml", "base: wrong.yaml\n")
    assert str(error_of(path)).startswith(f"{tmp_path / 'wrong.yaml'}:8: grpo.learning_rte: unknown key")


def test_another_task_drops_the_options_of_its_base(tmp_path):
    write(tmp_path, "base.yaml", GOOD.replace("countdown", "other\n  nothing: 3"))
    path = write(tmp_path, "child.yaml", "base: base.yaml\ntask: {name: countdown}\n")
    assert load_config(path).task.name == "countdown"
    assert read_file(path).where.keys() >= {"task", "task.name", "grpo.learning_rate"}
    assert "task.nothing" not in read_file(path).where  # a mistake would be looked for where it is not read


# mistakes in the file


def test_the_whole_line(tmp_path):
    path = write(tmp_path, "x.yaml", GOOD.replace("learning_rate", "learning_rte"))
    expected = f"{path}:6: grpo.learning_rte: unknown key (value 5e-6); did you mean grpo.learning_rate?"
    assert str(error_of(path)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "  num_generations: 8\n", "x.yaml:8: grpo.num_generations: written twice"),
        (GOOD + "model: {}\n", "x.yaml:8: model: written twice"),
        ("model: [1\n", "not valid YAML"),
        ("- 1\n", "must be a mapping of sections"),
        (GOOD + "  beta: !!python/object/apply:os.getcwd []\n", "is not read; write a plain value"),
        (GOOD + "  1: 2\n", "a key must be text"),
        ("", "model.loader: is missing"),
        (GOOD.replace("  name: countdown", "  {}"), "task.name: is missing; use char_count, countdown"),
        (GOOD + "head: 3\n", "x.yaml:8: head: must be a section of keys (value 3)"),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, expected):
    assert expected in str(error_of(write(tmp_path, "x.yaml", text)))


def test_a_file_that_is_missing(tmp_path):
    assert "cannot be read: No such file" in str(error_of(tmp_path / "none.yaml"))


ALIASES = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
MERGES = "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))
HOSTILE = {
    "a NUL byte": ("a: \0", "not valid YAML: unacceptable character #x0000"),
    "a surrogate": ("a: \ud800", "is not UTF-8 text"),
    "brackets": ("a: " + "[" * 20_000, "opens more than 100 brackets at once"),
    "closed brackets": ("a: " + "[" * 20_000 + "]" * 20_000, "opens more than 100 brackets at once"),
    "braces": ("a: " + "{a: " * 20_000, "opens more than 100 brackets at once"),
    "dashes": ("a:\n" + "- " * 20_000, "x.yaml:2: is nested more than 20 deep"),
    "digits": ("a: " + "9" * 4300, "x.yaml:1: is a number of 4,300 digits"),
    "hexadecimal digits": ("a: 0x" + "f" * 9000, "x.yaml:1: is a number of 9,002 digits"),
    "a bomb of aliases": ("a0: &a0 [x]\n" + ALIASES, "holds more than 5,000 keys and values"),
    "a bomb of merges": ("a0: &a0 {x: 1}\n" + MERGES, "holds more than 5,000 keys and values"),
    "a number that is a list": ("a: !!int [1]", "not valid YAML: int() argument must be"),
    "a tag that lies": ("a: !!int x", "not valid YAML: invalid literal for int()"),
    "megabytes": ("a: b\n" * 1_000_000, "is longer than 200,000 characters"),
    "strange keys": ("".join(f"key{i}: 1\n" for i in range(1000)), "key49: unknown key"),
    "a long key": (f"{'k' * 100_000}: 1", "not valid YAML"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_at_once(tmp_path, kind):
    text, expected = HOSTILE[kind]
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    import_grpo_config("")
    started = time.process_time()
    error = error_of(path)
    assert time.process_time() - started < 1.0
    assert expected in str(error)
    assert len(error.lines) <= 60


def test_a_section_with_thousands_of_mistakes_lists_fifty(tmp_path):
    text = GOOD + "".join(f"  key{i}: 1\n" for i in range(1000))
    error = error_of(write(tmp_path, "x.yaml", text))
    assert len(error.lines) == 51
    assert "grpo: has 950 more mistakes; mend these first" in error.lines[-1]


@pytest.mark.parametrize(
    "override",
    [
        "grpo.per_device_train_batch_size=" + "9" * 90,
        "grpo.num_generations=" + "9" * 90,
        "a." * 20_000 + "b=1",
    ],
)
def test_absurdly_long_numbers_and_keys(good, override):
    started = time.process_time()
    assert len(str(error_of(good, override))) < 2000
    assert time.process_time() - started < 1.0


def test_control_characters_never_reach_the_terminal(good, tmp_path):
    """A key, a value, a file's name: escapes and other control characters are shown as text."""
    texts = (
        str(error_of(good, "grpo.\x1b[31mred=1")),
        str(error_of(write(tmp_path, "x.yaml", '"\\e]0;title\\a": 1\n' + GOOD))),
        str(error_of(good, 'grpo.loss_type="\\u202egrpo"')),
        str(error_of(tmp_path / "a\x9b2Jb.yaml")),
        visible("first line\n\tthen \x1b[2J and \r and \u202e, é 😀\ud800"),
    )
    for text in texts:
        assert all(character.isprintable() or character in "\n\t" for character in text)
    assert "grpo.\\x1b[31mred: unknown key" in texts[0]
    assert texts[4] == "first line\n\tthen \\x1b[2J and \\r and \\u202e, é 😀\\ud800"


# mistakes in a value, by override: each message names key, value and remedy

MISTAKES = {
    # unknown keys
    "grpo.learning_rte=2e-5": "grpo.learning_rte: unknown key (value 2e-5); did you mean grpo.learning_rate?",
    "learning_rate=2e-5": "learning_rate: unknown key (value 2e-5); did you mean grpo.learning_rate?",
    "model.learning_rate=1": "did you mean grpo.learning_rate?",
    "tracing.memory=true": "tracing: unknown key",
    "model.scratch.hiden_size=2": "did you mean model.scratch.hidden_size?",
    "run.warm_start.stepz=3": "did you mean run.warm_start.steps?",
    "task.eval_problemz=3": "did you mean task.eval_problems?",
    "rewards={correct: 1.0}": "did you mean task.rewards?",
    "grpo.eval_problems=3": "did you mean task.eval_problems?",
    "task.name=countdwn": "task.name: unknown task (value 'countdwn'); use ",
    # types
    "grpo.learning_rate=abc": "grpo.learning_rate: must be a number (value 'abc')",
    "grpo.learning_rate=true": "must be a number (value true)",
    "grpo.learning_rate='2e-5'": "must be a number (value '2e-5')",
    "grpo.learning_rate=.nan": "must be a number (value nan)",
    "grpo.num_generations=4.5": "must be an integer",
    "grpo.num_generations=null": "must be an integer",
    "grpo.mask_truncated_completions=1": "must be true or false (value 1)",
    "grpo.debug={a: 1}": "grpo.debug: must be text or a list of values (value {'a': 1})",
    "grpo.include_num_input_tokens_seen={}": "must be text or true or false (value {})",
    "grpo.chat_template_kwargs=[1]": "grpo.chat_template_kwargs: must be a mapping or null (value [1])",
    "grpo.include_for_metrics=[loss, 1]": "grpo.include_for_metrics.1: must be text (value 1)",
    "model.scratch.hidden_size=2.5": "must be an integer (value 2.5)",
    "model.load_in_4bit=yes": "must be true or false (value 'yes')",
    "task.eval_problems=many": "task.eval_problems: must be an integer (value 'many')",
    "lora=3": "lora: must be a section of keys (value 3)",
    "run.evaluation=null": "run.evaluation: must be a section of keys (value null)",
    # ranges and choices
    "grpo.learning_rate=0": "grpo.learning_rate: out of range (value 0); must be > 0",
    "grpo.num_generations=1": "out of range (value 1); must be >= 2",
    "grpo.temperature=0": "must be > 0",
    "grpo.epsilon=-0.1": "must be >= 0",
    "grpo.beta=-1": "must be >= 0",
    "grpo.max_completion_length=0": "must be >= 1",
    "grpo.top_p=1.5": "grpo.top_p: out of range (value 1.5); must be <= 1",
    "grpo.loss_type=ppo": "grpo.loss_type: unknown choice (value 'ppo'); use grpo, dr_grpo, dapo",
    "grpo.lr_scheduler_type=cosin": "use linear, cosine",
    "grpo.scale_rewards=batches": "use group, batch, none, true or false",
    "grpo.remove_unused_columns=true": "use false",  # rewards read them
    "grpo.optim=adam": "use adamw_torch",
    "model.loader=hf": "model.loader: unknown choice (value 'hf'); use scratch, transformers or unsloth",
    "head.impl=liger": "use memhead, trl or full",
    "step.impl=padded": "step.impl: unknown choice (value 'padded'); use packed or trl",
    "step.token_budget=0": "step.token_budget: out of range (value 0); must be >= 1",
    "head.chunk=0": "head.chunk: out of range (value 0); must be >= 1",
    "task.eval_problems=0": "task.eval_problems: out of range (value 0); must be >= 1",
    "run.warm_start.target_accuracy=1.5": "must be <= 1",
    "model.scratch={hidden_size: 36, heads: 4}": "model.scratch.hidden_size: not a multiple of 2 × heads 4 (value 36); "
    "set it to 32 or 40",
    "model.scratch={hidden_size: 4, heads: 4}": "not a multiple of 2 × heads 4 (value 4); set it to 8",
    "run.name=a/b": "run.name: is no folder name (value 'a/b')",
    "run.name=" + 201 * "a": "run.name: is no folder name (value 'aaaa",
    "grpo.max_steps=-5": "grpo.max_steps: is no number of steps (value -5); set it to 1 or more, or to -1",
    "grpo.max_steps=0": "grpo.max_steps: is no number of steps (value 0)",
    "task.rewards={correct: 1.0, correct: 2.0}": "command line: task.rewards.correct: written twice",
    "run.name=!!python/name:os.system": "command line: run.name: the YAML tag tag:yaml.org,2002:python/name:os.system",
    # fields that TRL no longer has, that are ours, that are refused
    "grpo.max_prompt_length=256": "no longer exists in the installed TRL (value 256); prompts are no longer truncated",
    "grpo.warmup_ratio=0.1": "set grpo.warmup_steps: a value below 1 is a share of all steps",
    "grpo.evaluation_strategy=steps": "set run.evaluation.every",
    "grpo.no_cuda=true": "set grpo.use_cpu: true",
    "grpo.seed=1": "grpo.seed: is not set here (value 1); set run.seed",
    "grpo.output_dir=x": "set run.output_root and run.name",
    "grpo.report_to=wandb": "set tracking.report_to",
    "grpo.run_name=x": "set run.name",
    "grpo.trust_remote_code=true": "grpo.trust_remote_code: is refused",
    "grpo.save_only_model=true": "grpo.save_only_model: is refused (value true); a checkpoint without its optimizer",
    "grpo.auto_find_batch_size=true": "lower per_device_train_batch_size",
    # combinations
    "grpo.num_generations=6": "a generation batch of 8 cannot be cut into groups of 6",
    "grpo.generation_batch_size=12": "set generation_batch_size to 8 or 16",
    "grpo.sync_ref_model=true": "set grpo.beta above 0",
    "grpo.dataloader_persistent_workers=true": "there are no workers to keep (value true); set grpo.dataloader_num_",
    "grpo.loss_type=luspo": "set grpo.importance_sampling_level: sequence",
    "grpo.lr_scheduler_kwargs={a: 1}": "grpo.lr_scheduler_kwargs: does not fit: got an unexpected keyword argument 'a'",
    "grpo.lr_scheduler_kwargs='{\"a\": 1}'": "grpo.lr_scheduler_kwargs: does not fit: got an unexpected",
    "grpo.lr_scheduler_kwargs=power": "grpo.lr_scheduler_kwargs: does not fit: it is no mapping (value 'power')",
    "grpo.lr_scheduler_type=warmup_stable_decay": "does not fit: missing a required argument: 'num_decay_steps'",
    "grpo.optim_args=junk": "grpo.optim_args: is no list of name=value (value 'junk'); write a=1,b=2",
    'grpo.optim_args="a=1,junk"': "grpo.optim_args: is no list of name=value (value 'a=1,junk'); write a=1,b=2",
    "grpo.optim_args=a==1": "grpo.optim_args: is no list of name=value",
    "grpo.reward_weights=[1]": "grpo.reward_weights: is not set here (value [1]); set task.rewards, by name",
    "task.rewards={correct: 0.0, well_formed: 0.0}": "task.rewards: weighs nothing",
    "grpo.max_completion_length=1024": "no room for a prompt within model.scratch.max_positions 1024 (value 1024)",
    "model.max_seq_length=128": "within model.max_seq_length 128 (value 512); set it below 128, or raise model.max_",
    "model.loader=transformers": "model.name: is missing; set it to a hub id or a local path",
    "model.name=x": "model.name: means nothing to the loader scratch (value 'x')",
    "model.revision=x": "model.revision: means nothing to the loader scratch (value 'x')",
    "model.fast_inference=true": "remove it, or set model.loader: unsloth",
    "model.load_in_4bit=true": "add a lora section",
    "model.scratch.hidden_size=130": "not a multiple of 2 × heads 4 (value 130); set it to 128 or 136",
    "model.scratch.kv_heads=3": "does not divide heads 4",
    "run.warm_start={check_every: null}": "is never looked for (value 0.45); set it to null, or run.",
    "lora.r=4": "lora: a new model's adapters would be all that is kept of it; add run.warm_start, or set lora: null",
    "grpo.beta=0.1": "a new model cannot be loaded again as its reference (value 0.1); add run.warm_start",
    "lora.target_modules=[lm_head]": "remove 'lm_head' from it",
    # overrides themselves
    "grpo.learning_rate": "not an override",
    "=3": "not an override",
}


def test_a_new_model_needs_a_tokenizer_of_the_task(tmp_path):
    path = write(tmp_path, "x.yaml", "model: {loader: scratch}\ntask: {name: gsm8k}\n")
    assert "gsm8k has no list of characters to make one of (value null); set it to bpe" in str(error_of(path))


def test_the_reference_of_adapters_does_not_move(good):
    error = error_of(good, "grpo.sync_ref_model=true", "grpo.beta=0.1", "lora.r=4", "run.warm_start.steps=1")
    assert "grpo.sync_ref_model: the reference of adapters is the model without them" in str(error)


def test_the_reference_of_a_new_models_adapters_is_no_problem_beside_theirs(good):
    (line,) = error_of(good, "grpo.beta=0.1", "lora.r=4").lines
    assert "lora: a new model's adapters would be all that is kept of it" in line


@pytest.mark.parametrize("server", ["grpo.use_vllm=false", "grpo.vllm_mode=server"])
def test_options_of_vllm_in_this_process_are_refused_without_it(tmp_path, server):
    path = write(tmp_path, "x.yaml", "model: {loader: transformers, name: x}\ntask: {name: countdown}\n")
    given = ["grpo.use_vllm=true", "grpo.vllm_mode=colocate", "model.vllm_engine={max_num_seqs: 8}"]
    assert load_config(path, given).model.vllm_engine == {"max_num_seqs": 8}
    replaced = [text for text in given if text.partition("=")[0] != server.partition("=")[0]]
    (line,) = error_of(path, *replaced, server).lines
    assert "model.vllm_engine: is for vLLM beside TRL's trainer" in line


def test_arguments_of_a_schedule_may_be_json(tmp_path):
    path = write(tmp_path, "x.yaml", "model: {loader: scratch}\ntask: {name: countdown}\n")
    told = ["grpo.lr_scheduler_type=polynomial", "grpo.lr_scheduler_kwargs='{\"power\": 2.0}'"]
    assert load_config(path, told).grpo_config(tmp_path).lr_scheduler_kwargs == {"power": 2.0}


def test_a_reward_of_the_base_is_taken_away_by_null(tmp_path):
    """Mappings are merged, so one that is left out above stays."""
    write(
        tmp_path,
        "base.yaml",
        "model: {loader: scratch}\ntask: {name: countdown, rewards: {correct: 1.0, gone.away: 0.5}}\n",
    )
    path = write(
        tmp_path, "x.yaml", "base: base.yaml\ntask: {rewards: {gone.away: null, well_formed: 0.1}}\n"
    )
    assert load_config(path).make_task().reward_weights == {"correct": 1.0, "well_formed": 0.1}
    told = load_config(path, ["task.rewards={correct: null}"])
    assert told.make_task().reward_weights == {"well_formed": 0.1}
    again = write(tmp_path, "again.yaml", told.to_yaml())
    assert load_config(again).make_task().reward_weights == {"well_formed": 0.1}
    nothing = ["task.rewards={correct: null, well_formed: null}"]
    assert "task.rewards: weighs nothing" in str(error_of(path, *nothing))


def test_no_rewards_are_not_the_defaults(tmp_path):
    path = write(
        tmp_path, "x.yaml", "model: {loader: transformers, name: x}\ntask: {name: gsm8k, rewards: {}}\n"
    )
    assert "task.rewards: weighs nothing (value {}); give one" in str(error_of(path))
    null = write(
        tmp_path, "null.yaml", "model: {loader: transformers, name: x}\ntask: {name: gsm8k, rewards: null}\n"
    )
    assert load_config(null).make_task().reward_weights == Gsm8k.weights


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("task.rewards={correctness: lots}", "task.rewards.correctness: must be a number (value 'lots')"),
        ("task.rewards.correctness=true", "task.rewards.correctness: must be a number (value true)"),
        ("task.rewards=3", "task.rewards: must be a mapping or null (value 3)"),
        (
            "task.rewards.mine.brevity=0.1",
            "task.rewards.mine: is a section; write a name with a dot as task.rewards={my_",
        ),
    ],
)
def test_weights_of_rewards(tmp_path, override, expected):
    path = write(tmp_path, "x.yaml", "model: {loader: transformers, name: x}\ntask: {name: gsm8k}\n")
    assert f"command line: {expected}" in str(error_of(path, override))


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes(good, override):
    error = error_of(good, override)
    assert MISTAKES[override] in str(error)
    assert all(line.startswith(("command line: ", str(good))) for line in error.lines)
    assert "\n" not in error.lines[0]


def test_a_length_that_unsloth_takes_where_none_is_given():
    model = ModelConfig(loader="unsloth", name="x")  # of itself: reading a whole one would import Unsloth
    (found,) = _check_lengths(model, {"max_completion_length": 2048})
    assert found.message == "leaves no room for a prompt within model.max_seq_length 2048"
    assert not list(_check_lengths(model, {"max_completion_length": 2047}))


@pytest.mark.parametrize(
    ("known", "remedy"), [(20, "known here: a0, a1, a10"), (21, "docs/configuration.md lists every key")]
)
def test_a_few_known_keys_are_listed_and_many_are_not(known, remedy):
    found = unknown_key("x", "zzzz", 1, [f"x.a{number}" for number in range(known)])
    assert remedy in found.remedy


def test_every_problem_is_listed_one_a_line(good):
    error = error_of(good, "grpo.learning_rte=1", "model.loader=hf", "run.seed=-1", "x=1")
    assert len(error.lines) == 4
    assert str(error) == "\n".join(error.lines)


def test_a_warm_up_that_transformers_would_ignore(good):
    line = str(error_of(good, "grpo.lr_scheduler_type=constant", "grpo.warmup_steps=10"))
    assert "grpo.warmup_steps: the schedule constant has none (value 10)" in line
    assert "constant_with_warmup" in line
    load_config(good, ["grpo.lr_scheduler_type=constant_with_warmup", "grpo.warmup_steps=10"])
    load_config(good, ["grpo.lr_scheduler_type=constant", "grpo.warmup_steps=0"])


def test_an_override_given_twice(good):
    assert "given twice" in str(error_of(good, "run.seed=1", "run.seed=2"))


# batches


def test_batch_message_gives_values_that_work(good):
    line = str(error_of(good, "grpo.num_generations=6"))
    assert "per_device_train_batch_size 8 × gradient_accumulation_steps 1 × 1 process(es)" in line
    assert "set num_generations to 4 or 8, or per_device_train_batch_size to 6 or 12" in line
    for remedy in (
        ["grpo.num_generations=8"],
        ["grpo.num_generations=6", "grpo.per_device_train_batch_size=12"],
    ):
        load_config(good, remedy).grpo_config("x")  # TRL agrees


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # of the quickstart's shape: a batch of 8 a step
        (["num_generations=16", "steps_per_generation=2"], None),
        (["num_generations=16", "gradient_accumulation_steps=2"], None),
        (["num_generations=16", "steps_per_generation=3"], "steps_per_generation 3"),
        (
            ["num_generations=16", "steps_per_generation=1", "gradient_accumulation_steps=2"],
            "steps_per_generation 1",
        ),
        (["num_generations=12", "gradient_accumulation_steps=3", "steps_per_generation=2"], "batch of 16 "),
        (["num_generations=12", "gradient_accumulation_steps=2", "steps_per_generation=3"], None),
        (["num_generations=8", "generation_batch_size=16", "gradient_accumulation_steps=3"], None),
        (["num_generations=6", "generation_batch_size=16"], "(generation_batch_size 16)"),
        (
            ["num_generations=8", "generation_batch_size=12"],
            "not a multiple of per_device_train_batch_size 8",
        ),
        (["num_generations=8", "generation_batch_size=16", "steps_per_generation=2"], "given together with"),
    ],
    ids=str,
)
def test_which_batches_are_good(good, overrides, expected, tmp_path):
    """And TRL agrees about those that are."""
    given = [f"grpo.{override}" for override in overrides]
    if expected is None:
        arguments = load_config(good, given).grpo_config(tmp_path)
        assert arguments.generation_batch_size % arguments.num_generations == 0
    else:
        assert expected in str(error_of(good, *given))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-007", -7), ("0x1F", 31), ("0o17", 15), ("5e-6", 5e-6), (".5", 0.5), ("1.", 1.0), ("no", "no"),
        ("on", "on"), ("True", True), ("~", None), ("", None), ("2026-01-01", "2026-01-01"), ("1_000", "1_000"),
        ("12:30", "12:30"), (".inf", math.inf),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = read_text(f"a: {text}", "x.yaml").data["a"]
    assert (found, type(found)) == (value, type(value))


def test_batch_counts_processes(good, monkeypatch):
    load_config(good, ["grpo.per_device_train_batch_size=4", "grpo.num_generations=4"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    load_config(good, ["grpo.per_device_train_batch_size=2", "grpo.num_generations=4"])
    line = str(error_of(good, "grpo.per_device_train_batch_size=1", "grpo.num_generations=4"))
    assert "1 × gradient_accumulation_steps 1 × 2 process(es)" in line
    told = ["grpo.per_device_train_batch_size=8", "grpo.num_generations=4", "grpo.generation_batch_size=24"]
    line = str(error_of(good, *told))
    assert "not a multiple of per_device_train_batch_size 8 × 2 process(es)" in line
    assert "set generation_batch_size to 16 or 32" in line


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("generations", [2, 3, 4])
def test_batches_agree_with_trl(good, batch, accumulation, generations, tmp_path):
    fields = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_generations": generations,
    }
    overrides = [f"grpo.{name}={value}" for name, value in fields.items()]
    try:
        import_grpo_config("")(output_dir=str(tmp_path), use_cpu=True, bf16=False, **fields)
    except ValueError:
        error_of(good, *overrides)
    else:
        load_config(good, overrides)


# the tables against the installed TRL


def test_every_loss_type_of_trl_is_known():
    listed = get_args(grpo_section(import_grpo_config("")).model_fields["loss_type"].annotation)
    assert set(listed) == {"grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"}


def test_a_help_text_that_lists_no_loss_types_leaves_the_field_unchecked(good, monkeypatch):
    assert loss_types("Specifies the loss formulation to use.") == ()

    @dataclasses.dataclass
    class Later(import_grpo_config("")):
        loss_type: str = dataclasses.field(default="dapo", metadata={"help": "See the documentation."})

    monkeypatch.setattr(load, "import_grpo_config", lambda *_: Later)
    assert load_config(good, ["grpo.loss_type=of_next_year"]).grpo["loss_type"] == "of_next_year"
    assert "must be text" in str(error_of(good, "grpo.loss_type=3"))


def test_gone_fields_are_not_installed_fields():
    fields = {field.name for field in dataclasses.fields(import_grpo_config(""))}
    assert not fields & set(GONE)
    assert set(OWNED) <= fields
    assert set(REFUSED) <= fields


def test_trl_defaults_pass_our_checks(good):
    """None of our ranges and types may refuse TRL's own defaults."""
    skipped = {"num_generations", "learning_rate"}
    overrides = [
        f"grpo.{name}={yaml.safe_dump(default, default_flow_style=True).split(chr(10))[0]}"
        for name, default in defaults(import_grpo_config("")).items()
        if name not in skipped and isinstance(default, (bool, int, float, str))
    ]
    assert len(overrides) > 80
    load_config(good, overrides)


UNSLOTH = ["model.loader=unsloth", "model.name=some/model"]
VLLM, PACKED = "model.fast_inference=true", "step.impl=packed"
UNCORRECTED = "grpo.vllm_importance_sampling_correction=false"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.attn_implementation=sdpa"], "model.attn_implementation: is Unsloth's to choose"),
        (["model.compile_layers=true"], "model.compile_layers: Unsloth compiles its own"),
        (["model.vllm_standby=true"], "model.vllm_standby: is vLLM's"),
        (["model.gpu_memory_utilization=0.5"], "set model.fast_inference: true"),
        (["grpo.use_vllm=true"], "grpo.use_vllm: is model.fast_inference here"),
        (["head.parallel=vocabulary"], "head.parallel: is memhead's, in TRL's trainer"),
        ([VLLM, "model.revision=v1"], "model.revision: vLLM loads the main branch"),
        ([VLLM, "model.load_in_8bit=true"], "model.load_in_8bit: vLLM has no such weights"),
        ([VLLM, "lora.modules_to_save=[embed_tokens]"], "lora.modules_to_save: vLLM takes adapters alone"),
        ([VLLM, "lora=null"], "lora: vLLM shares frozen weights alone"),
        (
            ["run.warm_start={steps: 5}", "grpo.beta=0.1"],
            "run.warm_start: Unsloth's KL is to the model before it",
        ),
        ([PACKED, "lora=null"], "step.impl: Unsloth trains every weight in layers of transformers"),
        (
            [PACKED, "model.load_in_8bit=true"],
            "step.impl: Unsloth keeps 8-bit weights in layers of transformers",
        ),
        ([PACKED, VLLM, "grpo.top_p=0.9"], "grpo.vllm_importance_sampling_correction: vLLM's log-prob"),
        (
            [PACKED, VLLM, "grpo.top_k=9", UNCORRECTED, "grpo.off_policy_mask_threshold=0.0"],
            "grpo.off_policy_mask_threshold: vLLM's log-prob",
        ),
    ],
    ids=str,
)
def test_mistakes_with_unsloth(good, without_unsloth, overrides, expected):
    given = UNSLOTH if any(text.startswith("lora") for text in overrides) else [*UNSLOTH, "lora.r=4"]
    error = error_of(good, *given, *overrides)
    assert len(error.lines) == 1
    assert expected in error.lines[0]


def test_what_rules_packing_out_is_no_mistake_without_it(good, without_unsloth):
    for words in (["lora=null"], ["lora.r=4", VLLM, "grpo.top_p=0.9"]):
        assert not load_config(good, [*UNSLOTH, *words]).packs
    assert load_config(good, [*UNSLOTH, "lora.r=4", VLLM, PACKED, "grpo.top_p=0.9", UNCORRECTED]).packs


def test_a_warm_start_without_kl_is_unsloths_too(good, without_unsloth):
    config = load_config(good, [*UNSLOTH, "lora.r=4", "run.warm_start={steps: 5}", "grpo.beta=0"])
    assert config.run.warm_start.steps == 5


# the reference and the repo's own configurations


def test_a_path_may_begin_at_home(good, without_unsloth, monkeypatch):
    """As a shell would have it where it expands no ~ after an equals sign."""
    monkeypatch.setenv("HOME", "/home/somebody")
    given = ["model.loader=transformers", "model.scratch=null", "model.tokenizer=~/b", "run.output_root=~/c"]
    config = load_config(good, [*given, "model.name=~/a"])
    found = config.model.name, config.model.tokenizer, config.run.output_root
    assert found == tuple(f"/home/somebody/{name}" for name in "abc")
    assert load_config(good, [*given, "model.name=org/~a"]).model.name == "org/~a"


def test_reference_is_current():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python -m recipes.config --markdown > docs/configuration.md"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_configs_of_the_repo_resolve(path, tmp_path, without_unsloth):
    config = load_config(path)
    assert load_config(write(tmp_path, path.name, config.to_yaml())) == config


# the command lines


def run_module(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_command_line_prints_the_resolved_configuration(good):
    run = ready.python("-m", "recipes.config", str(good), "run.seed=3", env=dict(os.environ))
    said, errors = run.communicate(60)
    assert run.returncode == 0, errors
    assert yaml.safe_load(said)["run"]["seed"] == 3


def test_telemetry_is_off_for_whoever_imports_the_recipes():
    code = "import recipes, huggingface_hub.constants as c; raise SystemExit(not c.HF_HUB_DISABLE_TELEMETRY)"
    assert run_module("-c", code).returncode == 0


def test_train_grpo_exits_with_2_before_anything_is_loaded(good):
    run = ready.python("train_grpo.py", "--config", str(good), "grpo.learning_rte=2e-5", env=dict(os.environ))
    said, errors = run.communicate(60)
    assert run.returncode == 2
    expected = "command line: grpo.learning_rte: unknown key (value 2e-5); did you mean grpo.learning_rate?"
    assert errors.strip() == expected
    assert not re.search(r"Traceback|Loading", errors + said)


SERVER = ["grpo.use_vllm=true", "grpo.vllm_mode=server", "step.ahead=true"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["step.ahead=true"], "step.ahead: what samples on this card cannot do so while it trains (value true)"),
        (["grpo.use_vllm=true", "grpo.vllm_mode=colocate", "step.ahead=true"], "step.ahead: what samples on this"),
        ([*SERVER, "grpo.vllm_importance_sampling_correction=false"],
         "grpo.vllm_importance_sampling_correction: step.ahead samples from weights of before (value false)"),
        ([*SERVER, "grpo.top_p=0.9"], "step.ahead: under grpo.top_k, top_p or min_p "),
        ([*SERVER, "grpo.steps_per_generation=3", "grpo.gradient_accumulation_steps=2"],
         "grpo.steps_per_generation: step.ahead begins a rollout with an update (value 3)"),
    ],
)  # fmt: skip
def test_sampling_ahead_where_it_would_not_be_right(good, overrides, line):
    assert line in str(error_of(good, *overrides))


def test_sampling_ahead_on_a_server(good):
    more = ["grpo.steps_per_generation=4", "grpo.gradient_accumulation_steps=2"]
    assert load_config(good, [*SERVER, *more]).step.ahead
