"""Cases for test_unsloth.py: PackedGRPOTrainer in a script that has imported Unsloth, on the trainer that it writes.

As in unsloth_generated_cases.py, whose stand-ins these are: transformers' model in place of Unsloth's layers.
"""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import trl
import vllm_colocated
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from unsloth_files import write_files
from unsloth_generated_cases import evens, generated, loaded, take_shared_prompts
from unsloth_zoo import gradient_checkpointing

from memhead.integrations import trl as memhead_trl
from recipes.config.load import load_config
from recipes.training import step_check
from recipes.training.packed_forward import PackedForward
from recipes.training.packed_step import PackedStep
from recipes.training.packed_unsloth import PackedUnsloth, reads_vllms_logps_over_a_part

assert generated  # a fixture, for every case here


def another_copy():
    """recipes.packed_trainer, imported once more, by another name."""
    place = importlib.util.find_spec("recipes.packed_trainer")
    copy = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location("another_copy", place.origin)
    )
    copy.__spec__.loader.exec_module(copy)
    return copy


EARLY = another_copy()  # Unsloth's trainer is put in TRL's place when the first case runs


class CallsOfTheHead(TrainerCallback):
    """How many there have been when each step ends."""

    def __init__(self, found):
        self.found = found

    def on_step_end(self, *_, **__):
        self.found.append(memhead_trl.installed().calls)


@pytest.fixture(autouse=True)
def _head_as_it_was():
    yield
    if (handle := memhead_trl.installed()) is not None:
        handle.uninstall()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load_config(write_files(tmp_path_factory.mktemp("script")))


@pytest.fixture(scope="module")
def module():
    """Imported after Unsloth has put its trainer in TRL's place."""
    from recipes import packed_trainer

    return packed_trainer


def script(kind, config, folder, prepare=take_shared_prompts, model=None, **settings):
    """A trainer as a script that loads its model by Unsloth makes it."""
    set_seed(0)
    model = loaded(config) if model is None else model
    prepare(model)
    arguments = {
        "max_steps": 4, "learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd", "logging_steps": 1,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 4,
        "max_completion_length": 5, "report_to": "none",
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": False,
        "generation_kwargs": {"suppress_tokens": [0]},
    }  # fmt: skip
    return kind(
        model=model,
        reward_funcs=[evens],
        args=trl.GRPOConfig(str(folder), **(arguments | settings)),
        train_dataset=Dataset.from_dict({"prompt": [f"How much is {n}+{n}?" for n in range(16)]}),
        processing_class=AutoTokenizer.from_pretrained(config.model.name),
    )


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def adapters(trainer):
    return {name: p for name, p in trainer.model.named_parameters() if "lora_" in name}


def the_same(ours, theirs):
    for mine, other in zip(steps(ours), steps(theirs), strict=True):
        assert mine.get("reward") == other.get("reward")  # logged of a rollout's first step
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    for name, value in adapters(theirs).items():
        torch.testing.assert_close(adapters(ours)[name], value, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "beta": 0.04},
    ],
    ids=str,
)
def test_the_steps_are_unsloths(config, module, tmp_path, settings):
    ours = script(module.PackedGRPOTrainer, config, tmp_path, **settings)
    ours.train()
    assert ours.why_not_packed is None
    assert ours.step_check["passed"]
    assert ours.packed_bins == "bins of a micro-batch's slots: without a GPU none are planned"
    assert isinstance(ours, PackedUnsloth)
    assert isinstance(ours, trl.GRPOTrainer)
    assert type(ours).__name__ == "PackedGRPOTrainer"
    assert memhead_trl.installed().calls > 0
    memhead_trl.installed().uninstall()
    own = script(trl.GRPOTrainer, config, tmp_path, prepare=lambda model: None, **settings)
    own.train()
    the_same(ours, own)
    assert all(entry["step/tokens_computed"] > 0 for entry in steps(ours))
    assert "step/tokens_computed" not in steps(own)[0]


def test_the_model_is_in_training_when_the_check_is_over(config, module, tmp_path):
    """Unsloth's wrapper has put it there; when training is over it is as before."""
    trainer, seen = script(module.PackedGRPOTrainer, config, tmp_path, max_steps=1), []
    assert not trainer.model.training
    put_before = trainer._choose_step
    trainer._choose_step = lambda: (put_before(), seen.append(trainer.model.training))
    trainer.train()
    assert trainer.why_not_packed is None
    assert seen == [True]
    assert not trainer.model.training


def test_evaluation_is_unsloths(config, module, tmp_path):
    found = []
    for kind in (module.PackedGRPOTrainer, trl.GRPOTrainer):
        trainer = script(kind, config, tmp_path, max_steps=2)
        trainer.train()
        set_seed(1)
        found.append(trainer.evaluate(Dataset.from_dict({"prompt": ["How much is 3+3?"] * 8})))
    ours, own = found
    assert ours["eval_reward"] == own["eval_reward"]
    assert ours["eval_loss"] == pytest.approx(own["eval_loss"], abs=1e-6)


def test_a_model_that_ignores_the_layout_takes_unsloths_step(config, module, tmp_path):
    trainer, calls = script(module.PackedGRPOTrainer, config, tmp_path, prepare=lambda model: None), []
    trainer.add_callback(CallsOfTheHead(calls))
    with pytest.warns(
        UserWarning, match="so Unsloth's step is used: it disagrees with Unsloth's padded"
    ) as said:
        trainer.train()
    assert [w.filename for w in said if "step is used" in str(w.message)] == [__file__]
    assert trainer.why_not_packed.startswith("it disagrees with Unsloth's padded forward on this model")
    assert not trainer.step_check["passed"]
    assert type(trainer) is module.PackedGRPOTrainer
    assert not isinstance(trainer, PackedStep)
    assert calls[0] < calls[1] < calls[2] < calls[3]  # memhead's in that step, too
    memhead_trl.installed().uninstall()
    own = script(trl.GRPOTrainer, config, tmp_path, prepare=lambda model: None)
    own.train()
    the_same(trainer, own)


def test_a_model_that_unsloth_has_not_loaded(config, module, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    trainer = script(module.PackedGRPOTrainer, config, tmp_path, prepare=lambda model: None, model=plain)
    assert next(module._of_the_script(trainer)) == "Unsloth's trainer has a model that Unsloth has not loaded"


def test_variables_of_unsloths_loss(config, module, tmp_path, monkeypatch):
    trainer = script(module.PackedGRPOTrainer, config, tmp_path)
    assert next(module._of_the_script(trainer), None) is None
    monkeypatch.setenv("UNSLOTH_GRPO_LOSS_AGGREGATION", "prompt")
    assert next(module._of_the_script(trainer)).startswith("UNSLOTH_GRPO_LOSS_AGGREGATION=prompt changes")
    monkeypatch.setenv("UNSLOTH_GRPO_LOGPROB_RECOMPUTE", "1")
    memhead_trl.installed().uninstall()
    with pytest.raises(
        ValueError, match="UNSLOTH_GRPO_LOGPROB_RECOMPUTE=1 makes Unsloth score without memhead"
    ):
        script(module.PackedGRPOTrainer, config, tmp_path)


def test_what_is_the_scripts_own_is_not_taken_for_unsloths(config, module, tmp_path):
    """And the train that Unsloth puts on the trainer is not taken for the script's."""

    class Mine(module.PackedGRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    trainer = script(Mine, config, tmp_path)
    assert "train" in vars(trainer)
    assert list(module._of_the_script(trainer)) == [
        "Mine has a _compute_loss of its own, which the packed step would go around"
    ]
    trainer = script(module.PackedGRPOTrainer, config, tmp_path)
    trainer.train = lambda: None
    assert next(module._of_the_script(trainer)).startswith("train has been set on the trainer")


def test_a_subclass_keeps_what_is_its_own(config, module, tmp_path):
    calls = []

    class Mine(module.PackedGRPOTrainer):
        def training_step(self, *arguments, **options):
            calls.append("step")
            return super().training_step(*arguments, **options)

        def _calculate_rewards(self, *arguments, **options):
            calls.append("rewards")
            return super()._calculate_rewards(*arguments, **options)

    trainer = script(Mine, config, tmp_path, max_steps=2)
    trainer.train()
    assert trainer.why_not_packed is None
    assert isinstance(trainer, Mine)
    assert calls == ["step", "rewards"] * 2


def test_imported_before_unsloth(config, tmp_path):
    """Then it is TRL's trainer, and TRL's step."""
    trainer = script(EARLY.PackedGRPOTrainer, config, tmp_path, max_steps=1)
    assert not isinstance(trainer, trl.GRPOTrainer)
    said = "so TRL's step is used: recipes.packed_trainer was imported before Unsloth"
    with pytest.warns(UserWarning, match=said):
        trainer.train()
    assert len(steps(trainer)) == 1


def test_passes_that_the_loss_repeats_are_left_out(config, module, tmp_path, monkeypatch):
    """Unsloth's wrappers around two methods are not the script's own."""
    kind, passes, score = module.PackedGRPOTrainer, [], PackedForward._score
    assert not module._is_own(kind, "_generate_and_score_completions")
    assert not module._is_own(kind, "training_step")
    trainer = script(kind, config, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer._choose_step()

    def counted(self, model, batch, lengths, rows, **options):
        passes.append((torch.is_grad_enabled(), len(rows)))
        return score(self, model, batch, lengths, rows, **options)

    monkeypatch.setattr(PackedForward, "_score", counted)
    trainer._chosen = True
    trainer.train()
    assert sum(rows for gradient, rows in passes if gradient) == 4 * 8
    assert not [rows for gradient, rows in passes if not gradient]


def no_padding(filters):
    """vLLM's stand-in that never samples the padding's token, and takes Unsloth's ways to say "not at all"."""

    def made(wanted):
        own = filters(replace(wanted, top_k=max(0, wanted.top_k or 0), min_p=wanted.min_p or 0.0))

        def filtered(ids, logits):
            logits = logits.clone()
            logits[:, 0] = -torch.inf
            return own(ids, logits)

        return filtered

    return made


@pytest.mark.parametrize(
    "settings",
    [
        {"vllm_importance_sampling_correction": False},
        {"vllm_importance_sampling_correction": True},
        {
            "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate",
            "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4,
        },
        {"vllm_importance_sampling_correction": True, "num_iterations": 2, "beta": 0.04},
    ],
    ids=str,
)  # fmt: skip
def test_where_vllm_samples_the_losses_are_unsloths(config, module, tmp_path, monkeypatch, settings):
    """By an engine that differs from the policy; Unsloth forms its ratio in its own loss, where this does not go."""
    monkeypatch.setattr(vllm_colocated, "_filters", no_padding(vllm_colocated._filters))
    found = []
    for kind, prepare in (
        (module.PackedGRPOTrainer, take_shared_prompts),
        (trl.GRPOTrainer, lambda model: None),
    ):
        with vllm_colocated.vllm_stand_in() as engines:
            trainer = script(
                kind, config, tmp_path, prepare=prepare, use_vllm=True, vllm_mode="colocate",
                **{"generation_kwargs": None} | settings,
            )  # fmt: skip
            engines[0].base.model.norm.register_forward_hook(lambda module, given, out: 1.05 * out)
            trainer.train()
        found.append(trainer)
        memhead_trl.installed() and memhead_trl.installed().uninstall()
    assert found[0].why_not_packed is None
    the_same(*found)


@pytest.mark.parametrize("corrected", [True, False])
def test_sampling_of_the_scripts_own_gets_no_importance_ratio(
    config, module, tmp_path, monkeypatch, corrected
):
    monkeypatch.setattr(vllm_colocated, "_filters", no_padding(vllm_colocated._filters))

    class Mine(module.PackedGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return super()._generate_and_score_completions(inputs)

    said = "Mine has a _generate_and_score_completions of its own, which finds no importance ratio"
    with vllm_colocated.vllm_stand_in():
        trainer = script(
            Mine, config, tmp_path, max_steps=1, use_vllm=True, vllm_mode="colocate", generation_kwargs=None,
            vllm_importance_sampling_correction=corrected,
        )  # fmt: skip
        with pytest.warns(UserWarning, match=said) if corrected else nullcontext():
            trainer.train()
    assert (trainer.why_not_packed is None) is not corrected
    assert len(steps(trainer)) == 1


def test_what_the_check_has_compiled_is_dropped(config, module, tmp_path, monkeypatch):
    """As Unsloth drops it where it sees a pass with gradients before train()."""
    done = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: done.append("compiled"))
    monkeypatch.setattr(
        gradient_checkpointing, "reset_unsloth_gradient_checkpointing_buffers", lambda: done.append("buffers")
    )
    trainer = script(module.PackedGRPOTrainer, config, tmp_path, max_steps=1)
    choose = trainer._choose_step
    trainer._choose_step = lambda: (choose(), done.append("chosen"))
    trainer.train()
    assert done[:3] == ["compiled", "buffers", "chosen"]


def test_a_second_training_begins_a_new_window(config, module, tmp_path):
    """Unsloth has put train() as it was found on the trainer; after a training that failed within a window."""

    class Failed(Exception):
        pass

    trainer = script(module.PackedGRPOTrainer, config, tmp_path, gradient_accumulation_steps=2, max_steps=2)
    backward = trainer.accelerator.backward

    def fail(loss, **options):
        backward(loss, **options)
        raise Failed

    trainer.accelerator.backward = fail
    with pytest.raises(Failed):
        trainer.train()
    trainer._place = 1  # as if a micro-batch of the window were done
    trainer.accelerator.backward = backward
    places = []
    step = trainer._prepare_inputs
    trainer._prepare_inputs = lambda batch: places.append(trainer._place) or step(batch)
    trainer.train()
    assert places == [0, 1] * 2


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, False),
        ({"vllm_importance_sampling_correction": True}, True),
        ({"off_policy_mask_threshold": 0.5}, True),
        ({"use_vllm": False, "vllm_importance_sampling_correction": True}, False),
        ({"vllm_importance_sampling_correction": True, "top_p": 1.0}, False),
    ],
    ids=str,
)
def test_where_vllm_truncates(changed, expected):
    given = {
        "use_vllm": True,
        "vllm_importance_sampling_correction": False,
        "off_policy_mask_threshold": None,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": None,
    } | changed
    trainer = SimpleNamespace(args=SimpleNamespace(**given, vllm_sampling_params=None), **given)
    assert reads_vllms_logps_over_a_part(trainer) is expected


def test_a_check_that_fails_to_run_takes_unsloths_step(config, module, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel for this card")

    monkeypatch.setattr(step_check, "check_step", fail)
    trainer = script(module.PackedGRPOTrainer, config, tmp_path, max_steps=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    assert "it does not run on this model: no kernel for this card" in trainer.why_not_packed
    assert any("so Unsloth's step is used" in str(warning.message) for warning in said)
    assert len(steps(trainer)) == 1
