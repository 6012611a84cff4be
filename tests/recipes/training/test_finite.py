"""Steps, models and warm starts that are not finite."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file
from test_quickstart import CONFIG, TINY
from tiny import tiny_trainer
from transformers import TrainerCallback

import train_grpo
from recipes.config.load import load_config
from recipes.models.finite import first_not_finite, why_unusable
from recipes.models.generation import encode
from recipes.models.load import load
from recipes.models.manifest import damage
from recipes.tasks.countdown import Countdown
from recipes.tracking.files import LinesFile
from recipes.tracking.run_folder import RunFolder
from recipes.training.finite import BadSteps, Diverged
from recipes.training.head_check import check_head, lost


def command(tmp_path, *more):
    changed = {setting.partition("=")[0] for setting in more}
    kept = [setting for setting in TINY if setting.partition("=")[0] not in changed]
    return ["--config", CONFIG, *kept, f"run.output_root={tmp_path}", *more]


def test_a_learning_rate_that_destroys_the_model_ends_with_status_1_and_saves_nothing_of_it(tmp_path, capsys):
    """How it ends depends on the machine's rounding: with infinite gradients, or with logits that are all 0."""
    lost = command(tmp_path, "grpo.learning_rate=1e6", "grpo.max_steps=10", "run.save_every=1")
    assert train_grpo.main(lost) == 1
    folder = RunFolder(tmp_path / "tiny")
    printed = capsys.readouterr()
    error = printed.err.strip().splitlines()[-1]
    assert re.match(
        r"error: (3 steps in a row were not finite: the run|step \d+, .*: the model) has diverged", error
    )
    assert "lower the learning rate" in error
    assert printed.out.endswith(f"report of the steps before: {folder.path / 'report.html'}\n")
    assert (folder.path / "report.html").exists()
    assert not folder.final.exists()
    assert not (folder.path / "finished.json").exists()
    bad = LinesFile(folder.path / "bad_steps.jsonl").read()
    for line in bad:
        assert len(line["completions"]) == 16
        assert line["phase"] in ("forward", "backward")
        assert f"step {line['step']}, {line['phase']}: " in printed.out
    for weights in folder.path.glob("checkpoints/*/model.safetensors"):
        assert first_not_finite(load_file(weights).items()) is None

    # The weights from which no finite step was taken are not resumed from, whatever the rate is now.
    steps = [line["step"] for line in folder.metrics.read() if line.get("bad_step") == 0]
    found = RunFolder.to_resume(tmp_path, "tiny")
    earlier = found.checkpoint
    assert found.step < max(steps)
    train_grpo.main([s.replace("learning_rate=1e6", "learning_rate=1e-9") for s in lost] + ["--resume"])
    assert f"Resuming from {earlier}" in capsys.readouterr().out


def test_checkpoints_from_which_no_finite_step_was_taken_are_condemned(memhead_in_trl, tmp_path):
    def diverging(step):
        trainer = tiny_trainer(tmp_path / "checkpoints", steps=9, save_strategy="steps", save_steps=1)
        computed = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs: (
            computed(model, inputs) * (math.nan if trainer.state.global_step >= step else 1.0)
        )
        return trainer

    (tmp_path / "checkpoints" / "checkpoint-2-old").mkdir(parents=True)  # a copy that somebody keeps there
    trainer = diverging(2)
    with pytest.raises(Diverged, match="3 steps in a row were not finite"):
        trainer.train()
    assert [line["bad_step"] for line in trainer.state.log_history] == [0, 0, 1, 1]  # the third ends it
    written = {place.name for place in (tmp_path / "checkpoints").glob("checkpoint-*")}
    assert written == {
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-2-old",
    }  # none after a step that was not taken
    bad = LinesFile(tmp_path / "bad_steps.jsonl").read()
    assert [(line["step"], line["phase"]) for line in bad] == [(3, "forward"), (4, "forward"), (5, "forward")]
    found = {n: damage(tmp_path / "checkpoints" / f"checkpoint-{n}") for n in (1, 2)}
    assert not found[1]
    assert found[2].startswith("the run diverged from there")

    # A session that takes no finite step at all condemns what it began with, and nothing earlier.
    with pytest.raises(Diverged, match="3 steps in a row were not finite"):
        diverging(0).train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-2"))
    assert not damage(tmp_path / "checkpoints" / "checkpoint-1")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_gradient_changes_nothing_and_the_run_goes_on(memhead_in_trl, tmp_path, capsys, value):
    trainer = tiny_trainer(tmp_path / "checkpoints", steps=4, weight_decay=0.1)
    weight, seen, calls = trainer.model.lm_head.weight, [], []

    def spoil(gradient):
        calls.append(1)
        seen.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        return gradient * value if len(calls) == 2 else gradient

    weight.register_hook(spoil)
    trainer.train()
    assert [step["bad_step"] for step in trainer.state.log_history if "bad_step" in step] == [
        0,
        1,
        0,
        0,
    ]
    assert all(
        torch.equal(seen[1][name], seen[2][name]) for name in seen[1]
    )  # weight decay did not happen either
    assert not torch.equal(seen[2]["lm_head.weight"], seen[3]["lm_head.weight"])
    assert {int(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()} == {3}
    assert trainer.bad_steps.total == 1
    assert "step 2, backward: the gradient norm is not finite" in capsys.readouterr().out
    (line,) = LinesFile(tmp_path / "bad_steps.jsonl").read()
    assert (line["step"], line["phase"], len(line["completions"])) == (2, "backward", 8)
    assert {"prompt", "completion", "rewards", "advantage"} <= set(line["completions"][0])


@pytest.mark.parametrize("bad", [0, 1])
def test_a_loss_that_is_nan_is_told_from_a_gradient_that_is(memhead_in_trl, tmp_path, capsys, bad):
    """In whichever micro-batch."""
    trainer = tiny_trainer(
        tmp_path / "checkpoints", steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=4
    )
    computed, calls = trainer._compute_loss, []
    trainer._compute_loss = lambda model, inputs: (
        computed(model, inputs) * (math.nan if len(calls) == bad else 1.0) + 0.0 * len([calls.append(1)])
    )
    trainer.train()
    assert len(calls) == 4
    assert "step 1, forward: the loss is not finite (nan)" in capsys.readouterr().out
    assert trainer.bad_steps.total == 1


@pytest.mark.parametrize("engine", [None, object()], ids=["none", "deepspeed's"])
def test_an_update_that_deepspeeds_engine_has_taken_is_not_called_skipped(memhead_in_trl, tmp_path, engine):
    """By a finite gradient, whatever the loss."""
    trainer = tiny_trainer(tmp_path / "checkpoints", steps=1)
    computed, trainer.deepspeed = trainer._compute_loss, engine
    trainer._compute_loss = lambda model, inputs: computed(model, inputs) + math.nan
    trainer.train()
    assert trainer.bad_steps.total == (engine is None)


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")], ids=["none", "float16's"])
def test_a_gradient_that_overflows_under_a_scaler_is_the_scalers_to_skip(memhead_in_trl, tmp_path, scaler):
    """It looks for its scale so, in the first steps of every run in float16."""
    trainer = tiny_trainer(tmp_path / "checkpoints", steps=1)
    trainer.accelerator.scaler, trainer._loss_so_far = scaler, torch.tensor(1.0)
    trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(math.inf))
    assert trainer.bad_steps.total == (scaler is None)


def test_an_optimizer_that_is_not_finite_is_not_saved(memhead_in_trl, tmp_path, capsys):
    """Its weights may be: they would be lost at the next step."""
    trainer = tiny_trainer(tmp_path / "checkpoints", steps=1)
    trainer.train()
    list(trainer.optimizer.state.values())[2]["exp_avg_sq"][0] = math.inf
    trainer._save_checkpoint(trainer.model, trial=None)
    said = capsys.readouterr().out
    assert "step 1: no checkpoint is written: the optimizer's exp_avg_sq of parameter 2 is not finite" in said
    assert not list((tmp_path / "checkpoints").glob("checkpoint-*"))


def test_weights_lost_in_an_update_stop_the_run_at_once(memhead_in_trl, tmp_path):
    trainer = tiny_trainer(
        tmp_path / "checkpoints", steps=3, learning_rate=1e39, lr_scheduler_type="constant"
    )
    with pytest.raises(Diverged, match=r"step 1, update: the weight .* is not finite any more"):
        trainer.train()
    with pytest.raises(Diverged, match="was not written: the model has diverged, its weight"):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


def test_bad_steps_in_a_row_are_counted_from_the_last_good_one():
    steps = BadSteps(2, "lower it")
    for bad in (True, False, True):
        steps.bad("step") if bad else steps.good(1)
        steps.stop_at_limit()
    assert (steps.in_a_row, steps.total) == (1, 2)
    assert "(2 in a row, 2 end the run)" in steps.bad("step")
    with pytest.raises(Diverged, match="2 steps in a row were not finite: the run has diverged; lower it"):
        steps.stop_at_limit()


def poisoned_after(trainer, step, spoil):
    """Spoils the model where an update has just been found finite, as a fault of the hardware may."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                with torch.no_grad():
                    spoil(trainer.model)

    trainer.add_callback(Spoil())


def overflow_to_nan(model):
    """Finite weights, the sum of whose products is inf - inf."""
    model.model.norm.weight.fill_(1e30)
    model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight) * 1e30)


def overflow_to_nothing(model):
    """RMSNorm divides by the square of these, and nothing is left of any prompt."""
    model.model.embed_tokens.weight.mul_(1e30)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            overflow_to_nan,
            "its weights are finite, but its logits for the task's prompts are NaN or infinite",
        ),
        (
            overflow_to_nothing,
            "its weights are finite, but something overflows: its logits are the same whatever",
        ),
    ],
)
def test_a_model_that_gives_no_distribution_is_not_sampled_from(memhead_in_trl, tmp_path, spoil, reason):
    """On a GPU sampling from NaN would end in a failed assertion, after which nothing runs in the process."""
    trainer = tiny_trainer(tmp_path / "checkpoints", steps=4, save_strategy="steps", save_steps=1)
    poisoned_after(trainer, 2, spoil)
    with pytest.raises(Diverged) as caught:
        trainer.train()
    said = str(caught.value)
    assert said.startswith(f"step 3, generation: the model has diverged, {reason}")
    assert "lower the learning rate" in said
    assert "go on from an earlier checkpoint" in said
    assert trainer.state.global_step == 2
    assert not damage(tmp_path / "checkpoints" / "checkpoint-1")
    assert not (tmp_path / "checkpoints" / "checkpoint-2").exists()
    with pytest.raises(Diverged, match="was not written: the model has diverged"):
        trainer.save_model(str(tmp_path / "final"))


def test_a_model_that_gives_no_distribution_for_later_tokens_is_said(memhead_in_trl, tmp_path):
    trainer = tiny_trainer(tmp_path / "checkpoints", steps=4, save_strategy="steps", save_steps=1)

    def spoil(head, inputs, logits):
        if trainer.state.global_step == 2 and len(logits) > 4:  # more rows than are looked at before
            logits.fill_(math.nan)

    trainer.model.lm_head.register_forward_hook(spoil)
    with pytest.raises(
        Diverged, match=r"^step 3, generation: the model has diverged, .* while it samples are NaN"
    ):
        trainer.train()
    assert not damage(tmp_path / "checkpoints" / "checkpoint-1")
    assert damage(tmp_path / "checkpoints" / "checkpoint-2").startswith("the run diverged from there")


def one_nan(model):
    model.model.layers[0].mlp.up_proj.weight[3, 5] = math.nan


@pytest.fixture(params=[one_nan, overflow_to_nothing, overflow_to_nan])
def unusable(tmp_path, request):
    """A folder with the quickstart's model, spoilt; and what is said of it."""
    config = load_config(CONFIG, TINY)
    model, tokenizer = load(config.model, config.make_task(), 0)
    with torch.no_grad():
        request.param(model)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    said = {
        one_nan: "its weight model.layers.0.mlp.up_proj.weight holds NaN",
        overflow_to_nothing: "its weights are finite, but something overflows: its logits are the same whatever",
        overflow_to_nan: "its weights are finite, but its logits for the task's prompts are NaN or infinite",
    }
    return tmp_path / "model", said[request.param]


def test_a_base_model_that_is_of_no_use_is_called_that(unusable, tmp_path, capsys):
    place, reason = unusable
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{loader: transformers, name: {place}}}\ntask: {{name: countdown}}\n"
        "grpo: {max_steps: 1, per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 6}\n"
    )
    assert train_grpo.main(["--config", str(path), f"run.output_root={tmp_path}"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {place} cannot be trained: {reason}")
    assert "memhead" not in error


def test_weights_that_are_far_too_large_are_said(tmp_path, capsys):
    """They read their prompts, and give them less than a guess would; a run goes on, and says so once."""
    model, tokenizer = load(load_config(CONFIG, TINY).model, Countdown(Countdown.Options(), 0), 0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    prompts = ["357>26=", "123>6="]
    batch = encode(tokenizer, prompts)
    assert why_unusable(model, batch) is None
    with torch.no_grad():
        logprobs = model(**batch).logits.double().log_softmax(-1)[:, :-1]
    real = batch["attention_mask"][:, :-1].bool()
    nats = -logprobs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0][real].mean()
    found = check_head(model, tokenizer, prompts, temperature=0.5)
    assert found["passed"]
    assert found["prompt_nats"] == pytest.approx(float(nats), rel=1e-5)

    model.save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{loader: transformers, name: {tmp_path / 'large'}}}\ntask: {{name: countdown}}\n"
        "run: {evaluation: {size: 4}}\n"
        "grpo: {max_steps: 1, per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 6}\n"
    )
    assert train_grpo.main(["--config", str(path), f"run.output_root={tmp_path}"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "nats a token" in line]
    assert line.startswith("The model gives its own prompts ")
    assert "where guessing among 20 costs 3.0: its weights are finite, but look far too large" in line


@pytest.mark.parametrize(
    ("nats", "vocabulary", "is_said"),
    [(29.9, 20, False), (30.0, 20, True), (117, 128_256, False), (118, 128_256, True)],
)  # fmt: skip
def test_ten_times_the_cost_of_a_guess_is_far_too_much(nats, vocabulary, is_said):
    assert bool(lost({"prompt_nats": nats, "vocabulary": vocabulary})) == is_said


def test_a_model_that_is_of_no_use_is_not_evaluated(unusable, capsys):
    place, reason = unusable
    assert train_grpo.main(["--config", CONFIG, *TINY, "--evaluate", str(place)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"cannot be evaluated: {reason}" in printed.err


def test_a_process_without_a_part_of_a_weight_finds_nothing_in_it():
    nothing, fine, bad = torch.empty(0), torch.ones(3), torch.tensor([1.0, math.inf])
    assert first_not_finite([("a", nothing)]) is None
    assert first_not_finite([("a", nothing), ("b", fine), ("numbers", torch.tensor([2]))]) is None
    assert first_not_finite([("a", nothing), ("b", fine), ("c", bad)]) == "c"


def test_of_a_weight_in_parts_by_zero_3_its_part_is_looked_at():
    """Whose parameter is empty between two passes; test_zero3.py has the real one."""
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_tensor = torch.ones(3)
    assert first_not_finite([("a", weight)]) is None
    weight.ds_tensor[1] = math.nan
    assert first_not_finite([("a", weight)]) == "a"


def test_without_an_engine_of_deepspeed_the_model_is_saved_as_it_is(memhead_in_trl, tmp_path):
    """As after an evaluation that was missing, or a Ctrl-C before the first step."""
    trainer = tiny_trainer(tmp_path / "checkpoints", steps=1)
    trainer.is_deepspeed_enabled = True
    trainer.save_model(str(tmp_path / "final"))
    assert load_file(tmp_path / "final" / "model.safetensors").keys() == trainer.model.state_dict().keys()
    assert trainer.is_deepspeed_enabled


def test_a_head_of_zeros_is_no_fault():
    """As a new model may begin: its logits are the same for every prompt, its gradient is not."""
    config = load_config(CONFIG, TINY)
    model, tokenizer = load(config.model, config.make_task(), 0)
    batch = encode(tokenizer, ["357>26=", "123>6="])
    assert why_unusable(model, batch) is None
    assert why_unusable(model, encode(tokenizer, ["357>26="] * 2)) is None  # data that asks the same twice
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert why_unusable(model, batch) is None


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        (
            6,
            "error: 3 steps in a row were not finite: the run has diverged; lower run.warm_start.learning_rate",
        ),
        (2, "error: the warm start has diverged: of its model, its weight "),
    ],
)
def test_a_diverged_warm_start_is_called_that(tmp_path, capsys, steps, line):
    settings = (
        "run.warm_start.learning_rate=6e38",
        "run.warm_start.weight_decay=1e3",
        f"run.warm_start.steps={steps}",
    )
    assert train_grpo.main(command(tmp_path, *settings)) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(line)
    assert not (tmp_path / "tiny" / "warm_start").exists()
