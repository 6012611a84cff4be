"""The warm start, greedy evaluation and the head's check, on a model of a few thousand parameters."""

import itertools
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_quickstart import CONFIG as CONFIG_FILE
from test_quickstart import TINY
from transformers import AutoModelForCausalLM

import train_grpo
from recipes.config.load import load_config
from recipes.config.schema import ModelConfig, ScratchConfig, WarmStartConfig
from recipes.models import load as models
from recipes.models.generation import Sampling, by_transformers
from recipes.models.precision import Precision
from recipes.models.tokenizers import character_tokenizer
from recipes.tasks.countdown import Countdown
from recipes.training.evaluation import complete, greedy_figures
from recipes.training.finite import Diverged
from recipes.training.head_check import check_head
from recipes.training.trainer import head_of_warm_start
from recipes.training.warm_start import IGNORED, _batches, _Gradient, collate, rate_share, warm_start

TASK = Countdown(Countdown.Options(), 0)
CONFIG = ModelConfig(loader="scratch", scratch=ScratchConfig(hidden_size=32, layers=2, intermediate_size=64))
EXAMPLES = [("111>03=", "1+1+1"), ("222>06=", "2+2+2"), ("333>09=", "3+3+3"), ("444>12=", "4+4+4")]


@pytest.fixture
def loaded():
    return models.load(CONFIG, TASK, seed=0)


def settings(**changes):
    given = {"steps": 5, "target_accuracy": None, "batch_size": 4, "learning_rate": 1e-2, "check_every": 5}
    return WarmStartConfig(**(given | changes))


def test_loss_is_taken_on_the_completion_and_its_end_alone():
    tokenizer = character_tokenizer(TASK.characters)
    batch = collate(tokenizer, [("111>03=", "1+1+1"), ("1>", "1")])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, 13)
    kept = batch["labels"][0][batch["labels"][0] != IGNORED]
    assert tokenizer.decode(kept) == "1+1+1<eos>"
    assert tokenizer.decode(batch["labels"][1][batch["labels"][1] != IGNORED]) == "1<eos>"
    assert batch["attention_mask"][1].sum() == 4


def test_it_learns_what_it_is_shown_and_stops_at_the_target(loaded):
    model, tokenizer = loaded
    rows = [{"prompt": p, "numbers": [int(p[0])] * 3, "target": int(p[4:6])} for p, _ in EXAMPLES]

    def probe():
        answers = complete(by_transformers(model, tokenizer), rows, Sampling(6))
        return greedy_figures(TASK, [texts[0] for texts in answers], rows)["accuracy"]

    result = warm_start(
        model,
        tokenizer,
        EXAMPLES,
        settings(steps=200, target_accuracy=1.0, check_every=10),
        precision=Precision(),
        probe=probe,
    )
    assert result.accuracy == probe() == 1.0
    assert result.steps < 200
    assert result.examples == result.steps * 4


def test_without_a_target_every_step_is_taken_and_reported(loaded):
    seen = []
    result = warm_start(
        *loaded,
        EXAMPLES,
        settings(),
        precision=Precision(),
        probe=lambda: 1.0,
        on_step=seen.append,
    )
    assert result.steps == 5
    assert [taken.step for taken in seen] == [1, 2, 3, 4, 5]
    assert [taken.learning_rate for taken in seen] == pytest.approx(
        [1e-2 / 20 * 0.8, 1e-2 / 10 * 0.6, 1e-2 * 0.15 * 0.4, 1e-2 * 0.2 * 0.2, 1e-2 * 0.25 * 0.05]
    )
    assert all(math.isfinite(taken.loss) for taken in seen)
    assert [taken.accuracy for taken in seen] == pytest.approx([math.nan] * 4 + [1.0], nan_ok=True)


@pytest.mark.parametrize(
    ("step", "share"),
    [(1, 0.5 * 0.9779754), (2, 0.9140576), (5, 0.55), (10, 0.1)],  # 0.1 + 0.45 (1 + cos(pi step / 10))
)
def test_the_rate_may_fall_as_a_cosine(step, share):
    cosine = settings(steps=10, schedule="cosine", warmup_steps=2, final_rate=0.1)
    assert rate_share(step, cosine) == pytest.approx(share, rel=1e-6)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def on_a_card():
    raise torch.OutOfMemoryError


def by_python():
    raise MemoryError


@pytest.mark.parametrize(
    "fails",
    [on_a_card, lambda: torch.empty(2**50), by_python],
    ids=["card", "a real one on a CPU", "Python's own"],
)
def test_a_batch_that_does_not_fit_is_cut_with_the_same_gradient(loaded, capsys, fails):
    model, tokenizer = loaded
    model.double()
    batch = collate(tokenizer, [*EXAMPLES, ("1>", "1"), ("22>", "2+2")])  # rows of unequal length
    whole = _Gradient(model, Precision())
    expected = whole(batch)
    wanted = gradients(model)
    model.zero_grad()

    forward = model.forward

    def cramped(**rows):
        if len(rows["input_ids"]) > 2:
            fails()
        return forward(**rows)

    model.forward = cramped
    cut = _Gradient(model, Precision())
    assert cut(batch) == pytest.approx(expected, rel=1e-6)  # transformers takes the loss in float32
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-8)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "warm start: 6 rows at a time do not fit, going on with 3",
        "warm start: 3 rows at a time do not fit, going on with 1",
    ]
    cut(batch)
    assert capsys.readouterr().out == ""  # it remembers
    model.forward = lambda **rows: (_ for _ in ()).throw(torch.OutOfMemoryError("none left"))
    with pytest.raises(torch.OutOfMemoryError):
        cut(batch)


def test_a_batch_that_fails_otherwise_is_not_cut(loaded, capsys):
    model, tokenizer = loaded
    batch = collate(tokenizer, EXAMPLES)
    batch["input_ids"] = batch["input_ids"][:, :-1]  # labels of another length
    with pytest.raises((ValueError, RuntimeError), match="size"):
        _Gradient(model, Precision())(batch)
    assert capsys.readouterr().out == ""


def test_it_computes_in_the_precision_of_the_run(loaded):
    model, tokenizer = loaded
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for precision in (Precision(), Precision(torch.bfloat16)):
        warm_start(model, tokenizer, EXAMPLES, settings(steps=1), precision=precision, probe=lambda: 0.0)
    assert seen == [torch.float32, torch.bfloat16]


class Elsewhere(torch.nn.Module):
    """A model on a device that this machine lacks: like a model on a GPU, it refuses tensors from elsewhere."""

    device = torch.device("meta")

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, *, use_cache, **batch):
        assert not use_cache  # which would hold every layer's keys and values for nothing
        assert {tensor.device.type for tensor in batch.values()} == {"meta"}
        return SimpleNamespace(loss=self.weight.square().sum())


def test_the_batch_goes_to_the_models_device():
    tokenizer = character_tokenizer(TASK.characters)
    result = warm_start(
        Elsewhere(), tokenizer, EXAMPLES, settings(steps=2), precision=Precision(), probe=lambda: 0.0
    )
    assert result.steps == 2
    assert result.loss < 2.0  # 1 + 1 before the first step


def test_a_batch_larger_than_the_examples_is_an_error(loaded):
    with pytest.raises(ValueError, match="batch_size: 5"):
        warm_start(*loaded, EXAMPLES, settings(batch_size=5), precision=Precision(), probe=lambda: 0.0)


def test_evaluation_keeps_mode_and_random_state(loaded):
    model, tokenizer = loaded
    rows = [{"prompt": prompt} for prompt in ("111>03=", "2>", "333>09=")]
    model.train()
    state = torch.get_rng_state()
    generate = by_transformers(model, tokenizer)
    together = complete(generate, rows, Sampling(4))
    singly = complete(generate, rows, Sampling(4), batch_size=1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert together == singly  # padding of the short prompt changes nothing


def test_evaluation_of_nothing_is_an_error(loaded):
    with pytest.raises(ValueError, match="rows"):
        complete(by_transformers(*loaded), [], Sampling(4))


@pytest.mark.parametrize(
    ("attribute", "value", "scale"),
    [("lm_head_multiplier", 0.5, 0.5), ("logit_scale", 0.25, 0.25), ("logits_scaling", 4.0, 0.25)],
)
def test_head_check_scales_logits_as_the_architecture_does(loaded, attribute, value, scale):
    """Falcon-H1, Cohere and Granite, by the names in their configurations."""
    model, tokenizer = loaded
    setattr(model.config, attribute, value)
    found = check_head(model, tokenizer, ["357>26="])
    assert found["logit_scale"] == scale
    assert found["passed"]


def test_head_check_passes_and_finds_a_wrong_head(loaded, monkeypatch):
    model, tokenizer = loaded
    found = check_head(model, tokenizer, ["357>26=", "12>"], temperature=0.7)
    assert found["passed"]
    assert found["rows"] == 6 + 2
    assert found["memhead"]["logprob_error"] < 1e-5

    from recipes.training import head_check as headcheck

    right = headcheck.linear_logprobs
    monkeypatch.setattr(headcheck, "linear_logprobs", lambda *a, **k: right(*a, **(k | {"temperature": 1.0})))
    assert not check_head(model, tokenizer, ["357>26="], temperature=0.7)["passed"]


# What the optimizer does, seen at its own step


class Slope(torch.nn.Module):
    """A model whose gradient is known: `steep` in each of two weights."""

    device = torch.device("cpu")

    def __init__(self, steep):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.steep = steep

    def forward(self, **batch):
        return SimpleNamespace(loss=self.steep * self.weight.sum())


@pytest.fixture
def steps_taken(monkeypatch):
    """What each AdamW was made with, and at each of its steps the rate and the norm of the gradient."""
    made, taken = [], []

    class Watched(torch.optim.AdamW):
        def __init__(self, parameters, **options):
            made.append(options)
            super().__init__(parameters, **options)

        def step(self, closure=None):
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norm = float(torch.cat([g.flatten() for g in gradients]).norm())
            taken.append((self.param_groups[0]["lr"], norm))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    return made, taken


def start(model, settings, **given):
    tokenizer = character_tokenizer(TASK.characters)
    options = {"precision": Precision(), "probe": lambda: 0.0, **given}
    return warm_start(model, tokenizer, EXAMPLES, settings, **options)


def test_the_rate_that_is_reported_is_the_one_that_is_taken(steps_taken):
    reported = []
    changed = {"steps": 4, "warmup_steps": 2, "weight_decay": 0.03, "adam_beta2": 0.95, "final_rate": 0.1}
    start(Slope(0.1), settings(**changed), on_step=reported.append)
    made, taken = steps_taken
    assert made == [{"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.03}]
    # half of the way up, then down along 1 - step / 4, but not below a tenth
    assert [rate for rate, _ in taken] == pytest.approx([5e-3 * 0.75, 1e-2 * 0.5, 1e-2 * 0.25, 1e-2 * 0.1])
    assert [step.learning_rate for step in reported] == [rate for rate, _ in taken]


@pytest.mark.parametrize(("steep", "norm"), [(100.0, 1.0), (0.5, 0.5 * 2**0.5)])
def test_a_gradient_longer_than_one_is_clipped_and_no_other(steps_taken, steep, norm):
    start(Slope(steep), settings(steps=2))
    assert [found for _, found in steps_taken[1]] == pytest.approx([norm] * 2, rel=1e-5)


def test_gradients_are_not_added_up_from_step_to_step(steps_taken):
    start(Slope(0.25), settings(steps=4))
    assert [found for _, found in steps_taken[1]] == pytest.approx([0.25 * 2**0.5] * 4)


def test_frozen_weights_are_left_out(loaded, steps_taken):
    model, tokenizer = loaded
    model.get_input_embeddings().weight.requires_grad_(False)
    before = model.get_input_embeddings().weight.clone()
    warm_start(model, tokenizer, EXAMPLES, settings(steps=2), precision=Precision(), probe=lambda: 0.0)
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize(
    ("steps", "every", "looked"),
    [(7, 3, [3, 6, 7]), (6, 3, [3, 6]), (2, 25, [2]), (1, 1, [1]), (3, None, [])],
)
def test_the_accuracy_is_looked_at_now_and_then_and_at_the_end(steps, every, looked):
    seen, reported = [], []

    def probe():
        seen.append(len(reported) + 1)
        return len(seen) / 10

    result = start(Slope(0.1), settings(steps=steps, check_every=every), probe=probe, on_step=reported.append)
    assert seen == looked
    assert result.accuracy == pytest.approx(len(looked) / 10 if looked else math.nan, nan_ok=True)
    assert (result.steps, result.examples) == (steps, 4 * steps)
    assert result.loss == reported[-1].loss
    last = 0
    for step in reported:  # between two looks the last one stands
        last += step.step in looked
        assert step.accuracy == last / 10 or (last == 0 and math.isnan(step.accuracy))


@pytest.mark.parametrize(("target", "steps"), [(0.2, 4), (0.21, 6), (1.0, 10), (None, 10)])
def test_it_stops_at_the_look_that_reaches_the_target(target, steps):
    looks = iter([0.1, 0.2, 0.3, 0.4, 0.5])
    changed = settings(steps=10, check_every=2, target_accuracy=target)
    assert start(Slope(0.1), changed, probe=lambda: next(looks)).steps == steps


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        ({"warmup_steps": 0, "final_rate": 0.0}, [0.75, 0.5, 0.25, 0.0]),
        ({"warmup_steps": 0, "final_rate": 0.5}, [0.75, 0.5, 0.5, 0.5]),
        ({"warmup_steps": 1, "final_rate": 0.0}, [0.75, 0.5, 0.25, 0.0]),
        ({"warmup_steps": 8, "final_rate": 0.0}, [0.75 / 8, 0.5 / 4, 0.25 * 3 / 8, 0.0]),
        ({"warmup_steps": 0, "final_rate": 0.2, "schedule": "cosine"}, [0.882843, 0.6, 0.317157, 0.2]),
        ({"warmup_steps": 4, "final_rate": 0.0, "schedule": "cosine"}, [0.213388, 0.25, 0.109835, 0.0]),
    ],
)
def test_every_share_of_the_peak_by_hand(changes, shares):
    found = [rate_share(step, settings(steps=4, **changes)) for step in range(1, 5)]
    assert found == pytest.approx(shares, abs=1e-6)


def test_examples_come_in_their_order_from_the_start_again_and_whole_batches_alone():
    def collated(examples):
        return [prompt for prompt, _ in examples]

    examples = [(letter, "") for letter in "abcde"]
    assert list(itertools.islice(_batches(collated, examples, 2), 5)) == [
        ["a", "b"],
        ["c", "d"],
        ["a", "b"],
        ["c", "d"],
        ["a", "b"],
    ]
    assert list(itertools.islice(_batches(collated, examples, 5), 2)) == [list("abcde")] * 2


def test_steps_that_are_not_finite_are_skipped_and_end_it_when_in_a_row(steps_taken):
    class Broken(Slope):
        calls = 0

        def forward(self, **batch):
            type(self).calls += 1
            return SimpleNamespace(loss=self.weight.sum() * (math.nan if self.calls in (2, 4, 5) else 0.1))

    model = Broken(0.1)
    with pytest.raises(Diverged, match="2 steps in a row were not finite"):
        start(model, settings(steps=9), max_bad_steps=2)
    assert model.calls == 5
    assert len(steps_taken[1]) == 2  # the first and the third
    assert model.weight.isfinite().all()
    model = Slope(math.nan)
    with pytest.raises(Diverged, match="3 steps in a row were not finite"):
        start(model, settings(steps=9))  # three, unless told otherwise


@pytest.mark.parametrize(("loss", "norm"), [(math.inf, 0.1), (1.0, math.inf)], ids=["loss", "gradient"])
def test_either_of_loss_and_gradient_may_be_what_is_not_finite(steps_taken, capsys, loss, norm):
    class Broken(Slope):
        def forward(self, **batch):
            self.weight.register_hook(lambda gradient: gradient * norm)
            return SimpleNamespace(loss=loss + self.weight.sum() - self.weight.detach().sum())

    with pytest.raises(Diverged, match="2 steps in a row"):
        start(Broken(0.1), settings(steps=9), max_bad_steps=2)
    assert not steps_taken[1]
    assert capsys.readouterr().out.startswith(f"warm start, step 1: the loss is {loss}, the gradient norm ")


class Ticking:
    """A second passes between any two looks."""

    now = 100.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


def test_a_warm_start_that_never_looks_says_no_accuracy(tmp_path, capsys):
    given = [
        "run.warm_start.steps=2",
        "run.warm_start.check_every=null",
        "run.warm_start.target_accuracy=null",
    ]
    kept = [setting for setting in TINY if not setting.startswith("run.warm_start.steps")]
    session = train_grpo.begin(
        load_config(CONFIG_FILE, [*kept, f"run.output_root={tmp_path}", *given]), resume=False
    )
    assert session.folder.read_json("warm_start.json")["accuracy"] is None
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("warm start  step")]
    assert line.split()[2:5] == ["step", "2", "loss"]
    assert "accuracy" not in line


def test_a_runs_warm_start_is_recorded_saved_and_where_adapters_look_for_their_base(
    tmp_path, capsys, monkeypatch
):
    """Greedy alone, whatever the run's own evaluation samples; and not a second time when the run is resumed."""
    given = ["run.warm_start.steps=5", "run.warm_start.check_every=2", "run.evaluation.samples=3"]
    kept = [setting for setting in TINY if not setting.startswith("run.warm_start.steps")]
    config = load_config(CONFIG_FILE, [*kept, f"run.output_root={tmp_path}", *given])
    monkeypatch.setattr("recipes.training.warm_start.time", Ticking())
    monkeypatch.delattr("recipes.training.warm_start.load")  # the process that trains has the model already
    session = train_grpo.begin(config, resume=False)
    place = tmp_path / "tiny"
    lines = [line["warm_start"] for line in session.folder.metrics.read()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    found = session.folder.read_json("warm_start.json")
    assert found.pop("seconds") == 3.0  # looked at for each of the two lines that are printed, and at the end
    assert found == {
        "steps": 5,
        "examples": 5 * 8,
        "accuracy": lines[-1]["accuracy"],
        "loss": lines[-1]["loss"],
    }
    assert lines[-1]["accuracy"] is not None
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warm start  step")]
    assert [line.split()[3] for line in printed] == ["2", "4"]
    saved = AutoModelForCausalLM.from_pretrained(place / "warm_start")
    for name, weight in session.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], weight)
    assert session.model.name_or_path == str((place / "warm_start").resolve())


def test_the_head_of_a_warm_start_is_the_runs(loaded, monkeypatch):
    from memhead.integrations import transformers as memhead_transformers

    given = []
    monkeypatch.setattr(
        memhead_transformers, "patch", lambda model, **options: given.append(options) or nullcontext()
    )
    for impl, loader in (("memhead", "scratch"), ("full", "scratch"), ("memhead", "unsloth")):
        config = SimpleNamespace(
            head=SimpleNamespace(impl=impl, chunk=7, backend="torch"), model=SimpleNamespace(loader=loader)
        )
        with head_of_warm_start(config, loaded[0]):
            pass
    assert given == [{"chunk": 7, "backend": "torch"}]
