"""What a run refuses, and how it ends then: status, files, and what it says."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_finite import command
from test_quickstart import CONFIG, TINY

import train_grpo
from memhead.integrations import trl as memhead_trl
from memhead.integrations.handle import Handle, HeadBypassed
from recipes.config.load import load_config
from recipes.config.schema import ModelConfig, ScratchConfig
from recipes.models import load as models
from recipes.models.generation import encode
from recipes.models.precision import Precision
from recipes.tasks.countdown import Countdown
from recipes.tracking.phases import phase_of
from recipes.tracking.run_folder import RunFolder
from recipes.training import evaluation, head_check
from recipes.training.callbacks import AccuracyEvery, BypassGuard
from recipes.training.head_check import ALLOWANCE, FLOOR, check_head
from recipes.training.trainer import count_calls, make_trainer

SHORT = (
    "run.warm_start=null",
    "grpo.max_steps=3",
    "run.evaluation.size=4",
    "run.evaluation.every=null",
    "grpo.per_device_train_batch_size=8",
)


def short(root, *more):
    """The command of a run that takes about a second."""
    given = command(root, *more)
    changed = ("run.warm_start", *(setting.partition("=")[0] for setting in SHORT))
    kept = [word for word in given if word in more or not word.startswith(changed)]
    again = {word.partition("=")[0] for word in more}
    return [*kept, *(setting for setting in SHORT if setting.partition("=")[0] not in again)]


# The check of the head


@pytest.fixture(scope="module")
def loaded():
    shape = ScratchConfig(hidden_size=32, layers=1, intermediate_size=32)
    return models.load(
        ModelConfig(loader="scratch", scratch=shape), Countdown(Countdown.Options(), 0), seed=0
    )


class Scaled(torch.autograd.Function):
    """Its argument, with a gradient that is one percent too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


RIGHT = head_check.linear_logprobs


def wrong_value(hidden, *rest, **options):
    result = RIGHT(hidden, *rest, **options)
    return result._replace(logprobs=result.logprobs + 1e-3)


def wrong_gradient(hidden, *rest, **options):
    return RIGHT(Scaled.apply(hidden), *rest, **options)


@pytest.mark.parametrize("wrong", [wrong_value, wrong_gradient])
def test_one_wrong_figure_of_two_fails_the_check(loaded, monkeypatch, wrong):
    monkeypatch.setattr(head_check, "linear_logprobs", wrong)
    found = check_head(*loaded, ["357>26=", "12>"])
    over = {name: found["memhead"][name] > found["allowed"][name] for name in found["memhead"]}
    assert over == {
        "logprob_error": wrong is wrong_value,
        "gradient_error": wrong is wrong_gradient,
    }
    assert found["passed"] is False


def test_what_the_check_measures_and_allows(loaded, monkeypatch):
    """Errors of a known size; allowed are three times those of full logits, and a hundred-thousandth."""
    assert (ALLOWANCE, FLOOR) == (3.0, 1e-5)
    monkeypatch.setattr(head_check, "linear_logprobs", wrong_gradient)
    found = check_head(*loaded, ["357>26=", "12>"])
    assert found["memhead"]["gradient_error"] == pytest.approx(0.01, rel=1e-3)
    monkeypatch.setattr(head_check, "linear_logprobs", wrong_value)
    found = check_head(*loaded, ["357>26=", "12>"])
    assert found["memhead"]["logprob_error"] == pytest.approx(1e-3, rel=1e-2)
    for name, error in found["full_logits"].items():
        assert found["allowed"][name] == 3 * error + 1e-5
    assert (found["rows"], found["vocabulary"], found["hidden_size"]) == (8, 20, 32)
    assert check_head(*loaded, ["357>26=", "12>"], rows=5)["rows"] == 5
    most = check_head(*loaded, ["357>26="] * 11)  # 66 tokens that another follows
    assert (most["rows"], most["temperature"], most["dtype"]) == (64, 1.0, "float32")


def test_the_check_is_of_the_models_own_dtype_and_of_the_runs_products(loaded):
    model, tokenizer = loaded
    exact = check_head(model, tokenizer, ["357>26="])
    half = check_head(model, tokenizer, ["357>26="], precision=Precision(torch.bfloat16))
    assert half["precision"]["products"] == "bfloat16"
    # Full logits are rounded as a run without memhead would round them; memhead's are not.
    assert half["full_logits"]["logprob_error"] > 10 * half["memhead"]["logprob_error"]
    assert half["full_logits"]["gradient_error"] > 100 * exact["full_logits"]["gradient_error"]
    assert exact["passed"]
    assert half["passed"]


def test_it_leaves_the_models_mode_and_gradients_alone(loaded):
    model, tokenizer = loaded
    for mode in (True, False):
        model.train(mode)
        check_head(model, tokenizer, ["357>26="])
        assert model.training is mode
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_check_keeps_no_graph_of_the_model(loaded):
    model, tokenizer = loaded
    hidden, targets = head_check._real_rows(model, encode(tokenizer, ["357>26="]), 3)
    assert (hidden.shape, targets.shape, hidden.requires_grad) == ((3, 32), (3,), False)


def test_the_check_takes_four_prompts_and_what_fails_in_it_says_so(tmp_path, monkeypatch):
    asked = []

    def fails(model, tokenizer, prompts, **options):
        asked.extend(prompts)
        raise MemoryError

    monkeypatch.setattr(head_check, "check_head", fails)
    config = load_config(short(tmp_path)[1], short(tmp_path)[2:])
    task = Countdown(Countdown.Options(), 0)
    session = SimpleNamespace(config=config, model=None, tokenizer=None, task=task, precision=None)
    with pytest.raises(MemoryError) as caught:
        head_check.require_exact_head(session)
    assert phase_of(caught.value) == "the check of the head"
    assert asked == task.held_out["prompt"][:4]


def test_a_head_that_fails_its_check_ends_the_run_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(head_check, "linear_logprobs", wrong_gradient)
    assert train_grpo.main(short(tmp_path)) == 1
    place = tmp_path / "tiny"
    (error,) = capsys.readouterr().err.strip().splitlines()
    figures = f"{place / 'head_check.json'} has the figures"
    assert error == f"error: memhead disagrees with full logits in float64 on this model; {figures}"
    assert json.loads((place / "head_check.json").read_text())["passed"] is False
    for name in ("metrics.jsonl", "final", "finished.json", "report.html", "summary.json"):
        assert not (place / name).exists(), name


# A head that is gone around


def test_a_bypass_is_noticed_in_every_step_whatever_happened_before():
    handle = Handle("memhead", lambda: None)
    guard = BypassGuard(handle)
    for step in (1, 2):
        guard.on_step_begin(None, None, None)
        handle.count(8)
        guard.on_step_end(None, SimpleNamespace(global_step=step), None)
    handle.count(8)  # an evaluation's, between two steps
    guard.on_step_begin(None, None, None)
    with pytest.raises(HeadBypassed, match=r"^training step 3 never reached memhead"):
        guard.on_step_end(None, SimpleNamespace(global_step=3), None)
    assert (handle.calls, handle.rows) == (3, 24)


def test_each_check_counts_from_the_one_before():
    handle = Handle("memhead", lambda: None)
    with pytest.raises(HeadBypassed, match="none"):
        handle.expect_calls("none")
    handle.count(1)
    handle.expect_calls("one")
    with pytest.raises(HeadBypassed, match="two"):
        handle.expect_calls("two")


def test_a_run_that_goes_past_the_head_from_its_second_step_on_ends_there(tmp_path, capsys, monkeypatch):
    from trl.trainer import utils

    ended = BypassGuard.on_step_end

    def go_past(self, args, state, control, **kwargs):
        ended(self, args, state, control, **kwargs)
        utils._ChunkedLogProbFunction.apply = memhead_trl._full_apply  # the same numbers, and no one counts

    monkeypatch.setattr(BypassGuard, "on_step_end", go_past)
    assert train_grpo.main(short(tmp_path)) == 1
    assert "error: training step 2 never reached memhead" in capsys.readouterr().err
    folder = RunFolder(tmp_path / "tiny")
    assert [line["step"] for line in folder.metrics.read()] == [0, 1]
    assert folder.read_json("summary.json")["steps"] == 1
    assert folder.read_json("head.json")["calls"] > 0
    assert not folder.final.exists()
    assert not (folder.path / "finished.json").exists()


@pytest.mark.parametrize(("status", "left"), [(0, True), (2, True), (130, True), (1, False)])
def test_the_group_of_processes_is_left_unless_the_others_may_be_anywhere(monkeypatch, status, left):
    ends = []
    monkeypatch.setattr("recipes.processes.end", lambda: ends.append(1))
    monkeypatch.setattr(train_grpo, "_run", lambda *given, **options: status)
    assert train_grpo.train(load_config(CONFIG, TINY)) == status
    assert bool(ends) is left


@pytest.mark.parametrize(
    ("here", "command"),
    [
        ({}, "python train_grpo.py --config a.yaml 'run.name=a b'"),
        ({"LOCAL_WORLD_SIZE": "1"}, "python train_grpo.py --config a.yaml 'run.name=a b'"),
        (
            {"LOCAL_WORLD_SIZE": "4"},
            "torchrun --nproc-per-node 4 train_grpo.py --config a.yaml 'run.name=a b'",
        ),
        ({"LOCAL_WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true"}, "the same command"),
    ],
)
def test_the_command_to_go_on_with_is_the_one_that_began(monkeypatch, here, command):
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    assert train_grpo._command(SimpleNamespace(config="a.yaml", overrides=["run.name=a b"])) == command


@pytest.mark.parametrize(
    ("moment", "said"),
    [
        ("begin", "Stopped before training began; run the same command again."),
        ("optimise", "Stopped at once. "),
    ],
)
def test_a_run_that_is_cut_short_ends_as_ctrl_c_does(tmp_path, monkeypatch, capsys, moment, said):
    def cut_short(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_grpo, "begin", lambda *_, **__: SimpleNamespace(folder=RunFolder(tmp_path)))
    monkeypatch.setattr(train_grpo, moment, cut_short)
    config = load_config(CONFIG, TINY)
    assert train_grpo._run(config, resume=False, command="", pilot=False) == 130
    assert capsys.readouterr().err.startswith(f"\n{said}")


def test_calls_of_all_sessions_are_added_up(tmp_path):
    folder = RunFolder(tmp_path)
    for _ in range(2):
        handle = Handle("full", lambda: None)
        handle.count(3)
        handle.count(4)
        count_calls(handle, folder)
    assert folder.read_json("head.json") == {"impl": "full", "calls": 4, "rows": 14}


# The end of a run


def test_the_model_is_saved_before_the_last_evaluation(tmp_path, capsys, monkeypatch):
    measured = evaluation.evaluator

    def fails_at_the_end(*given):
        measure, calls = measured(*given), []

        def evaluate(**options):
            calls.append(1)
            if len(calls) > 1:
                raise ValueError("the judge has gone home")
            return measure(**options)

        return evaluate

    monkeypatch.setattr(evaluation, "evaluator", fails_at_the_end)
    assert train_grpo.main(short(tmp_path)) == 1
    assert capsys.readouterr().err.strip().endswith("error: the judge has gone home")
    folder = RunFolder(tmp_path / "tiny")
    assert (folder.final / "model.safetensors").is_file()
    assert (folder.final / "tokenizer.json").is_file()
    assert folder.metrics.read()[-1]["step"] == 3
    assert not (folder.path / "finished.json").exists()


def test_a_reward_that_breaks_its_contract_ends_the_run_before_a_folder_is_made(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        Countdown, "correct", lambda self, completions, **_: [float("inf")] * len(completions)
    )
    assert train_grpo.main(short(tmp_path)) == 1
    assert "error: reward correct: returned inf" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


def test_a_reward_that_fails_too_often_ends_the_run(tmp_path, capsys, monkeypatch):
    calls = []

    def fails_later(self, completions, **_):
        calls.append(1)
        if len(calls) > 2:  # the first is the contract's
            raise KeyError("answer")
        return [0.0] * len(completions)

    monkeypatch.setattr(Countdown, "correct", fails_later)
    assert train_grpo.main(short(tmp_path)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        "error: reward correct: failed on 8 of 16 completions, more than task.reward_failures 0.05"
    )
    folder = RunFolder(tmp_path / "tiny")
    assert not folder.final.exists()
    assert folder.metrics.read()[-1]["step"] == 1


# What the trainer gets


@pytest.mark.parametrize("step", ["packed", "trl"])
def test_the_trainer_gets_what_the_session_has(tmp_path, step):
    overrides = [f"step.impl={step}", "task.rewards={correct: 2.0, well_formed: 0.25}", "run.max_bad_steps=7"]
    config = load_config(short(tmp_path)[1], [*short(tmp_path)[2:], *overrides])
    session = train_grpo.begin(config, resume=False)
    with memhead_trl.install():
        trainer = make_trainer(session)
    assert trainer.reward_func_names == ["correct", "well_formed"]
    assert trainer.reward_weights.tolist() == [2.0, 0.25]
    assert trainer.reward_funcs == session.rewards.functions
    assert trainer.train_dataset is session.task.train
    assert trainer.processing_class is session.tokenizer
    assert trainer.model is session.model
    assert trainer.bad_steps._limit == 7
    assert ("Packed" in type(trainer).__name__) == (step == "packed")
    correct = trainer.reward_funcs[0]
    assert (correct._seconds, correct._share) == (10.0, 0.05)


def test_the_reward_is_the_weighted_sum(tmp_path, monkeypatch):
    def even(self, completions, **_):
        return [float(sum(letter in "02468" for letter in text)) for text in completions]

    def length(completions, **_):
        return [float(len(text)) for text in completions]

    monkeypatch.setattr(Countdown, "correct", even)
    monkeypatch.setattr("recipes.tasks.countdown.well_formed", length)
    assert train_grpo.main(short(tmp_path, "task.rewards={correct: 2.0, well_formed: 0.25}")) == 0
    folder = RunFolder(tmp_path / "tiny")
    for line in folder.metrics.read()[1:]:
        rewards = line["rewards"]
        assert rewards["correct"] > 0
        assert rewards["well_formed"] > 0
        expected = 2.0 * rewards["correct"] + 0.25 * rewards["well_formed"]
        assert line["reward"] == pytest.approx(expected, rel=1e-5)
    for line in folder.completions.read():
        text = [line["completion"]]
        assert line["rewards"] == {"correct": even(None, text)[0], "well_formed": length(text)[0]}


def test_accuracy_every_so_many_steps_but_for_the_last():
    found = []
    callback = AccuracyEvery(
        2, lambda: {"accuracy": len(found)}, lambda step, figures: found.append((step, figures))
    )
    for step in range(1, 7):
        control = SimpleNamespace(should_training_stop=step == 6)
        callback.on_step_end(None, SimpleNamespace(global_step=step), control)
    assert found == [(2, {"accuracy": 0}), (4, {"accuracy": 1})]
