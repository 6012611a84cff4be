"""Ratio histograms and the causes of vLLM's mismatch, on real trainers with a stand-in of vLLM."""

from types import SimpleNamespace

import pytest
import torch
from test_truncation import CUT, saved  # noqa: F401 - a fixture
from test_vllm_engine import trainer_of
from trl import GRPOTrainer
from vllm_colocated import vllm_stand_in

from memhead.integrations import trl as memhead_trl
from recipes.report.charts import Bars, charts
from recipes.report.svg import draw
from recipes.tracking.ratios import EDGES, from_logs, labels, outside
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.tracker import track
from recipes.training.importance import Correction, SamplingGap
from recipes.training.packed_step import packed
from recipes.training.ratios import RatioMeter, RoundedHead, measured, rounded_logprobs
from recipes.training.truncation import supported

ALONE = SimpleNamespace(reduce=lambda value, _: value, device=torch.device("cpu"))


def entries(saved, folder, wrap, prepare=lambda llm: None, truncation=None, every=2, **overrides):  # noqa: F811
    with memhead_trl.install(), vllm_stand_in() as made:
        kind = wrap(measured(supported(GRPOTrainer, truncation), every))
        settings = {"max_steps": 4, "per_device_train_batch_size": 64, "learning_rate": 1e-3, **overrides}
        trainer = trainer_of(saved, folder, kind, lora=False, **settings)
        prepare(made[0])
        trainer.train()
        assert memhead_trl.installed().listener is None
    return [from_logs(entry) for entry in trainer.state.log_history if "loss" in entry]


WAYS = pytest.mark.parametrize("wrap", [lambda kind: kind, packed], ids=["trl", "packed"])


@WAYS
def test_a_rounded_head_is_found_out(saved, tmp_path, wrap):  # noqa: F811
    found = entries(saved, tmp_path, wrap, lambda llm: llm.round_head())
    assert ["mismatch" in entry for entry in found] == [True, False, True, False]
    for entry in found[0::2]:
        mismatch = entry["mismatch"]
        assert mismatch["tokens"] > 200
        assert mismatch["mean"] > 1e-3
        assert mismatch["head"] == pytest.approx(mismatch["mean"], rel=0.1)
        assert mismatch["rest"] < 0.1 * mismatch["head"]
        assert mismatch["head_share"] == pytest.approx(1.0, abs=0.05)


@WAYS
def test_another_cause_is_the_rest(saved, tmp_path, wrap):  # noqa: F811
    def disturb(llm):
        llm.llm_engine.model_config.dtype = torch.bfloat16
        llm.base.model.norm.register_forward_hook(lambda m, a, out: out + 0.05 * torch.randn_like(out))

    mismatch = entries(saved, tmp_path, wrap, disturb)[0]["mismatch"]
    assert mismatch["mean"] > 3 * mismatch["head"]
    assert abs(mismatch["head_share"]) < 0.1


@WAYS
def test_histograms_hold_every_token(saved, tmp_path, monkeypatch, wrap):  # noqa: F811
    settings = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "learning_rate": 2e-2}
    take, taken = RatioMeter.take, []
    monkeypatch.setattr(RatioMeter, "take", lambda *given: taken.append(1) or take(*given))
    found = entries(saved, tmp_path, wrap, every=None, per_device_train_batch_size=32, **settings)
    assert len(taken) == len(found) == 4  # of a whole update at once, not the mean of its micro-batches
    assert all("mismatch" not in entry for entry in found)
    for number, entry in enumerate(found):
        assert all(sum(shares) == pytest.approx(1.0) for shares in entry["ratios"].values())
        exact = outside(entry["ratios"]["policy"], 1)
        assert exact == 0.0 if number % 2 == 0 else exact > 0.2  # the second update of a rollout
    assert outside(found[0]["ratios"]["sampler"], 1) == 0.0


def test_truncated_sampling_is_not_taken_apart(saved, tmp_path):  # noqa: F811
    for wrap in (lambda kind: kind, packed):
        found = entries(saved, tmp_path, wrap, truncation=CUT["top_p"], top_p=0.8, max_steps=1)
        assert "mismatch" not in found[0]
        assert "sampler" in found[0]["ratios"]


ENDS = {
    ("token_truncate", 1.0, 3.0): [1.0, 1.0, 3.0, 3.0, 1.0],
    ("token_truncate", None, 1.0): [0.5, 1.0, 1.0, 1.0, 1.0],
    ("token_mask", 1.0, 3.0): [0.0, 1.0, 0.0, 0.0, 1.0],  # a ratio at an end is inside
    ("token_mask", None, 1.0): [0.5, 1.0, 0.0, 0.0, 1.0],
    ("token_mask", 1.0, None): [0.0, 1.0, 4.0, 8.0, 1.0],
    ("sequence_truncate", None, 10.0): [10.0],
    ("sequence_mask", None, 10.0): [0.0],
    ("sequence_mask", None, None): [16.0],
}


@pytest.mark.parametrize(("correction", "expected"), ENDS.items())
def test_importance_ratios_by_hand(correction, expected):
    """Of four tokens, a fifth of which the sampler told nothing, and one of padding."""
    old = torch.tensor([[0.5, 1.0, 4.0, 8.0, 5.0, 7.0]], dtype=torch.float64).log()
    sampled = torch.tensor([[0.0, 0.0, 0.0, 0.0, float("nan"), 0.0]], dtype=torch.float64)
    ratio = Correction(*correction).ratio(old, sampled, torch.tensor([[1, 1, 1, 1, 1, 0]]))
    assert ratio[0, : len(expected)].tolist() == pytest.approx(expected)
    assert ratio.shape[1] == (1 if correction[0].startswith("sequence") else 6)


def test_the_gap_is_over_what_was_added_since_it_was_taken_and_over_all_processes():
    def other(value):  # of a process beside this one, whose figures are three times as large
        return torch.stack([value, 3 * value])

    gap, nan = SamplingGap(), float("nan")
    beside = SimpleNamespace(gather=other)
    assert gap.take(beside) == {}
    for differences, ratios, expected in (
        ([[0.5, nan], [1.5]], [[0.5, 2.0], [3.5]], (2.0, 4.5, 0.5, 4.0, 10.5)),
        ([[nan]], [[1.0]], (0.0, 0.0, 1.0, 2.0, 3.0)),
    ):
        for difference, ratio in zip(differences, ratios, strict=True):
            gap.add(torch.tensor(difference), torch.tensor(ratio))
        assert tuple(gap.take(beside).values()) == pytest.approx(expected)
    assert gap.take(beside) == {}


def test_counts_by_hand():
    meter = RatioMeter()
    ratio = torch.tensor([0.1, 0.85, 0.995, 1.0, 1.005, 1.03, 5.0, float("nan")])
    meter.add("policy", ratio.log())
    meter.add("policy", torch.tensor([1.0]).log())
    (shares,) = from_logs(meter.take(ALONE))["ratios"].values()
    assert dict(zip(labels(), [round(8 * share) for share in shares])) == {
        "< 0.5": 1, "0.5–0.8": 0, "0.8–0.9": 1, "0.9–0.95": 0, "0.95–0.99": 0, "0.99–1.01": 4, "1.01–1.05": 1,
        "1.05–1.1": 0, "1.1–1.25": 0, "1.25–2": 0, "> 2": 1,
    }  # fmt: skip
    assert (outside(shares, 1), outside(shares, 10)) == (4 / 8, 3 / 8)
    assert meter.take(ALONE) == {}
    assert len(labels()) == len(EDGES) + 1


def test_a_token_that_one_of_two_holds_impossible_is_far_off_and_counted():
    meter, inf = RatioMeter(), float("inf")
    meter.add("sampler", torch.tensor([inf, -inf, -inf, 0.0]))
    (shares,) = from_logs(meter.take(ALONE))["ratios"].values()
    assert (shares[0], shares[-1]) == (2 / 4, 1 / 4)


@pytest.mark.parametrize(
    ("ratio", "by_1", "by_10"), [(1.07, 1.0, 0.0), (1.2, 1.0, 1.0), (0.92, 1.0, 0.0), (0.85, 1.0, 1.0)]
)
def test_what_is_outside_of_one_and_of_ten_per_cent(ratio, by_1, by_10):
    meter = RatioMeter()
    meter.add("policy", torch.tensor([ratio]).log())
    (shares,) = from_logs(meter.take(ALONE))["ratios"].values()
    assert (outside(shares, 1), outside(shares, 10)) == pytest.approx((by_1, by_10))


def test_the_parts_add_up():
    meter = RatioMeter(every=10)
    whole, head = torch.randn(500), torch.randn(500)
    whole[7] = float("nan")
    meter.add_mismatch(whole, head)
    found = from_logs(meter.take(ALONE))["mismatch"]
    known = ~whole.isnan()
    a, h = whole[known].double(), head[known].double()
    assert found["head_share"] == pytest.approx(float((a * h).sum() / (a * a).sum()))
    assert found["head_share"] + float((a * (a - h)).sum() / (a * a).sum()) == pytest.approx(1.0)
    assert (found["tokens"], found["rest"]) == (499, pytest.approx(float((a - h).abs().mean())))


def test_when_it_is_due():
    meter = RatioMeter(every=10)
    due = []
    for step in (0, 4, 8, 12, 20, 24):
        meter.begin_rollout(step)
        due.append(meter.due)
    assert due == [True, False, False, True, False, True]


def test_a_rounded_head_against_plain_logits():
    hidden, weight, bias = torch.randn(2500, 16), torch.randn(40, 16), torch.randn(40)
    targets = torch.randint(40, (2500,))
    found = rounded_logprobs(
        hidden, weight, bias, targets, torch.bfloat16, temperature=0.7, softcap=5.0, logit_scale=1.2
    )
    logits = (hidden.bfloat16() @ weight.bfloat16().T + bias.bfloat16()).float() * 1.2
    logits = 5.0 * torch.tanh(logits / 5.0) / 0.7
    torch.testing.assert_close(found, logits.log_softmax(1).gather(1, targets[:, None])[:, 0])


def test_of_a_quantised_head_nothing_is_told():
    listener, hidden, targets = (
        RoundedHead(torch.bfloat16),
        torch.randn(3, 4),
        torch.zeros(3, dtype=torch.long),
    )
    options = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0}
    for dtype, calls in ((torch.int8, 0), (torch.uint8, 0), (torch.float16, 1)):
        listener(hidden, torch.ones(5, 4).to(dtype), None, targets, **options)
        assert len(listener.found) == calls


def test_in_the_record_and_the_report(saved, tmp_path):  # noqa: F811
    folder = RunFolder.create(tmp_path, "run")
    with memhead_trl.install(), vllm_stand_in() as made:
        trainer = trainer_of(
            saved, tmp_path, packed(measured(GRPOTrainer, 1)), lora=False, learning_rate=1e-3
        )
        made[0].round_head()
        tracker = track(trainer, folder, progress=False)
        trainer.train()
        tracker.close()
    records = folder.metrics.read()
    assert all(set(record["ratios"]) == {"policy", "sampler"} for record in records)
    assert not any(name.startswith(("ratios/", "mismatch/")) for record in records for name in record["trl"])
    found = {chart.title: chart for chart in charts({"run": records})}
    bars = found["Ratios, sampler"]
    assert isinstance(bars, Bars)
    assert list(bars.shares) == ["step 1", "step 3"]
    assert bars.shares["step 1"] == records[0]["ratios"]["sampler"]
    assert [line.name for line in found["Difference from vLLM"].lines] == ["all", "head", "rest"]
    drawn = draw(bars, "chart0")
    assert "0.99–1.01" in drawn
    assert "step 3" in drawn
