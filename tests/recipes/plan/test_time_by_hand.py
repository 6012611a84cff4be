"""The planned seconds of every phase on round numbers, added up by hand: a term or a unit that is off shows."""

from dataclasses import replace
from pathlib import Path

import pytest

from recipes.config.load import load_config
from recipes.plan.formulas import Precision
from recipes.plan.rate import Rate, published
from recipes.plan.setting import Setting
from recipes.plan.shapes import CacheLayer, LayerShape, ModelShape, Trained
from recipes.plan.time import TimePlan, filling_tokens, plan_time
from recipes.plan.work import Flow, Work

CONFIG = Path(__file__).parents[3] / "configs" / "smollm2_135m_char_count.yaml"
SHAPE = ModelShape(
    kind="llama",
    vocab=50_000,
    hidden=1000,
    layers=5,
    positions=4096,
    parameters=1_100_000_000,
    linear=1_000_000_000,
    cache=(CacheLayer(width=400),) * 5,
    layer=LayerShape(intermediate=3000, heads=10, kv_heads=2, head_dim=100),
)
SETTING = Setting(
    shape=SHAPE,
    trained=Trained(adapters=1_000_000, whole=3_000_000, adapted=1_000_000_000, head=False),
    precision=Precision(2, 2),
    lora_rank=8,
    optim="adamw_torch",
    sequences=4,
    sampled=32,
    prompt=1000,
    completion=500,
    generations=4,
    checkpointing=False,
    offloaded=False,
    reference=False,
    head="memhead",
    chunk_rows=None,
    device_type="cuda",
)  # fmt: skip
WORK = Work(1_000_000_000, 1_000_000, 50_000_000, 5000, frozen=True, frozen_head=True)
RATE = Rate(4e14, 2e12)
SPEED = 8e13  # a width of 1,000 reaches a tenth of 8e14 operations a second, and so a fifth of 4e14


def seconds(*overrides, s=SETTING, rate=RATE, lengths=(800, 300), processes=1):
    """Two micro-batches an update, eight a rollout, unless told otherwise."""
    usual = ["grpo.gradient_accumulation_steps=2", "grpo.steps_per_generation=8"]
    usual += [] if any("warm_start" in word for word in overrides) else ["run.warm_start=null"]
    config = load_config(CONFIG, [*usual, *overrides], processes=processes)
    return plan_time(config, s, rate, lengths)


def flow(sequences, shared=False):
    groups = [i // 4 if shared else i for i in range(sequences)]
    return Flow.of_lengths([800] * sequences, [300] * sequences, groups)


def test_the_work_is_that_of_the_model():
    assert Work.of(SHAPE, SETTING.trained) == WORK


def test_arithmetic():
    packed = replace(SETTING, bin_tokens=1_000_000)
    for s, shared in ((SETTING, False), (packed, True)):
        found, whole = seconds(s=s).phases, flow(8, shared)
        assert found["forward and backward"] == pytest.approx(WORK.training(whole) / SPEED)
        twice = seconds(s=replace(s, checkpointing=True)).phases["forward and backward"]
        assert twice == pytest.approx((WORK.training(whole) + WORK.forward(whole)) / SPEED)
        # Without a gradient a fifth faster; three quarters of the windows are later than the first.
        assert found["scoring"] == pytest.approx(
            (0.75 if shared else 1.0) * WORK.forward(whole) / SPEED / 1.2
        )


def test_what_launching_takes():
    """Six milliseconds a layer, forward and backward; a third of it without a backward."""
    small = replace(SETTING, bin_tokens=11)  # 40 tokens, prompts shared, in four bins
    for s, passes in ((SETTING, 2), (small, 4)):
        found = seconds("grpo.beta=0.1", s=s, lengths=(8, 3)).phases
        scored = 0.75 if s is small else 1.0
        assert found["forward and backward"] == pytest.approx(passes * 0.030)
        assert found["scoring"] == pytest.approx((scored + 1.0) * passes * 0.010)


def test_a_cpu():
    s = replace(SETTING, device_type="cpu", trained=replace(SETTING.trained, whole=0))
    found = seconds(s=s, rate=Rate(1e12, 2e10)).phases
    weights = 1_100_000_000 * 2 / 3e9  # of 16 bits, read for every token
    token = 500 * (5 * (0.002 + 32 * 9e-6) + weights)
    assert found["forward and backward"] == pytest.approx(WORK.training(flow(8)) / 6e11)
    assert found["generation"] == pytest.approx((WORK.forward(flow(32, True)) / 6e11 + token) / 4)
    assert found["optimizer"] == pytest.approx(28e6 / 1.4e10)
    assert found["other"] == 0.05
    narrow = replace(s, shape=replace(SHAPE, hidden=256, parameters=1_025_600_000))
    found = seconds(s=narrow, rate=Rate(1e12, 2e10)).phases["forward and backward"]
    assert found == pytest.approx(Work.of(narrow.shape, narrow.trained).training(flow(8)) / 5e11)
    launched = seconds(s=s, rate=Rate(1e30, 2e10)).phases["forward and backward"]
    assert launched == pytest.approx(2 * 0.005)
    evaluated = ["run.evaluation.size=2", "run.evaluation.batch_size=2", "run.evaluation.every=null"]
    run = seconds("grpo.max_steps=10", *evaluated, s=s, rate=Rate(1e12, 2e10))
    look = WORK.forward(flow(2, True)) / 6e11 + 500 * (5 * (0.002 + 2 * 9e-6) + weights)
    assert run.total == pytest.approx(10 * run.step + 2 * look + 20)  # with the process's start


def test_unsloths_layers_are_a_quarter_faster(without_unsloth):
    whole = WORK.training(flow(8))
    path = CONFIG.with_name("llama3.1_8b_gsm8k.yaml")
    config = load_config(path, ["grpo.gradient_accumulation_steps=2", "grpo.steps_per_generation=8"])
    found = plan_time(config, SETTING, RATE, (800, 300)).phases
    assert found["forward and backward"] == pytest.approx(whole / SPEED / 1.25)
    widest = replace(SETTING, shape=replace(SHAPE, hidden=9000))
    work = Work.of(widest.shape, SETTING.trained)
    found = seconds(s=widest).phases["forward and backward"]
    assert found == pytest.approx(work.training(flow(8)) / 4e14 / 0.5)  # half is the most


def test_compiled_layers():
    """1.4 times the share and 4.5 milliseconds a layer where the model trains, a minute to compile; sampling stays."""
    compiled, small = replace(SETTING, compiled=True), replace(SETTING, bin_tokens=11, compiled=True)
    plain, found = seconds(), seconds(s=compiled)
    assert found.phases["forward and backward"] == pytest.approx(WORK.training(flow(8)) / SPEED / 1.4)
    assert found.phases["scoring"] == pytest.approx(WORK.forward(flow(8)) / SPEED / 1.2 / 1.4)
    assert found.phases["generation"] == plain.phases["generation"]
    assert seconds(s=small, lengths=(8, 3)).phases["forward and backward"] == pytest.approx(4 * 0.0225)
    spared = 1200 * (plain.step - found.step)
    assert plain.total - found.total == pytest.approx(spared - 60.0)
    in_full = replace(SETTING, lora_rank=0)
    plain, found = seconds(s=in_full), seconds(s=replace(in_full, compiled=True))
    assert plain.total - found.total == pytest.approx(1200 * (plain.step - found.step) - 30.0)


WEIGHTS = 2_200_000_000 / 1.4e12  # seconds in which they are read, at seven tenths of the bandwidth
KEPT = 32 * 1500 * 2000 * 2 / 1e12  # and the cache of 32 × 1,500 tokens, at half of it


@pytest.mark.parametrize(
    ("bandwidth", "kept", "token"),
    [
        (2e12, False, 0.010 + 5 * 0.0014),
        (2e12, True, 0.005 + KEPT),
        (2e11, True, 10 * WEIGHTS),
        (1e11, False, 20 * WEIGHTS),
    ],
)
def test_transformers_sampling(bandwidth, kept, token):
    """The longest completion's 500 steps; a rollout serves four updates, or eight if each is trained on twice."""
    s, rate = replace(SETTING, kept_cache=kept), Rate(4e14, bandwidth)
    rollout = 500 * token + WORK.forward(flow(32, True)) / SPEED
    assert seconds(s=s, rate=rate).phases["generation"] == pytest.approx(rollout / 4)
    twice = seconds("grpo.num_iterations=2", s=s, rate=rate).phases["generation"]
    assert twice == pytest.approx(rollout / 8)


@pytest.mark.parametrize(
    ("changed", "bandwidth", "rollout"),
    [
        # The host: 77 microseconds a token of the mean completion, 50 where it makes no text.
        ({"sampled": 3200}, 2e12, 3200 * 300 * 77e-6),
        ({"sampled": 3200, "text": False}, 2e12, 3200 * 300 * 50e-6),
        # The device: three milliseconds a step, and the weights read.
        ({}, 2e12, 500 * (0.003 + WEIGHTS)),
        ({}, 2e11, 500 * (0.003 + 10 * WEIGHTS)),
        # In four bits: half a byte and a scale a weight, made two bytes in memory and read again.
        ({"quantised": "4bit"}, 2e11, 500 * (0.003 + (2e8 + 562_500_000 + 4e9) / 1.4e11)),
        ({"quantised": "8bit"}, 2e11, 500 * (0.003 + (2e8 + 1e9) / 1.4e11)),
    ],
)
def test_vllms_sampling(changed, bandwidth, rollout):
    text = changed.get("text", True)
    precision = Precision(2, 2, quantised=changed.get("quantised", ""))
    s = replace(SETTING, sampled=changed.get("sampled", 32), precision=precision)
    told = ["grpo.use_vllm=true", f"grpo.generation_kwargs={{detokenize: {str(text).lower()}}}"]
    told = told if not text else told[:1]
    found = seconds(*told, s=s, rate=Rate(4e14, bandwidth)).phases["generation"]
    assert found == pytest.approx(rollout / 4)


def test_vllm_computes_as_long_as_it_must():
    found = seconds("grpo.use_vllm=true", rate=Rate(4e12, 2e12)).phases["generation"]
    arithmetic = WORK.forward(flow(32, True)) / (4e12 * 0.5)
    assert found == pytest.approx((500 * 0.003 + arithmetic) / 4)


def test_the_optimizer_and_the_rest():
    """Four million trained: weights, gradients, two moments, read, and all but the gradients written; 4 bytes each."""
    found = seconds().phases
    assert found["optimizer"] == pytest.approx(4_000_000 * 28 / 1.4e12)
    assert found["other"] == 0.05


def test_a_whole_run():
    """Ten steps; looks at 14 problems by six before, after four, after eight and at the end; a start of nine steps."""
    told = ["grpo.max_steps=10", "run.evaluation.size=14", "run.evaluation.batch_size=6"]
    every, start = "run.evaluation.every=4", "run.warm_start={steps: 9, batch_size: 6, check_every: 4}"
    six, two = (500 * 0.017 + WORK.forward(flow(count, True)) / SPEED for count in (6, 2))
    look = 2 * six + two
    plain = seconds(*told, "run.evaluation.every=null")
    assert plain.total == pytest.approx(10 * plain.step + 2 * look + 25)
    often, begun = seconds(*told, every), seconds(*told, every, start)
    assert often.total == pytest.approx(plain.total + 2 * look)
    assert begun.total == pytest.approx(often.total + 9 * WORK.training(flow(6)) / SPEED + 2 * look)
    never = seconds(*told, every, start.replace("4}", "null, target_accuracy: null}"))
    assert never.total == pytest.approx(begun.total - 2 * look)
    fitting = seconds(told[0], told[2], "run.evaluation.size=12", "run.evaluation.every=null")
    assert fitting.total == pytest.approx(plain.total - 2 * two)
    # With three samples a problem, of two problems at a time; the start looks without them.
    pass_at_3 = [*told, "run.evaluation.samples=3"]
    more = 7 * six
    often3, begun3 = seconds(*pass_at_3, every), seconds(*pass_at_3, every, start)
    assert often3.total == pytest.approx(often.total + 4 * more)
    assert begun3.total - often3.total == pytest.approx(begun.total - often.total)
    # Four processes complete four problems each; the start's looks are the main one's.
    four, began = seconds(*told, every, processes=4), seconds(*told, every, start, processes=4)
    assert four.total == pytest.approx(
        often.total - 4 * look + 4 * (500 * 0.017 + WORK.forward(flow(4, True)) / SPEED)
    )
    assert began.total - four.total == pytest.approx(begun.total - often.total)
    short = {"lengths": (8, 3)}
    began = seconds(*told, every, start, **short).total - seconds(*told, every, **short).total
    alike = seconds(*told, every, **short).total - seconds(*told, "run.evaluation.every=null", **short).total
    assert began - alike == pytest.approx(9 * 0.030)  # launching decides; and twice the look


def test_tokens_that_fill_a_card():
    """Launching five layers takes 0.03 s, which is to be 15 per cent of the arithmetic, on the fastest card seen."""
    group = Flow.of_lengths([1000] * 4, [500] * 4, [0] * 4)
    token = WORK.training(group) / group.tokens / 8e13
    assert filling_tokens(SETTING) == round(0.030 / 0.15 / token)


@pytest.mark.parametrize(
    ("card", "operations", "bandwidth"),
    [
        ("T4", 65e12, 0.32e12), ("L4", 121e12, 0.30e12), ("4090", 165e12, 1.01e12), ("A100-40", 312e12, 1.56e12),
        ("a100-80", 312e12, 2.04e12), ("H100", 989e12, 3.35e12), ("H200", 989e12, 4.8e12),
    ],
)  # fmt: skip
def test_what_the_makers_publish(card, operations, bandwidth):
    """A second's operations, of which a plain product reaches four fifths, and bytes."""
    found = published(card)
    assert (found.operations, found.bandwidth) == (pytest.approx(0.8 * operations), pytest.approx(bandwidth))
    assert not found.measured


@pytest.mark.parametrize(("hours", "words"), [(1.4, "84 minutes"), (1.5, "1.5 hours"), (12.0, "12.0 hours")])
def test_in_words(hours, words):
    planned = TimePlan({"generation": 3.0, "scoring": 0.0, "optimizer": 0.25}, hours * 3600, 80, 30, RATE)
    assert planned.lines() == [
        f"time: 3.2 s a step (generation 3 s, optimizer 0.25 s); {words} in all, evaluations included",
        "time is planned for mean lengths of 80 + 30 tokens and 400 TFLOP/s (80 % of the published rate); "
        "rewards are not counted",
    ]
    here = replace(planned, total=None, rate=replace(RATE, measured=True)).lines()
    assert here[0] == "time: 3.2 s a step (generation 3 s, optimizer 0.25 s)"
    assert "400 TFLOP/s (measured here)" in here[1]
