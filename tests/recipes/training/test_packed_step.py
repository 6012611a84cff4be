"""The packed step against TRL's padded way, in float64: every gradient and every metric."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from in_double import InDouble
from peft import LoraConfig
from rollouts import Fed, PackedFed, Step, model_of, rollout, run, trainer_of, varlen_by_segment

from memhead.integrations import trl as memhead_trl
from recipes.models.tokenizers import character_tokenizer
from recipes.plan.work import Flow
from recipes.training.packed_attention import use_varlen
from recipes.training.rollout import Rollout, padded

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
            use_adaptive_entropy=False,
        )  # fmt: skip
        pair.packed._token_budget = None
        return pair

    return get


def compare(pair: Pair, *rollouts: dict[str, Any], windows: int, left_out: bool = False) -> list[Step]:
    """Run both on the same micro-batches, of one rollout again and again, or of as many as there are generations.

    left_out: the entropy metric covers less than TRL's.
    """
    torch.manual_seed(3)
    every = [Rollout.shuffled(one, 1, False, None).tensors for one in rollouts]
    fed = every if len(every) > 1 else every[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", torch.arange)  # neither shuffles again
        ours, theirs = run(pair.packed, fed, windows), run(pair.trl, fed, windows)
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
            assert mine.metrics[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-12, nan_ok=True), name
        further = {name for name in mine.metrics if not name.startswith("ratios/")} - set(other.metrics)
        assert further == {"step/tokens_computed", "step/tokens_real", "step/left_out"}
    return ours


LEVELS, BETAS, ITERATIONS = ("token", "sequence"), (0.0, 0.04), (1, 2)
ZEROS, PROMPTS = ("none", "some", "all"), ("shared", "single", "partly")
# 576, a tenth of a second each.
EVERY = [*itertools.product(LOSSES, LEVELS, BETAS, ITERATIONS, ZEROS, PROMPTS)]


@pytest.mark.parametrize(("loss", "level", "beta", "iterations", "zeros", "prompts"), EVERY, ids=str)
def test_every_loss_is_trls(pairs, loss, level, beta, iterations, zeros, prompts):
    pair = pairs("llama")
    pair.set(loss_type=loss, importance_sampling_level=level, beta=beta, num_iterations=iterations)
    left_out = zeros != "none" and beta == 0.0 and loss != "vespo"
    steps = compare(pair, rollout(prompts, zeros), windows=iterations, left_out=left_out)
    assert (steps[0].metrics["step/left_out"] > 0) == left_out


ARCHITECTURES = (
    "llama-window", "qwen2", "qwen3", "mistral", "mistral-window", "gemma2", "gemma3", "phi", "phi3",
    "phi3-window", "olmo2", "granite", "smollm3", "smollm3-window", "cohere",
)  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(pairs, name):
    pair = pairs(name)
    pair.set(beta=0.04, num_iterations=2)
    compare(pair, rollout("partly", "some"), windows=2)
    pair.set(beta=0.0)
    compare(pair, rollout("shared", "some"), windows=2, left_out=True)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_eager_attention(pairs, name):
    """Which adds its mask, and is the one that caps Gemma 2's attention."""
    compare(pairs(name, "eager"), rollout("shared", "none"), windows=1)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("name", "loss", "level"),
    [*itertools.product(["llama"], LOSSES, LEVELS), ("qwen3", "grpo", "token")],
)
def test_lora(pairs, name, loss, level, beta):
    """The reference is the model with its adapter off."""
    pair = pairs(name, lora=True)
    pair.set(beta=beta, num_iterations=2, loss_type=loss, importance_sampling_level=level)
    left_out = beta == 0.0 and loss != "vespo"
    steps = compare(pair, rollout("shared", "some"), windows=2, left_out=left_out)
    assert all("lora_" in parameter for parameter in steps[0].gradients)


@pytest.mark.parametrize(("accumulation", "generation"), [(1, 1), (2, 4), (4, 2), (2, 3), (3, 2)])
@pytest.mark.parametrize("loss", ["bnpo", "grpo", "dapo"])
def test_windows_and_generations_of_other_lengths(pairs, loss, accumulation, generation):
    """More updates than one a generation, more generations than one an update, and across each other."""
    pair = pairs("llama")
    pair.set(loss_type=loss, gradient_accumulation_steps=accumulation, steps_per_generation=generation)
    groups = 4 if 16 % generation == 0 else 6
    windows = max(2, generation)
    compare(pair, rollout("shared", "some", groups=groups), windows=windows, left_out=True)


@pytest.mark.parametrize(("size", "divided"), [(4, False), (12, True)])
def test_a_group_is_divided_where_its_row_would_be_long(pairs, size, divided):
    """Under a dense mask, whose attention costs the square of a row: its prompt is then computed again."""
    pair = pairs("llama")
    pair.set(gradient_accumulation_steps=1, steps_per_generation=1, beta=0.04)
    fed = rollout("shared", "none", size=size)
    (step,) = compare(pair, fed, windows=1)
    once = fed["prompt_mask"][::size].sum() + fed["completion_mask"].sum() - len(fed["completion_mask"])
    assert (step.metrics["step/tokens_computed"] > once) == divided


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_token_budget_changes_nothing_but_the_bins(pairs, budget):
    pair = pairs("llama")
    pair.set(loss_type="bnpo", gradient_accumulation_steps=8, steps_per_generation=8, beta=0.04)
    pair.packed._token_budget = budget
    compare(pair, rollout("shared", "some"), windows=1)


@pytest.mark.parametrize(
    ("window", "budget"),
    [(1, None), (4, 1), (4, 60), (4, 10_000)],
    ids=["one", "a bin each", "some", "together"],
)
def test_the_entropy_is_that_of_the_completions_that_are_computed(pairs, window, budget):
    """All tokens of a window count alike, whichever bin they are in."""
    pair = pairs("llama")
    pair.set(gradient_accumulation_steps=window, steps_per_generation=window)
    pair.packed._token_budget = budget
    run(pair.packed, rollout("shared", "some", seed=1), windows=1)  # of which nothing is left
    fed = rollout("shared", "some")
    live = (fed["advantages"] != 0)[:, None] & fed["completion_mask"].bool()
    (step,) = run(pair.packed, fed, windows=1)
    assert step.metrics["step/left_out"] == 5 / 16
    assert step.metrics["entropy"] == pytest.approx(float(entropies(pair, fed)[live].mean()), rel=TOLERANCE)


@pytest.mark.parametrize("zeros", ["all", "some"], ids=["nothing counts", "the second generation counts"])
def test_a_completion_that_keeps_a_bin_busy_has_an_entropy_where_no_other_has(pairs, zeros):
    pair = pairs("llama")
    pair.set(gradient_accumulation_steps=8, steps_per_generation=4)
    first, second = rollout("shared", "all"), rollout("shared", zeros, seed=1)
    live = (second["advantages"] != 0)[:, None] & second["completion_mask"].bool()
    wanted = entropies(pair, second)[live]
    if zeros == "all":  # of each generation the shortest, which has one token
        wanted = torch.stack([entropies(pair, fed)[0, 0] for fed in (first, second)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", torch.arange)
        (step,) = run(pair.packed, [first, second], windows=1)
    assert step.metrics["entropy"] == pytest.approx(float(wanted.mean()), rel=TOLERANCE)


def entropies(pair, fed):
    """Of every token, by TRL's padded way."""
    batch = padded(fed)
    arguments = batch.input_ids, batch.attention_mask, batch.completion_width
    with torch.no_grad():
        return pair.trl._get_per_token_logps_and_entropies(pair.trl.model, *arguments, compute_entropy=True)[
            1
        ]


@pytest.mark.parametrize(("budget", "rows"), [(None, 4), (None, None), (40, 4)])
def test_scoring_is_cut_as_a_loss_is(pairs, budget, rows):
    """By the token budget; without one, by the slots of as many padded rows as TRL scores at a time, if it says so."""
    pair = pairs("llama")
    trainer, batch = pair.packed, padded(rollout("single", "none"))
    trainer._token_budget, trainer._flow = budget, Flow()
    seen = []
    right = trainer._score

    def score(*given, **options):
        found = right(*given, **options)
        seen.append(found.tokens)
        return found

    trainer._score = score
    try:
        arguments = trainer.model, batch.input_ids, batch.attention_mask, batch.completion_width
        with torch.no_grad():
            found, entropies, _ = trainer._get_per_token_logps_and_entropies(*arguments, rows, True)
            expected, others, _ = pair.trl._get_per_token_logps_and_entropies(*arguments, rows, True)
    finally:
        del trainer._score
    real = batch.attention_mask[:, batch.prompt_width :]
    torch.testing.assert_close(found, expected * real, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(entropies, others * real, rtol=TOLERANCE, atol=TOLERANCE)
    limit = budget or (rows or len(batch.input_ids)) * batch.input_ids.shape[1]
    tokens = int(batch.attention_mask.sum()) - len(
        batch.input_ids
    )  # a completion's last one predicts nothing
    assert sum(seen) == tokens
    assert max(seen) <= limit
    assert len(seen) <= 2 * tokens / limit + 1


def test_entropy_bonus_and_quantile(pairs):
    pair = pairs("llama")
    pair.set(entropy_coef=0.1)
    compare(pair, rollout("shared", "some"), windows=1)
    pair.set(entropy_coef=0.0, top_entropy_quantile=0.4)
    compare(pair, rollout("shared", "some"), windows=1)


def test_adaptive_entropy_moves_once_a_window(pairs):
    """By all micro-batches of the window, of which a bin has several."""
    pair = pairs("llama")
    pair.set(use_adaptive_entropy=True, entropy_coef=0.1, entropy_target=10.0, entropy_coef_delta=0.05)
    steps = compare(pair, rollout("shared", "some"), windows=3)
    assert [step.metrics["entropy_coef"] for step in steps] == pytest.approx([0.15, 0.2, 0.25])


def test_off_policy_mask_and_delta(pairs):
    pair = pairs("llama")
    pair.set(off_policy_mask_threshold=1e-3, delta=1.1, num_iterations=2)
    compare(pair, rollout("shared", "none"), windows=2)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss", ["dapo", "vespo"])
def test_importance_ratio_of_another_engine(pairs, loss, mode):
    """Formed in the loss pass, from log-probabilities that nobody computed before; a NaN counts as no difference."""
    pair = pairs("llama")
    pair.set(
        loss_type=loss, use_vllm=True, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=0.5, vllm_importance_sampling_clip_max=2.0,
    )  # fmt: skip
    fed = rollout("shared", "none")
    noise = torch.randn(fed["completion_ids"].shape, dtype=torch.float64)
    fed["sampling_per_token_logps"] = noise - 4
    fed["sampling_per_token_logps"][1, 0] = float("nan")
    compare(pair, fed, windows=1)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate"])
def test_a_completion_without_a_token_is_in_trls_figures_of_another_engine_by_sequence(pairs, mode):
    pair = pairs("llama")
    pair.set(use_vllm=True, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=mode,
             vllm_importance_sampling_clip_min=0.5, vllm_importance_sampling_clip_max=2.0)  # fmt: skip
    fed = rollout("shared", "none")
    fed["completion_mask"][::2] = 0
    fed["sampling_per_token_logps"] = torch.randn(fed["completion_ids"].shape, dtype=torch.float64) - 4
    compare(pair, fed, windows=1)


@pytest.mark.parametrize(
    ("mode", "accumulation", "windows", "budget"),
    [("token_mask", 4, 1, None), ("token_mask", 4, 1, 1), ("sequence_truncate", 3, 2, None)],
)
def test_every_generation_of_a_window_has_its_own_figures_of_another_engine(
    pairs, mode, accumulation, windows, budget
):
    """A window's are the mean of its generations': TRL's largest difference is a mean of largest ones."""
    pair = pairs("llama")
    pair.packed._token_budget = budget  # one token: every micro-batch is a bin
    pair.set(
        use_vllm=True, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=0.5, vllm_importance_sampling_clip_max=2.0,
        gradient_accumulation_steps=accumulation, steps_per_generation=2,
    )  # fmt: skip
    different = [rollout("shared", "none", seed=seed) for seed in range(windows * accumulation // 2)]
    for fed in different:
        fed["sampling_per_token_logps"] = torch.randn(fed["completion_ids"].shape, dtype=torch.float64) - 4
    compare(pair, *different, windows=windows)


def test_completions_of_one_token_have_ratios_of_tokens(pairs):
    """Of which a row without one has none."""
    pair = pairs("llama")
    pair.set(
        use_vllm=True, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_min=0.5, vllm_importance_sampling_clip_max=2.0,
    )  # fmt: skip
    fed = rollout("shared", "none")
    fed = {k: v[:, :1] if k.startswith("completion") else v for k, v in fed.items()}
    fed["completion_mask"][::3] = 0
    fed["sampling_per_token_logps"] = torch.full(fed["completion_ids"].shape, -4.0, dtype=torch.float64)
    compare(pair, fed, windows=1)


def test_ratios_are_one_to_the_bit(pairs):
    """Scored before an update in the bins of the loss: the first loss of a later window sees a ratio of exactly 1."""
    pair = pairs("llama")
    pair.set(gradient_accumulation_steps=1, steps_per_generation=2)
    trainer = pair.packed
    trainer.model.train()
    trainer.fed, trainer._step, trainer._place, trainer._rollout = rollout("shared", "some"), 0, 0, None
    trainer.current_gradient_accumulation_steps = 1
    trainer._prepare_inputs(None)
    trainer._step = 1
    later = trainer._prepare_inputs(None)
    old = later.rollout.parts[1]["old_per_token_logps"]
    assert torch.equal(trainer._score_bin(trainer.model, later, entropy=True).logps, old)
    assert "old_per_token_logps" not in later.rollout.parts[0]


def test_every_row_that_is_computed_has_been_scored(pairs, monkeypatch):
    """A later iteration's windows begin elsewhere: there the first micro-batch, without a gradient, is a bin alone."""
    pair = pairs("llama")
    pair.set(gradient_accumulation_steps=2, steps_per_generation=3, num_iterations=2)
    fed = rollout("shared", "none", groups=6)
    fed["advantages"][:8] = 0.0
    monkeypatch.setattr(torch, "randperm", torch.arange)
    run(pair.packed, fed, windows=3)
    kept = pair.packed._rollout
    old = torch.cat([part["old_per_token_logps"] for part in kept.parts])
    assert torch.equal(old[:, 0] < 0, kept.live)
    assert kept.live[:8].sum() == 1


def test_evaluation(pairs):
    pair = pairs("llama")
    fed = rollout("partly", "some")
    losses, metrics = [], []
    for trainer in pair:
        trainer.model.eval()
        trainer.fed = fed
        trainer._metrics["eval"] = defaultdict(list)
        losses.append(float(trainer.prediction_step(trainer.model, None, True)[0]))
        metrics.append(dict(trainer._metrics["eval"]))
        trainer.model.train()
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)
    assert metrics[1].keys() == metrics[0].keys()
    for name, values in metrics[0].items():
        assert metrics[1][name] == pytest.approx(values, rel=TOLERANCE), name


def test_masked_completions(pairs):
    """mask_truncated_completions leaves rows, or a whole window, without a token to score."""
    pair = pairs("llama")
    fed = rollout("shared", "none")
    fed["completion_mask"][::2] = 0
    compare(pair, fed, windows=1)
    fed["completion_mask"][:] = 0
    steps = compare(pair, fed, windows=1)
    assert all((g == 0).all() for g in steps[0].gradients.values())


def test_gradient_checkpointing(pairs):
    """The layout is there again when the backward runs the layers a second time."""
    pair = pairs("llama")
    again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), InDouble())}
    pair.trl.model.gradient_checkpointing_enable(again)
    try:
        compare(pair, rollout("shared", "some"), windows=1, left_out=True)
    finally:
        pair.trl.model.gradient_checkpointing_disable()


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        *itertools.product(["llama", "gemma3"], ["shared", "single"]),
        *((name, "partly") for name in ("llama", *ARCHITECTURES)),
    ],
)
def test_one_row_with_variable_length_attention(pairs, monkeypatch, name, prompts):
    """The layout of a GPU, with its kernel written out."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_segment)
    pair = pairs(name)
    config = pair.packed.model.config
    monkeypatch.setattr(pair.packed, "_varlen", True)
    pair.set(beta=0.04 if prompts == "partly" else 0.0)
    models = pair.packed._causal_models()  # the reference too
    before = config._attn_implementation
    for model in models:
        use_varlen(model)
    try:
        compare(pair, rollout(prompts, "some"), windows=1, left_out=prompts != "partly")
    finally:
        for model in models:
            model.config._attn_implementation = before
