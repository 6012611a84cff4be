"""Cases for test_unsloth.py: the trainer that Unsloth writes for a GPU, made and trained on the CPU.

The process starts with UNSLOTH_ALLOW_CPU=1: Unsloth then loads its GPU code without a GPU, but leaves TRL alone. Its
function that writes the trainer is called here, and UNSLOTH_COMPILE_DISABLE=1 leaves it uncompiled: on a CPU our meter
watches every operator, which torch.compile does not allow. The model is transformers' own, with PEFT's adapters, for
Unsloth's layers are Triton kernels. What is scored, and by what name, is the trainer's.
"""

from __future__ import annotations

import os
import sys
import warnings

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from benchmarks import packed_unsloth
    from recipes.config.grpo import import_grpo_config

    import_grpo_config("unsloth")  # as the configuration's check does: unsloth first, then trl

import ast
import functools
import inspect
import json
import math
from types import SimpleNamespace

import pytest
import torch
import trl
import unsloth
from peft import get_peft_model
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from unsloth.models import rl
from unsloth.models.vision import FastBaseModel
from unsloth.utils import prefix_grouper, prefix_grouper_kernel
from unsloth_files import write_files
from unsloth_zoo import rl_replacements

from memhead.integrations import unsloth as memhead_unsloth
from recipes.config.grpo import OWNED, defaults
from recipes.config.load import load_config
from recipes.config.unsloth import is_unsloths
from recipes.problems import ConfigError
from recipes.tracking.files import LinesFile
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.tracker import track
from recipes.training.preflight import Machine, missing
from recipes.training.rewards import Rewards
from recipes.training.session import Session
from recipes.training.trainer import install_head, make_trainer

TRLS_OWN = trl.GRPOConfig


@pytest.fixture(scope="session", autouse=True)
def generated():
    """TRL's GRPO trainer and config replaced by Unsloth's."""
    torch.set_num_threads(1)
    os.environ["UNSLOTH_ALLOW_CPU"] = "0"
    rl._patch_trl_rl_trainers_impl("grpo_trainer")
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"
    assert trl.GRPOTrainer.__name__ == "UnslothGRPOTrainer"
    assert is_unsloths(trl.GRPOConfig)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load_config(write_files(tmp_path_factory.mktemp("unsloth")))


def evens(completion_ids, **columns):
    """The share of even tokens, the first counting most."""
    return [sum((token % 2 == 0) / (1 + i) for i, token in enumerate(ids)) for ids in completion_ids]


def given(config, fields):
    """The configuration with these fields of `grpo`, and TRL's defaults for the rest."""
    grpo = {**defaults(TRLS_OWN), **fields}
    return config.model_copy(update={"grpo": grpo, "grpo_given": fields})


def loaded(config):
    """transformers' model with adapters, and what FastLanguageModel leaves on it."""
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    model = get_peft_model(model, config.lora.peft_config())
    model.for_training = functools.partial(FastBaseModel.for_training, model)
    model.for_inference = functools.partial(FastBaseModel.for_inference, model)
    model._unsloth_user_float32 = True  # float32 was asked for
    return model


def train(config, folder, impl, watch=lambda trainer, handle: None, prepare=lambda model: None):
    """The configuration's ten steps through the generated trainer: its run folder, its adapters, the calls.

    watch: gets the trainer and the head's handle before it trains. prepare: gets the model before there is a trainer.
    """
    config = config.model_copy(update={"head": config.head.model_copy(update={"impl": impl})})
    folder = RunFolder.create(folder, impl)
    arguments = config.grpo_config(folder.path / "checkpoints")
    with install_head(config, arguments) as handle:
        set_seed(0)
        model = loaded(config)
        prepare(model)
        tokenizer = AutoTokenizer.from_pretrained(config.model.name)
        rewards = Rewards([evens], [1.0])
        session = Session(config, config.make_task(), rewards, folder, arguments, model, tokenizer)
        trainer = make_trainer(session)
        assert not trainer.args.fp16
        assert not trainer.args.bf16
        tracker = track(trainer, folder, progress=False)
        watch(trainer, handle)
        trainer.train()
        tracker.close()
    adapters = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}
    return SimpleNamespace(folder=folder, adapters=adapters, calls=handle.calls, rows=handle.rows)


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {impl: train(config, folder, impl) for impl in ("trl", "memhead", "full")}


def test_unsloth_was_imported_first():
    """Else it says so."""
    assert not [str(w.message) for w in said if "should be imported before" in str(w.message)]


@pytest.mark.parametrize("impl", ["memhead", "full"])
def test_ten_steps_equal_unsloths_own_head(runs, impl):
    own, ours = (runs[name].folder.metrics.read() for name in ("trl", impl))
    assert [line["step"] for line in own] == list(range(1, 11))
    for a, b in zip(own, ours, strict=True):
        assert a.get("reward") == b.get("reward")
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    for name, value in runs["trl"].adapters.items():
        torch.testing.assert_close(runs[impl].adapters[name], value, rtol=0.0, atol=1e-6)
    assert max(v.abs().max() for name, v in runs["trl"].adapters.items() if "lora_B" in name) > 1e-3


def test_one_bad_gradient_changes_nothing_and_the_run_goes_on(config, tmp_path):
    """The guard stands before Unsloth's class as it does before TRL's."""
    calls, seen = [], []

    def spoil_the_third(trainer, handle):
        assert type(trainer).__name__ == "GuardedUnslothGRPOTrainer"
        trained = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]

        def spoil(gradient):
            calls.append(1)
            seen.append([p.detach().clone() for p in trained])
            return gradient * math.nan if len(calls) == 3 else gradient

        trained[0].register_hook(spoil)

    run = train(config, tmp_path, "memhead", spoil_the_third)
    assert [line["bad_step"] for line in run.folder.metrics.read()] == [0, 0, 1, *[0] * 7]
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[3], seen[4], strict=True))
    (bad,) = LinesFile(run.folder.path / "bad_steps.jsonl").read()
    assert (bad["step"], bad["phase"], len(bad["completions"])) == (3, "backward", 8)
    assert all(adapter.isfinite().all() for adapter in run.adapters.values())


def test_every_projection_is_counted(runs):
    assert runs["memhead"].calls == runs["trl"].calls >= 20
    assert runs["memhead"].rows == runs["trl"].rows >= 10 * 8  # at least a token a completion and step


def test_the_meters_hold(runs):
    first, second = runs["memhead"].folder.metrics.read()[:2]
    assert set(first["time"]) == {
        "generation",
        "rewards",
        "scoring",
        "forward",
        "backward",
        "optimizer",
        "other",
    }
    assert "scoring" not in second["time"]
    assert first["memory"]["forward"]["tensor_peak_mib"] > 0
    assert len(runs["memhead"].folder.completions.read()) == 40
    assert {"reward", "kl", "grad_norm", "completion_length"} <= set(first)


def one_question_a_step(config):
    """Four steps of one group each: the trainer shuffles its rows, and of several groups Unsloth finds none then."""
    grpo = {"per_device_train_batch_size": 4, "max_steps": 4}
    return config.model_copy(update={"grpo": config.grpo | grpo, "grpo_given": config.grpo_given | grpo})


def take_shared_prompts(model):
    """Let transformers' model take Unsloth's rows of shared prompts, whose layout is `prefix_seg_info`."""

    def mask(module, arguments, options):
        layout = options.pop("prefix_seg_info", None)
        if layout is None:
            return None
        visible = prefix_grouper_kernel._make_mask_mod(
            layout.group_of_kv, layout.is_prefix, layout.suffix_of_kv
        )
        return arguments, options | {"attention_mask": create_mask(visible, 1, 1, layout.T, layout.T, "cpu")}

    model.register_forward_pre_hook(mask, with_kwargs=True)


def packed_by_name(config):
    return config.model_copy(update={"step": config.step.model_copy(update={"impl": "packed"})})


def on_full_logits(trainer_class):
    """TRL's loss on plain full logits of padded rows."""

    def scores(self, model, input_ids, attention_mask, width, *_, compute_entropy=False, **__):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids, attention_mask=attention_mask, position_ids=positions).logits
        logps = (logits[:, -width - 1 : -1] / self.temperature).log_softmax(-1)
        entropies = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, input_ids[:, -width:, None])[..., 0], entropies, None

    methods = {
        "_get_per_token_logps_and_entropies": scores,
        "compute_loss": lambda self, model, inputs, *_, **__: self._compute_loss(model, inputs),
    }
    return type(f"Plain{trainer_class.__name__}", (trainer_class,), methods)


# Unsloth's trainer leaves sampled tokens out of its loss that are the padding's; TRL's does not.
NO_PADDING = {"generation_kwargs": {"suppress_tokens": [0]}}
ENDLESS = {"generation_kwargs": {"suppress_tokens": [1]}, "beta": 0.0}


@pytest.mark.parametrize(
    ("fields", "by"),
    [
        ({"num_iterations": 1, **NO_PADDING}, "Unsloth's own"),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, **NO_PADDING}, "Unsloth's own"),
        ({"num_iterations": 1, "beta": 0.0}, "full logits"),
        ({"gradient_accumulation_steps": 2, "loss_type": "grpo"}, "full logits"),
        ({"entropy_coef": 0.1, "temperature": 0.7, "epsilon": 0.02}, "full logits"),
        # Nothing to score: the weights decay all the same.
        (
            {"mask_truncated_completions": True, "optim": "adamw_torch", "weight_decay": 1.0, **ENDLESS},
            "full logits",
        ),
    ],
    ids=str,
)
def test_packed_steps_on_unsloths_model(config, tmp_path, monkeypatch, fields, by):
    """Rewards, losses, gradients and adapters; attention over its rows is the stand-in of take_shared_prompts."""
    config = given(config, config.grpo_given | {"max_steps": 4} | fields)
    packed = packed_by_name(config)
    ours = train(packed, tmp_path / "ours", "memhead", prepare=take_shared_prompts)
    if by == "full logits":
        monkeypatch.setattr(trl, "GRPOTrainer", on_full_logits(trl.GRPOTrainer))
    expected = train(config, tmp_path / "expected", "trl")
    steps = [run.folder.read_json("environment.json")["step"]["impl"] for run in (ours, expected)]
    assert steps == ["packed", "unsloth"]
    for a, b in zip(*(run.folder.metrics.read() for run in (expected, ours)), strict=True):
        assert a.get("reward") == b.get("reward")
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert b["entropy"] > 0.5 or "mask_truncated_completions" in fields
    for name, value in expected.adapters.items():
        torch.testing.assert_close(ours.adapters[name], value, rtol=0.0, atol=1e-6)
    assert ours.calls > 0


def test_the_check_meets_the_model_as_the_loss_does(config, tmp_path):
    """With gradient checkpointing, which Unsloth's trainer turns off when it is made, until it trains."""
    config, seen = given(config, config.grpo_given | {"max_steps": 1}), {"check": [], "loss": []}
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"gradient_checkpointing": True})}
    )
    stage = ["check"]

    def note(module, arguments):
        if torch.is_grad_enabled():
            seen[stage[0]].append((module.training, module.gradient_checkpointing))

    def prepare(model):
        take_shared_prompts(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.get_base_model().model.layers[0].register_forward_pre_hook(note)

    train(
        packed_by_name(config), tmp_path, "memhead", lambda *_: stage.append(stage.pop() and "loss"), prepare
    )
    assert set(seen["check"]) == set(seen["loss"]) == {(True, True)}


def test_another_loader_keeps_its_step_beside_unsloths_classes(config, tmp_path):
    """As in a notebook that has imported Unsloth."""
    model = config.model.model_copy(update={"loader": "transformers"})
    step = config.step.model_copy(update={"impl": "trl"})
    config = config.model_copy(update={"model": model, "step": step})
    folder = RunFolder.create(tmp_path, "other")
    arguments = config.grpo_config(folder.path / "checkpoints")
    loaded = AutoModelForCausalLM.from_pretrained(model.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model.name)
    session = Session(
        config, config.make_task(), Rewards([evens], [1.0]), folder, arguments, loaded, tokenizer
    )
    make_trainer(session)
    assert folder.read_json("environment.json")["step"] == {"impl": "trl"}


def test_a_model_that_ignores_the_layout_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="disagrees with Unsloth's padded forward"):
        train(packed_by_name(config), tmp_path, "memhead")


def note_scores(monkeypatch, handle, notes):
    """Note what scores each row of shared prompts: what memhead's handle counted, and how far full logits are."""
    extract = prefix_grouper.GroupLayout.extract_logps

    def noted(layout, hidden, lm_head, *further):
        calls, rows = handle.calls, handle.rows
        scores = extract(layout, hidden, lm_head, *further)
        found = scores[layout.tgt_rows, layout.tgt_cols - layout.L + layout.W]
        logps = (hidden[0] @ lm_head.T).log_softmax(-1)[layout.tgt_pred, layout.flat_ids[0, layout.tgt_flat]]
        notes.append(
            SimpleNamespace(
                tokens=len(found),
                counted=(handle.calls - calls, handle.rows - rows),
                gradient=found.requires_grad,
                gap=(found - logps).abs().max().item(),
            )
        )
        return scores

    monkeypatch.setattr(prefix_grouper.GroupLayout, "extract_logps", noted)


def test_shared_prompts_are_scored_by_memhead(config, tmp_path, monkeypatch):
    """Four steps on rows that hold each prompt once equal four by full logits on rows that repeat it.

    Unsloth's own: the rows, the rule of who sees whom, the check against its other rows, both passes and how they call
    the head. A stand-in: attention. On a GPU Unsloth's layers, which are Triton kernels, hand the layout to
    FlexAttention, which has no backward pass on a CPU; here transformers' layers get the same rule as a dense mask.
    Without it Unsloth's check refuses these rows, and without a word, so that they were taken is asserted.
    """
    config, notes = one_question_a_step(config), []
    full = train(config, tmp_path / "full", "full")

    def watch(trainer, handle):
        take_shared_prompts(trainer.model)
        note_scores(monkeypatch, handle, notes)
        models.append(trainer.model)

    models = []
    ours = train(config, tmp_path / "memhead", "memhead", watch)
    (model,) = models
    for name in ("grad", "nograd"):  # the forms that its check has passed: one group of four
        assert set(getattr(model, f"_unsloth_prefix_grouper_{name}_verified", ())) == {(1, (4,))}
    assert sum(note.gradient for note in notes) == 4  # every loss pass
    assert sum(not note.gradient for note in notes) >= 2  # the reference, of each of two rollouts
    assert all(note.counted == (1, note.tokens) for note in notes)
    assert max(note.gap for note in notes) < 1e-5
    for a, b in zip(*(run.folder.metrics.read() for run in (full, ours)), strict=True):
        assert a.get("reward") == b.get("reward")
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    for name, value in full.adapters.items():
        torch.testing.assert_close(ours.adapters[name], value, rtol=0.0, atol=1e-6)


def test_both_passes_import_the_scorer_at_each_call():
    """The written source: inside the bodies, so that what stands in the module at that moment is what scores."""
    tree = ast.parse(inspect.getsource(sys.modules[trl.GRPOTrainer.__module__]))
    found = {
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and node.module == "unsloth_zoo.rl_replacements"
        if memhead_unsloth.SCORER in [alias.name for alias in node.names]
    }
    assert found == {"grpo_accumulated_loss", "_get_per_token_logps_and_entropies"}


def test_ours_takes_every_argument_of_unsloths():
    theirs = inspect.signature(getattr(rl_replacements, memhead_unsloth.SCORER)).parameters
    ours = inspect.signature(memhead_unsloth._score).parameters
    own = [name for name, p in theirs.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    known = [name for name in ours if name not in ("impl", "tile", "backend", "extra")]
    assert own[: len(known)] == known
    assert set(own[len(known) :]) <= set(memhead_unsloth.NEUTRAL)


def test_the_defaults_are_trls(config, tmp_path):
    """What a configuration leaves out is TRL's choice, whichever class Unsloth puts in its place."""
    trls, unsloths = ({
        name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()
    } for kind in (TRLS_OWN, trl.GRPOConfig))  # fmt: skip
    changed = {name for name in trls if name in unsloths and unsloths[name] != trls[name]}
    assert {"learning_rate", "optim", "beta", "weight_decay"} < changed

    bare = given(config, {"num_generations": 4})
    made, plain = (
        bare.grpo_config(tmp_path),
        TRLS_OWN(str(tmp_path), num_generations=4, use_cpu=True, bf16=False),
    )
    for name in changed - set(OWNED) - {"epsilon_high", "bf16"}:
        assert getattr(made, name) == getattr(plain, name), name
    assert made.epsilon_high == made.epsilon == plain.epsilon
    assert made.bf16 is False
    for loss in ("dapo", "dr_grpo", "cispo"):
        made = given(config, {"loss_type": loss}).grpo_config(tmp_path)
        assert (made.epsilon_high, made.scale_rewards) == (0.2, "group")
        assert made.mask_truncated_completions is False


def test_a_bypassing_option_is_refused_before_anything_is_loaded(config):
    assert memhead_unsloth.generates_trainers()
    assert unsloth.DEVICE_TYPE == "cuda"
    bypassing = given(config, {"entropy_coef": 0.01})
    machine = Machine(cuda=False, bfloat16=True, packages=frozenset({"unsloth"}))
    assert not list(missing(packed_by_name(bypassing), machine))
    (problem,) = missing(bypassing, machine)
    assert "grpo.entropy_coef=0.01" in problem.line("")
    with pytest.raises(ValueError, match=r"grpo\.entropy_coef=0\.01"):
        install_head(bypassing, bypassing.grpo_config("unused"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("UNSLOTH_GRPO_ROLLOUT_LOGPROBS_AS_OLD", "1"),
        ("UNSLOTH_GRPO_LOSS_AGGREGATION", "prompt"),
        ("UNSLOTH_GRPO_VLLM_IS_CLIP", "_2"),
    ],
)
def test_what_only_unsloths_loss_reads_is_refused_beside_the_packed_step(
    config, monkeypatch, variable, value
):
    monkeypatch.setenv(variable, value)
    machine = Machine(cuda=False, bfloat16=True, packages=frozenset({"unsloth"}))
    assert not list(missing(config, machine))
    (problem,) = missing(packed_by_name(config), machine)
    assert f"{variable}={value} changes the loss" in problem.line("")
    monkeypatch.setenv(variable, "off")
    assert not list(missing(packed_by_name(config), machine))


@pytest.fixture
def benchmarked(tmp_path, monkeypatch):
    """The rows of benchmarks.packed_unsloth at toy size, with and without Unsloth's shared prompts."""

    def made(*arguments, make=packed_unsloth.make_trainer, **options):
        trainer, *others = make(*arguments, **options)
        take_shared_prompts(trainer.model)
        return trainer, *others

    def run(shared, *words):
        monkeypatch.setattr(prefix_grouper, "_ENABLED", shared)
        output = tmp_path / str(shared)
        path = packed_unsloth.main(["--output", str(output), "--toy", "--rounds", "1", *words])
        return json.loads(path.read_text())["rows"]

    monkeypatch.setattr(packed_unsloth, "make_trainer", made)
    return run


def test_the_benchmark_of_its_step(benchmarked):
    """It says which rows the model was given; the loss is the same on either."""
    shared, packed = benchmarked(True), benchmarked(False)
    for rows, kind in ((shared, "shared"), (packed, "packed")):
        assert [(row["shape"], row["groups"], row.get("error")) for row in rows] == [
            ("gsm8k", 4, None),
            ("3072+256", 2, None),
        ]
        assert all(row["forwards"] == row["scoring_forwards"] == {kind: row["groups"]} for row in rows)
    for a, b in zip(shared, packed, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert 0 < abs(a["loss"]) < 0.1


def test_the_benchmark_of_both_steps(benchmarked):
    """One rollout after another, which hardly repeat a length: ours in few rows of shared prompts, without scoring."""
    rows = benchmarked(True, "--steps", "own", "packed", "--fresh", "--zeros", "0.5", "--budget", "10000")
    assert [row.get("error") for row in rows] == [None] * 4
    for own, ours in zip(rows[::2], rows[1::2], strict=True):
        assert (own["step"], ours["step"], ours["budget"]) == ("own", "packed", 10000)
        assert ours["forwards"] == {"shared": 1}
        assert ours["scoring_forwards"] == {}
        assert sum(own["forwards"].values()) == own["groups"]
