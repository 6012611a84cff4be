"""TRL's own GRPO trainer with memhead in its slot, compared with the same trainer with plain full logits."""

from __future__ import annotations

import importlib

import pytest
import torch
import trl
import trl.trainer.utils
from grpo_runs import (
    PlainTrainer,
    RecordingTrainer,
    assert_same_trajectory,
    configurations,
    make_trainer,
    train,
)

from memhead.integrations import trl as memhead_trl
from memhead.integrations.handle import Handle, HeadBypassed


@pytest.mark.parametrize("name", configurations())
def test_ten_steps_in_float32(checkpoints, tmp_path, name):
    """Every kind of head. SGD moves a parameter by what its gradient is, so that the bounds mean something.

    Adam divides each gradient by its own size: one that is zero except for rounding, as that of an
    attention's key bias is, makes as large a step as any other, in a direction that rounding chooses.
    """
    settings = {"max_steps": 10, "optim": "sgd", "learning_rate": 0.1}
    ours = train(checkpoints[name], tmp_path, "memhead", **settings)
    plain = train(checkpoints[name], tmp_path, "full", **settings)
    # A GRPO loss is a mean of terms of both signs and of size one: its rounding is relative to those.
    assert_same_trajectory(ours, plain, loss=1e-6, loss_floor=1.0, parameters=1e-5)
    assert ours.calls == plain.calls == 10


def test_ten_steps_of_the_default_optimizer_in_float32(checkpoints, tmp_path):
    """AdamW on a model in which no gradient is zero by construction."""
    ours, plain = (train(checkpoints["llama"], tmp_path, impl, max_steps=10) for impl in ("memhead", "full"))
    assert_same_trajectory(ours, plain, loss=1e-6, loss_floor=1.0, parameters=1e-5)


def test_parameters_move(checkpoints, tmp_path):
    """Two runs in which nothing moves would agree as well."""
    start = train(checkpoints["llama"], tmp_path, max_steps=1, learning_rate=0.0)
    end = train(checkpoints["llama"], tmp_path, max_steps=10)
    moved = [(end.parameters[name] - value).abs().max() for name, value in start.parameters.items()]
    assert min(moved) > 1e-3
    assert len(set(end.rewards)) > 1


class RatioTrainer(RecordingTrainer):
    """Keeps, of every loss, the ratio of the new to the old log-probabilities."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.scored = result[0].detach()
        return result

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert inputs["old_per_token_logps"] is not None
        self.ratios = [*getattr(self, "ratios", []), (self.scored - inputs["old_per_token_logps"]).exp()]
        return loss


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap", "cohere-scale-tied", "phi-bias"])
def test_ratio_is_one_to_the_bit_on_the_first_iteration(checkpoints, tmp_path, name):
    """The old log-probabilities come from the pass without gradient, the new ones from the one with it."""
    with memhead_trl.install():
        trainer = make_trainer(
            checkpoints[name], tmp_path, trainer=RatioTrainer, num_iterations=2, max_steps=6, beta=0.0
        )
        trainer.train()
    first, second = trainer.ratios[0::2], trainer.ratios[1::2]
    assert all(torch.equal(ratio, torch.ones_like(ratio)) for ratio in first)
    assert any((ratio != 1).any() for ratio in second)


def test_a_scheduled_run_counts_every_pass(checkpoints, tmp_path):
    """Two steps on one generation with a reference: old, reference and two losses."""
    run = train(checkpoints["llama"], tmp_path, max_steps=2, num_iterations=2, beta=0.04)
    assert run.calls == 4


def test_uninstall_restores(checkpoints, tmp_path):
    before = vars(trl.trainer.utils)["_ChunkedLogProbFunction"]
    layer = trl.trainer.grpo_trainer.BaseTunerLayer
    add = trl.trainer.grpo_trainer.add_fused_lm_head
    handle = memhead_trl.install()
    assert trl.trainer.utils._ChunkedLogProbFunction is not before
    handle.uninstall()
    handle.uninstall()
    assert trl.trainer.utils._ChunkedLogProbFunction is before
    assert trl.trainer.grpo_trainer.BaseTunerLayer is layer
    assert trl.trainer.grpo_trainer.add_fused_lm_head is add


def test_a_second_installation_is_refused():
    before = trl.trainer.utils._ChunkedLogProbFunction
    with memhead_trl.install("full"):
        slot, layer = trl.trainer.utils._ChunkedLogProbFunction, trl.trainer.grpo_trainer.BaseTunerLayer
        with pytest.raises(ValueError, match="impl='full' is installed in TRL already"):
            memhead_trl.install("memhead")
        assert trl.trainer.utils._ChunkedLogProbFunction is slot
        assert trl.trainer.grpo_trainer.BaseTunerLayer is layer
    assert trl.trainer.utils._ChunkedLogProbFunction is before


def test_a_lost_handle_is_found():
    assert memhead_trl.installed() is None
    handle = memhead_trl.install()
    assert memhead_trl.installed() is handle
    handle.uninstall()
    assert memhead_trl.installed() is None


def test_an_installation_that_fails_leaves_nothing_behind(monkeypatch):
    """The last of the trainers cannot be imported, as happens where one of its own packages is missing."""
    import_module = importlib.import_module

    def fail(name):
        if name == "trl.trainer.sft_trainer":
            raise ImportError("no such package")
        return import_module(name)

    monkeypatch.setattr("memhead.integrations.trl_lora.importlib.import_module", fail)
    modules = [trl.trainer.utils, trl.trainer.grpo_trainer, trl.trainer.dpo_trainer]
    before = [dict(vars(module)) for module in modules]
    with pytest.raises(ImportError, match="no such package"):
        memhead_trl.install()
    assert [dict(vars(module)) for module in modules] == before


@pytest.mark.parametrize("impl", ["memhead", "full"])
def test_unknown_arguments_are_refused_by_name(impl):
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    with memhead_trl.install(impl):
        apply = trl.trainer.utils._ChunkedLogProbFunction.apply
        arguments = (hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs",))
        assert apply(*arguments, None)[0].shape == (3,)  # an unused one is nothing to object to
        with pytest.raises(TypeError, match=r"support_ids=tensor"):
            apply(*arguments, support_ids=torch.zeros(3, 2))
        with pytest.raises(TypeError, match=r"argument 10: tensor"):
            apply(*arguments, torch.zeros(3, 2))


@pytest.mark.parametrize(
    "outputs", [("log_probs",), ("entropy", "is_top1"), ("log_sum_sq_probs", "mean_logits")]
)
def test_what_is_not_requested_is_none(outputs):
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    results = []
    for impl in ("memhead", "full"):
        with memhead_trl.install(impl):
            results.append(
                trl.trainer.utils._ChunkedLogProbFunction.apply(
                    hidden, weight, None, targets, 0.7, 32768, 3.0, 0.5, outputs
                )
            )
    for ours, plain in zip(*results, strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None and plain is not None:
            torch.testing.assert_close(ours, plain)


def test_a_bypass_is_noticed(checkpoints, tmp_path):
    """What a later release might do: take the logits from the model after all."""
    with memhead_trl.install() as handle:
        trainer = make_trainer(checkpoints["llama"], tmp_path, max_steps=1)
        trainer.train()
        handle.expect_calls("training step 1")
        trainer = make_trainer(checkpoints["llama"], tmp_path, max_steps=1, trainer=PlainTrainer)
        trainer.train()
        with pytest.raises(HeadBypassed, match="training step 2 never reached memhead"):
            handle.expect_calls("training step 2")


def test_calls_before_the_step_are_not_the_steps():
    """An evaluation between two steps reaches the head; the step that is checked does not."""
    handle = Handle("memhead", lambda: None)
    handle.count(rows=3)
    handle.watch()
    with pytest.raises(HeadBypassed):
        handle.expect_calls("training step 1")
    handle.watch()
    handle.count(rows=3)
    handle.expect_calls("training step 1")
    assert (handle.calls, handle.rows) == (2, 6)


def test_bad_settings_of_install():
    with pytest.raises(ValueError, match="impl='fused' is not one of memhead, full, trl"):
        memhead_trl.install("fused")
    with pytest.raises(ValueError, match="chunk=0"):
        memhead_trl.install(chunk=0)
    for impl in ("full", "trl"):
        with pytest.raises(
            ValueError, match=f"vocab_parallel=True is memhead's; impl='{impl}' computes the whole"
        ):
            memhead_trl.install(impl, vocab_parallel=True)


def test_a_handle_says_what_it_did():
    handle = memhead_trl.install()
    handle.count(rows=1200)
    said = repr(handle)
    assert (
        said
        == "<head 'memhead' in TRL's trainers: 1 calls, 1,200 tokens so far; uninstall() puts back what was there>"
    )
    handle.uninstall()
    assert repr(handle) == "<head 'memhead': uninstalled, after 1 calls, 1,200 tokens so far>"
