"""The warm start, greedy evaluation and the head's check, on a model of a few thousand parameters."""

import math
from types import SimpleNamespace

import pytest
import torch

from recipes.config.schema import ModelConfig, ScratchConfig, WarmStartConfig
from recipes.models import load as models
from recipes.models.generation import Sampling, by_transformers
from recipes.models.precision import Precision
from recipes.models.tokenizers import character_tokenizer
from recipes.tasks.countdown import Countdown
from recipes.training.evaluation import complete, greedy_figures
from recipes.training.head_check import check_head
from recipes.training.warm_start import IGNORED, _Gradient, collate, rate_share, warm_start

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


def test_a_batch_that_does_not_fit_is_cut_with_the_same_gradient(loaded, capsys):
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
            raise torch.OutOfMemoryError
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

    def forward(self, **batch):
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
