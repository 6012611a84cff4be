"""For every key of the configuration: what another value of it changes, and that it changes nothing else.

A key without an entry fails, and so does one that reaches nothing.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from reach import reach
from test_quickstart import CONFIG as QUICKSTART
from test_quickstart import TINY
from tiny import made_up_checkpoint

import train_grpo
from recipes.config.load import load_config
from recipes.config.schema import SECTIONS, nested_section, schema_keys
from recipes.config.unsloth import import_unsloth
from recipes.problems import ConfigError
from recipes.tracking.run_folder import RunFolder
from recipes.training import resume

BASES = {
    "scratch": "model: {loader: scratch}\n"
    "run: {name: a, warm_start: {steps: 12, check_every: 5, target_accuracy: null}}\n",
    "bpe": "model: {loader: scratch, tokenizer: bpe}\nrun: {name: a}\n",
    "hub": "model: {loader: transformers, name: some/model}\nrun: {name: a}\nlora: {}\n",
    "whole": "model: {loader: transformers, name: some/model}\nrun: {name: a}\n",
    "server": "model: {loader: transformers, name: some/model}\nrun: {name: a}\nlora: {}\n"
    "grpo: {use_vllm: true, vllm_mode: server}\n",
    "unsloth": "model: {loader: unsloth, name: some/model}\nrun: {name: a}\nlora: {}\n",
    "vllm": "model: {loader: unsloth, name: some/model, fast_inference: true}\nrun: {name: a}\nlora: {}\n",
}  # fmt: skip
ANY = "task: {name: countdown}\n"


class Case(NamedTuple):
    """`key=value` in a run of a base, and what arrives differently: its place and its new value."""

    base: str
    value: str
    reaches: dict[str, Any]
    of: Any = None  # the value before, where the base's own would not do


GONE = object()  # no longer told at all


def rates(peak=1e-3, warmup=20, steps=12, least=0.05):
    return [
        round(peak * min(1.0, n / warmup if warmup else 1.0) * max(least, 1 - n / steps), 9)
        for n in range(1, steps + 1)
    ]


CASES: dict[str, list[Case]] = {
    # model
    "model.loader": [Case("hub", "unsloth", {"trainer": "trl", "peft": GONE, "trainer.": GONE, "unsloth": ...})],
    "model.name": [Case("hub", "other/model", {"model.0": "other/model", "tokenizer.0": "other/model"})],
    "model.revision": [Case("hub", "v2", {"model.revision": "v2", "tokenizer.revision": "v2", "peft.revision": "v2"}),
                       Case("unsloth", "v2", {"unsloth.revision": "v2"})],
    "model.tokenizer": [Case("hub", "other/tokenizer", {"tokenizer.0": "other/tokenizer"}),
                        Case("unsloth", "other/tokenizer", {"unsloth.tokenizer_name": "other/tokenizer"}),
                        Case("scratch", "other/tokenizer", {"tokenizer.0": "other/tokenizer", "tokenizer": ...}),
                        Case("scratch", "bpe", {"tokenizer.bpe": 2048})],
    "model.dtype": [Case("whole", "bfloat16", {"model.dtype": torch.bfloat16}, torch.float32),
                    Case("hub", "float16", {"model.dtype": torch.float16}, "auto"),
                    Case("scratch", "bfloat16", {"llama.dtype": torch.bfloat16}, torch.float32),
                    Case("unsloth", "float16", {"unsloth.dtype": torch.float16})],
    "model.load_in_4bit": [Case("hub", "true", {"model.quantization_config": ...}),
                           Case("unsloth", "true", {"unsloth.load_in_4bit": True})],
    "model.load_in_8bit": [Case("hub", "true", {"model.quantization_config": ...}),
                           Case("unsloth", "true", {"unsloth.load_in_8bit": True})],
    "model.attn_implementation": [Case("hub", "eager", {"model.attn_implementation": "eager"})],
    "model.max_seq_length": [Case("unsloth", "4096", {"unsloth.max_seq_length": 4096}, 2048)],
    "model.gradient_checkpointing": [
        Case("hub", "true", {"trl.gradient_checkpointing": True}),
        Case("unsloth", "true", {"trl.gradient_checkpointing": True, "unsloth.use_gradient_checkpointing": "unsloth",
                                 "unsloth.lora.use_gradient_checkpointing": "unsloth"})],
    "model.fast_inference": [Case("unsloth", "true", {"unsloth.fast_inference": True, "unsloth.max_lora_rank": 16})],
    "model.gpu_memory_utilization": [Case("vllm", "0.4", {"unsloth.gpu_memory_utilization": 0.4})],
    "model.compile_layers": [],  # read by the loaders: test_step_choice.py
    "model.vllm_engine": [],  # told to vLLM itself: test_vllm_engine.py
    "model.vllm_standby": [],  # read when Unsloth is imported: test_standby_is_told_at_the_import
    "model.scratch": [Case("scratch", "{layers: 5}", {"llama.num_hidden_layers": 5})],
    "model.scratch.hidden_size": [Case("scratch", "64", {"llama.hidden_size": 64, "llama.head_dim": 16})],
    "model.scratch.layers": [Case("scratch", "5", {"llama.num_hidden_layers": 5})],
    "model.scratch.heads": [Case("scratch", "8", {"llama.num_attention_heads": 8, "llama.num_key_value_heads": 8,
                                                  "llama.head_dim": 16})],
    "model.scratch.kv_heads": [Case("scratch", "2", {"llama.num_key_value_heads": 2}, 4)],
    "model.scratch.intermediate_size": [Case("scratch", "96", {"llama.intermediate_size": 96})],
    "model.scratch.max_positions": [Case("scratch", "700", {"llama.max_position_embeddings": 700})],
    "model.scratch.rope_theta": [
        Case("scratch", "500.0", {"llama.rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})],
    "model.scratch.tie_embeddings": [Case("scratch", "true", {"llama.tie_word_embeddings": True})],
    "model.scratch.vocabulary": [Case("bpe", "600", {"tokenizer.bpe": 600})],
    # head and step
    "head.impl": [Case("scratch", "full", {"head.0": "full", "head of warm start": GONE}),
                  Case("hub", "trl", {"head.0": "trl", "head of warm start": GONE}),
                  Case("unsloth", "full", {"head.0": "full"})],
    "head.chunk": [Case("hub", "77", {"head.chunk": 77, "head of warm start.chunk": 77, "check.chunk": 77}),
                   Case("unsloth", "77", {"head.chunk": 77, "check.chunk": 77})],
    "head.backend": [
        Case("hub", "torch", {"head.backend": "torch", "head of warm start.backend": "torch",
                              "check.backend": "torch"}),
        Case("unsloth", "torch", {"head.backend": "torch", "check.backend": "torch"})],
    "head.parallel": [Case("hub", "vocabulary", {"head.vocab_parallel": True}, False)],
    "step.impl": [Case("hub", "trl", {"trainer": "trl", "trainer.token_budget": GONE})],
    "step.token_budget": [Case("hub", "900", {"trainer.token_budget": 900})],
    "step.ahead": [Case("server", "true", {"ahead": True})],
    # task: by the tasks' own table below
    "task.name": [],
    # lora
    "lora": [Case("whole", "{r: 4}", {"peft": ..., "model.dtype": "auto"})],
    "lora.r": [Case("hub", "4", {"peft.r": 4}), Case("unsloth", "4", {"unsloth.lora.r": 4}),
               Case("vllm", "4", {"unsloth.lora.r": 4, "unsloth.max_lora_rank": 4})],
    "lora.alpha": [Case("hub", "8", {"peft.lora_alpha": 8}), Case("unsloth", "8", {"unsloth.lora.lora_alpha": 8})],
    "lora.dropout": [Case("hub", "0.1", {"peft.lora_dropout": 0.1}),
                     Case("unsloth", "0.1", {"unsloth.lora.lora_dropout": 0.1})],
    "lora.target_modules": [Case("hub", "[q_proj]", {"peft.target_modules": {"q_proj"}}, "all-linear"),
                            Case("unsloth", "[q_proj]", {"unsloth.lora.target_modules": ["q_proj"]}, "all-linear")],
    "lora.modules_to_save": [Case("hub", "[embed_tokens]", {"peft.modules_to_save": ["embed_tokens"]}),
                             Case("unsloth", "[embed_tokens]", {"unsloth.lora.modules_to_save": ["embed_tokens"]})],
    "lora.use_rslora": [Case("hub", "true", {"peft.use_rslora": True}),
                        Case("unsloth", "true", {"unsloth.lora.use_rslora": True})],
    # tracking
    "tracking.report_to": [Case("hub", "tensorboard", {"trl.report_to": ["tensorboard"]}, [])],
    "tracking.logging_every": [Case("hub", "3", {"trl.logging_steps": 3}, 1)],
    "tracking.completions_sample": [Case("hub", "7", {"sample": 7}, 4), Case("hub", "0", {"sample": 0})],
    "tracking.print_completions": [
        Case("hub", "2", {"trl.log_completions": True, "trl.num_completions_to_print": 2})],
    "tracking.mismatch_every": [Case("hub", "7", {"ratios.every": 7}, 50)],
    "tracking.memory": [Case("hub", "false", {"meter": GONE})],
    "tracking.memory_every": [Case("hub", "3", {"meter.every": 3})],
    # run
    "run.name": [Case("hub", "b", {"trl.run_name": "b", "folder": "runs/b"}, "a")],
    "run.seed": [Case("scratch", "7", {"trl.seed": 7, "llama.seed": 7}, 0),
                 Case("unsloth", "7", {"trl.seed": 7, "unsloth.random_state": 7, "unsloth.lora.random_state": 7})],
    "run.output_root": [Case("hub", "elsewhere", {"folder": "elsewhere/a"})],
    "run.save_every": [Case("hub", "5", {"trl.save_strategy": "steps", "trl.save_steps": 5})],
    "run.checks": [Case("hub", "false", {"check": GONE, "worst case": GONE})],
    "run.max_bad_steps": [Case("scratch", "9", {"trainer.max_bad_steps": 9, "warm start.bad steps.0": 9})],
    "run.warm_start": [Case("scratch", "null", {"warm start": GONE})],
    "run.warm_start.steps": [Case("scratch", "4", {"warm start.rates": rates(steps=4), "warm start.looks": [4]})],
    "run.warm_start.target_accuracy": [
        Case("scratch", "0.2", {"warm start.rates": rates()[:10], "warm start.looks": [5, 10]})],
    "run.warm_start.check_every": [Case("scratch", "4", {"warm start.looks": [4, 8, 12]}, [5, 10, 12])],
    "run.warm_start.learning_rate": [Case("scratch", "0.002", {"warm start.rates": rates(2e-3)}, rates())],
    "run.warm_start.batch_size": [Case("scratch", "9", {"warm start.rows": 9})],
    "run.warm_start.weight_decay": [Case("scratch", "0.3", {"warm start.weight_decay": 0.3})],
    "run.warm_start.adam_beta2": [Case("scratch", "0.9", {"warm start.betas": (0.9, 0.9)}, (0.9, 0.99))],
    "run.warm_start.warmup_steps": [Case("scratch", "0", {"warm start.rates": rates(warmup=0)})],
    "run.warm_start.schedule": [Case("scratch", "cosine", {"warm start.rates": ...})],  # values: test_warm_start.py
    "run.warm_start.final_rate": [Case("scratch", "0.5", {"warm start.rates": rates(least=0.5)})],
    "run.evaluation": [Case("hub", "{size: 5}", {"greedy.problems": 5, "greedy.batch": 5})],
    "run.evaluation.every": [],  # by a whole run: test_a_run_by_every_key_of_its_own
    "run.evaluation.size": [Case("hub", "300", {"greedy.problems": 300}, 512)],
    "run.evaluation.batch_size": [Case("hub", "50", {"greedy.batch": 50}, 128)],
    "run.evaluation.samples": [
        Case("hub", "4", {"sampled.count": 4, "sampled.temperature": 1.0, "sampled.problems": 512, "sampled.batch": 32,
                          "sampled.length": 512, "sampled.seed": 0})],
}  # fmt: skip


EVERY_CASE = pytest.mark.parametrize(
    ("key", "case"),
    [
        pytest.param(key, case, id=f"{key}={case.value} ({case.base})")
        for key, cases in CASES.items()
        for case in cases
    ],
)


@pytest.fixture(scope="module")
def reached(tmp_path_factory):
    """A function: where the values of a base with an override arrive; each is found out once."""
    folder, known = tmp_path_factory.mktemp("bases"), {}
    for name, text in BASES.items():
        (folder / f"{name}.yaml").write_text(text + ANY)

    def find(base, *overrides):
        if (base, overrides) not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sys.modules, "unsloth", SimpleNamespace())
                patch.delenv("UNSLOTH_VLLM_STANDBY", raising=False)
                config = load_config(folder / f"{base}.yaml", list(overrides))
                known[base, overrides] = reach(config, patch)
        return known[base, overrides]

    find.folder = folder
    return find


def differences(before, after):
    """Places whose value differs, and the value now; GONE where nothing arrives any more."""
    return {
        place: after.get(place, GONE)
        for place in {**before, **after}
        if place not in before or place not in after or before[place] != after[place]
    }


def leaves():
    """Every key but the sections themselves, `base`, and TRL's own section."""
    return set(schema_keys()) - {*SECTIONS, "grpo", "base"} | {"lora"}


def test_every_key_has_an_entry():
    assert set(CASES) == leaves()


@EVERY_CASE
def test_a_key_changes_what_it_should_and_nothing_else(reached, key, case):
    before, after = reached(case.base), reached(case.base, f"{key}={case.value}")
    found = differences(before, after)
    for place, value in case.reaches.items():
        # A place is the head of others, as "peft" is of "peft.r", where all of them come or go.
        at = [name for name in found if name == place or name.startswith(place.rstrip(".") + ".")]
        exact = [name for name in at if name == place]
        if value is GONE:
            assert all(found[name] is GONE for name in at), place
            assert at or not any(name.startswith(place) for name in after), place
        elif value is ...:
            assert at, place
        else:
            assert exact, f"{key} does not reach {place}; it changes {sorted(found)}"
            assert found[place] == value, place
            at = exact
        for name in at:
            found.pop(name)
    if key == "model.loader":  # what it reaches beside is another loader's business
        found = {
            place: value for place, value in found.items() if place.startswith(("trl.", "greedy", "sample"))
        }
    assert not found, f"{key} changes also {found}"
    if case.of is not None:
        (place, *_) = case.reaches
        assert before[place] == case.of


def test_what_each_loader_is_told_whatever_the_keys_say(reached):
    assert reached("unsloth")["tokenizer.side"] == "left"
    assert reached("hub")["tokenizer.padding_side"] == "left"
    assert reached("unsloth")["unsloth.full_finetuning"] is False
    assert reached("unsloth", "lora=null")["unsloth.full_finetuning"] is True
    for base in ("hub", "whole"):
        assert (
            reached(base)["model.trust_remote_code"] is reached(base)["tokenizer.trust_remote_code"] is False
        )
    assert reached("unsloth")["unsloth.trust_remote_code"] is False
    quantised = reached("hub", "model.load_in_4bit=true")["model.quantization_config"]
    assert (quantised["load_in_4bit"], quantised["load_in_8bit"]) == (True, False)
    assert quantised["bnb_4bit_quant_type"] == "nf4"
    assert quantised["bnb_4bit_compute_dtype"] == "bfloat16"
    quantised = reached("hub", "model.load_in_8bit=true")["model.quantization_config"]
    assert (quantised["load_in_4bit"], quantised["load_in_8bit"]) == (False, True)


def test_unsloths_head_sees_the_trainers_arguments(reached):
    """It refuses those that would go past it."""
    assert reached("unsloth")["head.args"] == "arguments"
    assert "head.args" not in reached("hub")


def test_standby_is_told_at_the_import(monkeypatch):
    """Unsloth reads it from its environment, once."""
    seen = []

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "unsloth":
                seen.append(os.environ["UNSLOTH_VLLM_STANDBY"])

    for standby in (True, False):
        with monkeypatch.context() as patch:
            patch.setenv("UNSLOTH_VLLM_STANDBY", "left over")
            patch.delitem(sys.modules, "unsloth", raising=False)
            patch.setattr(sys, "meta_path", [Finder()])
            patch.setattr("recipes.config.unsloth._failures", [])
            with pytest.raises(ImportError):
                import_unsloth(standby)
    assert seen == ["1", "0"]
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace())
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", "1")
    import_unsloth(True)
    with pytest.raises(
        ValueError, match=r"model\.vllm_standby: false, but this process has imported Unsloth with"
    ):
        import_unsloth(False)


def test_fields_of_trl_that_others_look_at(reached):
    """The evaluation, the check and the sampling follow the training's own values."""
    samples = "run.evaluation.samples=2"
    plain = reached("hub", samples)
    for override, expected in {
        "grpo.temperature=0.7": {"trl.temperature": 0.7, "check.temperature": 0.7, "sampled.temperature": 0.7},
        "grpo.max_completion_length=99": {
            "trl.max_completion_length": 99, "greedy.length": 99, "sampled.length": 99},
        "grpo.chat_template_kwargs={enable_thinking: false}": {
            "trl.chat_template_kwargs": {"enable_thinking": False}, "check.chat": {"enable_thinking": False}},
        "grpo.bf16=true": {"trl.bf16": True, "check.precision": ...},
        "run.seed=5": {"trl.seed": 5, "sampled.seed": 5},
        "grpo.top_p=0.5": {"trl.top_p": 0.5},
    }.items():  # fmt: skip
        found = differences(plain, reached("hub", samples, override))
        assert set(found) == set(expected), override
        for place, value in expected.items():
            assert value is ... or found[place] == value, place


# Resuming: which keys may differ

SHAPE = (
    "hidden_size layers heads kv_heads intermediate_size max_positions rope_theta tie_embeddings vocabulary"
)
MODEL = "loader name revision tokenizer dtype load_in_4bit load_in_8bit scratch"
LORA = "r alpha dropout target_modules modules_to_save use_rslora"
REFUSED = {"run.seed", "lora"}
for section, names in {"model": MODEL, "model.scratch": SHAPE, "lora": LORA}.items():
    REFUSED |= {f"{section}.{name}" for name in names.split()}
# Of a warm start that is over nothing may differ, and all of it is named by its own key.
REFUSED |= {key for key in CASES if key.startswith("run.warm_start")}


@EVERY_CASE
def test_a_resumed_run_takes_another_value_or_names_the_key(reached, tmp_path, monkeypatch, key, case):
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace())
    path = reached.folder / f"{case.base}.yaml"
    before, now = load_config(path), load_config(path, [f"{key}={case.value}"])
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "config.yaml").write_text(before.to_yaml())
    made_up_checkpoint(folder.path, 2)
    if key in REFUSED:
        with pytest.raises(ConfigError) as caught:
            resume.require_same(now, folder)
        assert all(line.startswith(key) for line in caught.value.lines)
        assert "leave --resume out to begin another run" in caught.value.lines[0]
    else:
        resume.require_same(now, folder)
        said = resume.what_changed(now, folder)
        assert len(said) == 1
        assert said[0].startswith(key)
        assert " from here on, " in said[0]


TRLS_REFUSED = {"optim", "optim_args", "num_iterations", "steps_per_generation", "generation_batch_size"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim", "adamw_torch"),
        ("optim_args", "a=1"),
        ("num_iterations", 3),
        ("steps_per_generation", 3),
        ("generation_batch_size", 16),
        ("learning_rate", 0.25),
        ("beta", 0.25),
        ("temperature", 0.5),
        ("max_steps", 9),
    ],
)
def test_a_resumed_run_and_the_fields_of_trl(reached, tmp_path, monkeypatch, name, value):
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace())
    path = reached.folder / "hub.yaml"
    now = load_config(path, [f"grpo.{name}={value}"])
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "config.yaml").write_text(load_config(path).to_yaml())
    made_up_checkpoint(folder.path, 2)
    if name in TRLS_REFUSED:
        with pytest.raises(ConfigError, match=rf"grpo\.{name}: .* differs from the "):
            resume.require_same(now, folder)
    else:
        resume.require_same(now, folder)
        assert [line.partition(":")[0] for line in resume.what_changed(now, folder)] == [f"grpo.{name}"]


# A whole run with a value of its own for each key that takes effect in train_grpo.py


OWN = [
    "tracking.logging_every=2", "tracking.completions_sample=3", "tracking.print_completions=1",
    "tracking.memory_every=3", "run.save_every=2", "run.evaluation.every=1", "run.evaluation.size=6",
    "run.evaluation.batch_size=4", "run.evaluation.samples=2", "run.warm_start=null", "grpo.max_steps=4",
    "grpo.max_completion_length=5", "grpo.temperature=0.9", "run.seed=3", "run.name=own",
]  # fmt: skip


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    changed = {setting.partition("=")[0] for setting in OWN}
    kept = [s for s in TINY if s.partition("=")[0] not in changed and not s.startswith("run.warm_start")]
    command = ["--config", QUICKSTART, *kept, *OWN, f"run.output_root={root}"]
    assert train_grpo.main(command) == 0
    return RunFolder(root / "own")


def test_a_run_by_every_key_of_its_own(own_run):
    lines = own_run.metrics.read()
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    evaluated = [line["step"] for line in lines if "accuracy" in line]
    assert evaluated == [0, 1, 2, 3, 4]  # run.evaluation.every
    assert all(line["accuracy_problems"] == 6 and "pass@2" in line for line in lines)
    logged = {line["step"]: line["steps"] for line in lines if "reward" in line}
    assert logged == {1: 1, 2: 1, 4: 2}
    assert [line["step"] for line in own_run.completions.read()] == [1] * 3 + [2] * 3 + [4] * 3
    assert all(len(line["completion"]) <= 5 for line in own_run.completions.read())
    metered = [
        line["step"] for line in lines if "tensor_peak_mib" in line.get("memory", {}).get("forward", {})
    ]
    assert metered == [1, 2, 4]  # steps 0, 1 and 3 from 0
    places = sorted(place.name for place in own_run.path.glob("checkpoints/checkpoint-*"))
    assert places == ["checkpoint-2", "checkpoint-4"]
    assert own_run.read_json("finished.json") == {"step": 4}
    assert not (own_run.path / "warm_start.json").exists()


def test_nested_sections_are_leaves_of_the_table():
    """`model.scratch`, `run.warm_start` and `run.evaluation` are keys too; there are no others."""
    nested = {
        f"{section}.{name}"
        for section, kind in SECTIONS.items()
        for name, field in kind.model_fields.items()
        if section != "task" and nested_section(field.annotation)
    }
    assert nested == {"model.scratch", "run.warm_start", "run.evaluation"}
