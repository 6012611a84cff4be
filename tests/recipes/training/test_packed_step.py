"""The packed step against TRL's padded way, in float64: every gradient and every metric."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from in_double import InDouble
from rollouts import Fed, PackedFed, model_of, rollout, trainer_of

from memhead.integrations import trl as memhead_trl
from recipes.models.load import character_tokenizer

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
TOLERANCE = 1e-10


class Pair(NamedTuple):
    """Two trainers of one model."""

    trl: Any
    packed: Any

    def set(self, **settings: Any) -> None:
        """A setting, as trainer's attribute and as argument, wherever TRL reads it."""
        for trainer in self:
            for name, value in settings.items():
                for owner in (trainer, trainer.args):
                    if hasattr(owner, name):
                        setattr(owner, name, value)
            trainer._entropy_bonus_enabled = trainer.entropy_coef != 0.0


class Step(NamedTuple):
    """What came of one accumulation window."""

    loss: float
    gradients: dict[str, torch.Tensor]
    metrics: dict[str, float]


@pytest.fixture(scope="module", autouse=True)
def head():
    with memhead_trl.install(), InDouble():
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Trainers by architecture, made once."""
    made: dict[Any, Pair] = {}

    def get(name: str, attention: str = "sdpa", lora: bool = False) -> Pair:
        key = (name, attention, lora)
        if key not in made:
            model = model_of(name, attention)
            tokenizer = character_tokenizer("0123456789+-*=>abcdef")
            adapters = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False) if lora else None
            place = tmp_path_factory.mktemp(name)
            trl = trainer_of(Fed, model, place, tokenizer, peft_config=adapters)
            ours = trainer_of(PackedFed, trl.model if lora else model, place, tokenizer)
            if lora:
                ours.model.delete_adapter("ref")
                ours.model.double()
            else:
                reference = copy.deepcopy(model)
                with torch.no_grad():
                    for parameter in reference.parameters():
                        parameter.mul_(1.05)
                trl.ref_model = ours.ref_model = reference
            made[key] = Pair(trl, ours)
        pair = made[key]
        pair.set(
            loss_type="dapo", importance_sampling_level="token", beta=0.0, num_iterations=1, entropy_coef=0.0,
            top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, delta=None,
            gradient_accumulation_steps=2, steps_per_generation=2, use_bias_correction_kl=False,
        )  # fmt: skip
        pair.packed._token_budget = None
        return pair

    return get


def run(trainer: Any, fed: dict[str, Any], micro_batches: Any, windows: int) -> list[Step]:
    """Train `windows` windows on one rollout, with plain steps along the gradient; the model is put back after it."""
    model = trainer.model
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    trainer.fed, trainer._step, trainer._place, trainer._rollout = fed, 0, 0, None
    trainer._buffered_inputs = None
    trainer.current_gradient_accumulation_steps = window = trainer.args.gradient_accumulation_steps
    steps = []
    for _ in range(windows):
        trainer._metrics["train"] = defaultdict(list)
        loss = 0.0
        for place in range(window):
            trainer.accelerator.gradient_state._set_sync_gradients(place == window - 1)
            loss += float(trainer.training_step(model, None, None))
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        metrics = {k: sum(v) / len(v) for k, v in trainer._metrics["train"].items()}
        steps.append(Step(loss, gradients, metrics))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.02 * p.grad / (1e-3 + p.grad.abs().max())
        model.zero_grad()
    with torch.no_grad():
        for p, value in zip(model.parameters(), before, strict=True):
            p.copy_(value)
    return steps


def compare(pair: Pair, fed: dict[str, Any], *, windows: int, left_out: bool = False) -> list[Step]:
    """Run both on the same micro-batches. `left_out`: the entropy metric covers less than TRL's."""
    torch.manual_seed(3)
    ours = run(pair.packed, fed, None, windows)
    order = pair.packed._rollout.tensors  # rows as the packed step shuffled them
    same = {k: v for k, v in order.items() if k in fed}
    from trl.trainer import grpo_trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_trainer, "shuffle_sequence_dict", lambda rows: rows)
        theirs = run(pair.trl, same, None, windows)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=TOLERANCE, abs=1e-13)
        assert mine.gradients.keys() == other.gradients.keys()
        whole = sum(g.square().sum() for g in other.gradients.values()).sqrt()
        for name, gradient in other.gradients.items():
            error = (mine.gradients[name] - gradient).norm()
            scale = max(gradient.norm(), 1e-4 * whole)
            assert error <= TOLERANCE * scale, f"{name}: {error} of {gradient.norm()}"
        for name, value in other.metrics.items():
            if name == "step_time" or (left_out and name == "entropy"):
                continue
            assert mine.metrics[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-12), name
        assert set(mine.metrics) - set(other.metrics) == {
            "step/tokens_computed", "step/tokens_real", "step/left_out", "step/tokens_per_second",
        }  # fmt: skip
    return ours


CASES = [
    pytest.param(*case, prompts, id="-".join(map(str, (*case, prompts))))
    for number, case in enumerate(
        itertools.product(LOSSES, ("token", "sequence"), (0.0, 0.04), (1, 2), ("none", "some", "all"))
    )
    for prompts in [("shared", "single", "partly")[number % 3]]
]


@pytest.mark.parametrize(("loss", "level", "beta", "iterations", "zeros", "prompts"), CASES)
def test_every_loss_is_trls(pairs, loss, level, beta, iterations, zeros, prompts):
    pair = pairs("llama")
    pair.set(loss_type=loss, importance_sampling_level=level, beta=beta, num_iterations=iterations)
    left_out = zeros != "none" and beta == 0.0 and loss != "vespo"
    steps = compare(pair, rollout(prompts, zeros), windows=iterations, left_out=left_out)
    assert (steps[0].metrics["step/left_out"] > 0) == left_out
