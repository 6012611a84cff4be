"""The planned time against what benchmarks/results holds of measured runs on an H100."""

import json
import re
import string
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recipes.config.load import load_config
from recipes.models.prompts import prompt_lengths
from recipes.models.tokenizers import character_tokenizer
from recipes.plan.plan import CARDS, GIB, in_bins, plan
from recipes.plan.rate import _SIZES, Rate, matrix_rate, published
from recipes.plan.setting import Setting
from recipes.plan.show import parse_lengths, show
from recipes.plan.time import TimePlan, plan_time
from recipes.problems import ConfigError

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
H100 = Rate(8e14, 3.35e12)  # as measured: benchmarks/results/gpu_log.md
WITHIN = 0.2


def setting(model, bins=None, **grpo):
    overrides = [f"model.name={model}", "lora.r=16", *(f"grpo.{key}={value}" for key, value in grpo.items())]
    overrides.append("model.compile_layers=false")
    config = load_config(ROOT / "configs" / "llama3.2_1b_gsm8k.yaml", overrides)
    return config, in_bins(config, Setting.of(config, device=True), bins)


def measured(file, **wanted):
    rows = json.loads((RESULTS / file).read_text())["rows"]
    (row,) = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return row


@pytest.mark.parametrize(
    ("shape", "groups", "lengths"), [("256+256", 16, (256, 256)), ("gsm8k", 16, (206, 202))]
)
def test_a_packed_window_of_the_1b_model(shape, groups, lengths):
    """Forward and backward of one accumulation window, LoRA, planned bins."""
    row = measured(
        "packed_planned_h100.json", model="llama-1b", shape=shape, budget=16384, head="memhead", zeros=0.0
    )
    config, s = setting(
        "unsloth/Llama-3.2-1B-Instruct",
        16_384,
        gradient_accumulation_steps=groups,
        steps_per_generation=groups,
    )
    s = replace(s, checkpointing=False)
    planned = plan_time(config, s, H100, lengths)
    assert planned.phases["forward and backward"] == pytest.approx(row["seconds"], rel=WITHIN)


def test_vllm_of_smollm2():
    row = next(
        r
        for r in json.loads((RESULTS / "generation_h100.json").read_text())["a"]["rows"]
        if r["sampling"] == "no text"
    )
    config = load_config(
        ROOT / "configs" / "smollm2_135m_char_count_published.yaml",
        ["grpo.use_vllm=true", "grpo.generation_kwargs={detokenize: false}"],
    )
    planned = plan_time(config, Setting.of(config, device=True), H100, (40, 128))
    assert planned.phases["generation"] * 8 == pytest.approx(
        row["seconds"], rel=WITHIN
    )  # eight updates a rollout


@pytest.mark.parametrize(("cache", "generation", "rest"), [("static", 1.49, 2.12), ("null", 6.9, 3.0)])
def test_a_rollout_of_smollm2(cache, generation, rest):
    """benchmarks/results/char_count_h100.md: by transformers, as one graph a token or launch by launch."""
    path = ROOT / "configs" / "smollm2_135m_char_count_published.yaml"
    config = load_config(path, [f"grpo.cache_implementation={cache}"])
    setting = in_bins(config, Setting.of(config, device=True), 16_384)
    planned = plan_time(config, setting, H100, (62, 70))
    assert planned.phases["generation"] * 8 == pytest.approx(generation, rel=WITHIN)
    assert planned.step * 8 == pytest.approx(rest + generation, rel=WITHIN)


@pytest.mark.parametrize(("place", "name"), enumerate(["llama3.1_8b_gsm8k", "llama3.1_8b_gsm8k_16bit"]))
def test_a_step_under_unsloth_and_vllm(without_unsloth, place, name):
    """benchmarks/results/flagship_h100.md: the third step, the first two compile."""
    run = json.loads((RESULTS / "flagship_h100.json").read_text())["runs"][place]
    assert Path(run["config"]).stem == name
    seconds = run["steps"][2]["time"]
    config = load_config(ROOT / "configs" / f"{name}.yaml", ["step.impl=trl"])
    planned = plan_time(config, Setting.of(config, device=True), H100, (108, 768)).phases
    assert planned["generation"] == pytest.approx(seconds["generation"], rel=WITHIN)
    assert planned["forward and backward"] == pytest.approx(
        seconds["forward"] + seconds["backward"], rel=WITHIN
    )


def test_the_padded_step_of_the_8b_model():
    """benchmarks/results/step_h100.md, TRL and transformers, memhead: one sequence of 16,384 tokens."""
    page = (RESULTS / "step_h100.md").read_text()
    scoring, forward, backward = map(float, re.search(
        r"\| 1 × 16384 \| \*\*memhead\*\* \| ([\d.]+) s .*?\| ([\d.]+) s .*?\| ([\d.]+) s", page).groups())  # fmt: skip
    config, s = setting(
        "unsloth/meta-Llama-3.1-8B-Instruct", None, per_device_train_batch_size=2, num_generations=2,
        gradient_accumulation_steps=1, max_completion_length=512, beta=0.01,
    )  # fmt: skip
    s = replace(s, sequences=1, generations=1, checkpointing=True)
    padded = [
        "step.impl=trl",
        "model.compile_layers=false",
        "grpo.beta=0.01",
        "grpo.gradient_accumulation_steps=1",
    ]
    config = load_config(ROOT / "configs" / "llama3.2_1b_gsm8k.yaml", padded)
    planned = plan_time(config, replace(s, bin_tokens=None), H100, (128, 16384)).phases
    assert planned["forward and backward"] == pytest.approx(forward + backward, rel=WITHIN)
    assert planned["scoring"] == pytest.approx(scoring, rel=WITHIN)


def test_the_rate_is_that_of_the_best_round(monkeypatch):
    def read():
        reads.append(clock[0])
        clock[0] += next(seconds) if len(reads) % 2 else 100.0  # what lies between two rounds is not counted
        return reads[-1]

    reads, clock, seconds = [], [0.0], iter([2.0, 0.5, 1.0])
    monkeypatch.setattr("recipes.plan.rate.time", SimpleNamespace(perf_counter=read))
    monkeypatch.setitem(_SIZES, "cpu", 64)
    assert matrix_rate(torch.device("cpu"), torch.float32) == 2 * 64**3 / 0.5


@pytest.mark.parametrize(
    ("seconds", "total", "step", "whole"),
    [
        (9.5e-6, 17.0, "below 0.0001 s", "17 seconds"),
        (0.00123, 91.0, "0.0012 s", "2 minutes"),
        (2.0e6, 7200.0, "2000000 s", "2.0 hours"),
    ],
)
def test_a_very_short_and_a_very_long_time_in_words(seconds, total, step, whole):
    (said, _) = TimePlan({"optimizer": seconds}, total, 7, 6, H100).lines()
    assert said == f"time: {step} a step (optimizer {step}); {whole} in all, evaluations included"


def test_hours_grow_with_steps_and_evaluations():
    def total(*overrides):
        config = load_config(ROOT / "configs" / "smollm2_135m_char_count_published.yaml", overrides)
        return plan_time(config, Setting.of(config, device=True), H100)

    assert total("grpo.max_steps=560").total < total().total
    for vllm, start in (("false", 25 + 46 + 30), ("true", 25 + 100 + 30)):  # seconds until the first step
        by = (f"grpo.use_vllm={vllm}", "run.warm_start=null")
        ends, often = total(*by, "run.evaluation.every=null"), total(*by, "run.evaluation.every=40")
        look = (often.total - ends.total) / 27  # after 40, 80, … 1080 of 1,120 steps
        assert look > 0
        assert ends.total == pytest.approx(1120 * ends.step + 2 * look + start)
    assert total("grpo.max_steps=-1", "grpo.num_train_epochs=1").total is None


@pytest.mark.parametrize(
    ("impl", "settings", "passes"),
    [
        ("trl", {}, 0.0),
        ("trl", {"beta": 0.04}, 1.0),  # the reference's
        ("trl", {"num_iterations": 2}, 0.5),  # one of the old policy serves two updates
        ("trl", {"num_iterations": 2, "beta": 0.04}, 1.0),
        ("trl", {"steps_per_generation": 8}, 1.0),
        ("packed", {"beta": 0.04}, 1.0),
        ("packed", {"num_iterations": 2, "beta": 0.04}, 0.5),
        ("packed", {"steps_per_generation": 8}, 0.5),  # of the later half alone
        ("packed", {"steps_per_generation": 8, "num_iterations": 2}, 0.25),
    ],
)
def test_how_often_a_steps_tokens_are_scored(impl, settings, passes):
    path = ROOT / "configs" / "smollm2_135m_char_count.yaml"

    def scoring(**grpo):
        given = {"gradient_accumulation_steps": 4, "steps_per_generation": 4, "num_iterations": 1, **grpo}
        config = load_config(
            path, [f"step.impl={impl}", *(f"grpo.{key}={value}" for key, value in given.items())]
        )
        setting = in_bins(config, Setting.of(config, device=True), 16_384)
        return plan_time(config, setting, H100, (60, 71)).phases["scoring"]

    assert scoring(**settings) == pytest.approx(passes * scoring(beta=0.04))


def test_a_whole_run_of_smollm2():
    """benchmarks/results/char_count_h100.md: 10.7 minutes with the supervised start and three evaluations."""
    path = ROOT / "configs" / "smollm2_135m_char_count_published.yaml"

    looked = "run.warm_start.check_every=140"  # as that run did

    def planned(start=looked, every=560):
        config = load_config(path, [f"run.evaluation.every={every}", "model.compile_layers=false", start])
        setting = in_bins(config, Setting.of(config, device=True), 16_384)
        return plan_time(config, setting, H100, (62, 70))

    whole, without = planned(), planned("run.warm_start=null")
    assert whole.total == pytest.approx(10.7 * 60, rel=0.1)
    # The log's 50 s have compiling in them, which the plan counts before the first step: so it is below, by half of it.
    assert whole.total - without.total == pytest.approx(50, rel=0.5)
    look = (planned(every=280).total - whole.total) / 2
    assert whole.total - without.total == pytest.approx(
        140 * 30 * 0.006 + look
    )  # 6 ms a layer: launching decides
    assert without.total - 1120 * without.step > 46  # seconds until the first step


@pytest.mark.parametrize(
    ("overrides", "seconds", "rollout"),
    [(["run.evaluation.every=160", "run.warm_start.check_every=140"], 624, 3.05), ([], 595, 3.02)],
)
def test_a_whole_run_with_compiled_layers(overrides, seconds, rollout):
    """benchmarks/results/char_count_h100.md, on H200s: the whole runs, and a rollout of eight updates in the mean."""
    path = ROOT / "configs" / "smollm2_135m_char_count_published.yaml"
    config = load_config(path, overrides)
    planned = plan_time(config, plan(config, 141 * GIB).setting, Rate(8.09e14, 4.8e12), (62, 70))
    assert planned.total == pytest.approx(seconds, rel=0.1)
    assert 8 * planned.step == pytest.approx(rollout, rel=0.1)
    assert 8 * planned.phases["forward and backward"] == pytest.approx(0.50 + 0.46, rel=WITHIN)


LONG = ["model.max_seq_length=8704", "grpo.max_completion_length=8192"]
BY_VLLM = ["grpo.use_vllm=true", "grpo.vllm_mode=colocate", "grpo.cache_implementation=null"]
PLAIN = ["model.compile_layers=false"]
TRAINING = ("scoring", "forward and backward")
ROLLOUT = {
    "smollm2_135m_char_count_published": 8,
    "smollm2_135m_char_count": 4,
}  # updates of one, the row's unit


@pytest.mark.parametrize(
    ("name", "overrides", "card", "lengths", "phases", "told"),
    [
        ("llama3.1_8b_gsm8k", [], "H200", (108, 768), ("generation",), "10.0"),
        ("llama3.1_8b_gsm8k_16bit", [], "H200", (108, 768), ("generation",), "6.0"),
        ("llama3.1_8b_gsm8k_16bit", [], "H200", (108, 768), ("forward and backward",), "5.7"),
        ("llama3.1_8b_gsm8k_16bit", [], "H200", (108, 206), ("forward and backward",), "1.6"),
        ("llama3.1_8b_gsm8k_packed", [], "H200", (108, 768), (), "10.8"),
        ("llama3.1_8b_gsm8k_packed", [], "H200", (108, 768), ("generation",), "10.1"),
        ("llama3.1_8b_long", LONG, "H200", (108, 8192), (), "81"),
        ("llama3.1_8b_long", LONG, "H200", (108, 8192), ("generation",), "63.7"),
        ("llama3.1_8b_long", [], "H200", (108, 15512), (), "165"),
        ("llama3.1_8b_long", [], "H200", (108, 15512), ("generation",), "127"),
        ("llama3.1_8b_long", [], "H200", (108, 15512), ("forward and backward",), "38"),
        ("smollm2_135m_char_count_published", [], "H200", (62, 70), (), "3.23"),
        ("smollm2_135m_char_count", [], "H200", (62, 70), (), "2.98"),
        ("smollm2_135m_char_count", [], "H200", (62, 70), ("forward and backward",), "1.08"),
        ("smollm2_135m_char_count", PLAIN, "H100", (62, 70), (), "3.57"),
        ("smollm2_135m_char_count_published", [*PLAIN, "grpo.beta=0.04"], "H200", (62, 70), TRAINING, "2.34"),
        (
            "smollm2_135m_char_count_published", [*PLAIN, "grpo.beta=0.04", "step.impl=trl"], "H200", (62, 70),
            TRAINING, "9.6",
        ),
        ("smollm2_135m_char_count_published", BY_VLLM, "H200", (62, 70), ("generation",), "5.5"),
        ("smollm2_135m_char_count_published", BY_VLLM, "H100", (40, 128), ("generation",), "10.1"),
    ],
)  # fmt: skip
def test_what_docs_speed_says_is_planned(without_unsloth, name, overrides, card, lengths, phases, told):
    """Of runs that it was not fitted to; the table says beside it what they took, and which of them miss."""
    config = load_config(ROOT / "configs" / f"{name}.yaml", overrides)
    planned = plan_time(config, plan(config, CARDS[card] << 20).setting, published(card), lengths)
    seconds = planned.step if not phases else sum(planned.phases[phase] for phase in phases)
    decimals = len(told.partition(".")[2])
    assert f"{seconds * ROLLOUT.get(name, 1):.{decimals}f}" == told
    assert f" | {told} | " in (ROOT / "docs" / "speed.md").read_text()


def test_every_card_of_the_memory_plan_has_a_rate():
    assert all(published(card) is not None for card in CARDS)
    assert published("24 GiB") is None


@pytest.mark.parametrize("text", ["40", "0+10", "a+b", "40+100+2", "0.4+10", "40+100.5"])
def test_lengths_that_are_none(text):
    with pytest.raises(ConfigError, match="--lengths"):
        parse_lengths(text, 100)
    assert parse_lengths(" 40 + 100 ", 100) == (40, 100)
    assert parse_lengths("40.3+99.6", 100) == (40, 100)  # as metrics.jsonl has a mean
    assert parse_lengths("1+1", 100) == (1, 1)


def test_a_card_is_not_planned_for_a_run_that_keeps_off_it(capsys):
    quickstart = load_config(ROOT / "configs" / "quickstart.yaml", ["grpo.use_cpu=true"])
    assert show(quickstart, "H100") == 2
    assert capsys.readouterr().err.startswith(
        "--device: is a GPU, and grpo.use_cpu keeps off it (value 'H100')"
    )
    assert show(quickstart, None) == 0
    assert show(load_config(ROOT / "configs" / "quickstart.yaml"), "H100") == 0


def test_a_mean_completion_is_not_longer_than_the_longest(capsys):
    quickstart = load_config(ROOT / "configs" / "quickstart.yaml")
    assert show(quickstart, "H100", "40+7") == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "--lengths: a mean completion is longer than the longest, grpo.max_completion_length 6"
    )


@pytest.mark.parametrize(
    ("overrides", "asked", "told", "note"),
    [
        # d>tt= and the begin token beside the digits and the target: as the quickstart's tokenizer writes it
        ([], None, "7 + 6 tokens", "the prompts are this task's"),
        ([], "40+5", "40 + 5 tokens", None),
        (["model.tokenizer=bpe"], None, "58 + 6 tokens", "these lengths are the longest"),
    ],
)
def test_the_prompts_of_a_task_on_this_machine_are_measured(
    capsys, monkeypatch, overrides, asked, told, note
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    assert show(config, None, asked) == 0
    shown = capsys.readouterr().out
    assert f"time is planned for mean lengths of {told} and " in shown
    assert (note in shown) if note else ("note: these" not in shown and "note: the prompts" not in shown)


def test_memory_is_planned_for_the_longest_prompt_and_time_for_a_mean_one(capsys, tmp_path):
    character_tokenizer(string.printable).save_pretrained(tmp_path)
    told = [
        "task={name: countdown_tinyzero, prompt: plain, train_size: 64}", f"model.tokenizer={tmp_path}",
        "model.scratch.max_positions=1024", "run.warm_start=null",
    ]  # fmt: skip
    config = load_config(ROOT / "configs" / "quickstart.yaml", told)
    lengths = [len(prompt) for prompt in config.make_task().train["prompt"]]  # a token a character
    mean = round(sum(lengths) / len(lengths))
    assert mean < max(lengths)
    assert show(config, None) == 0
    shown = capsys.readouterr().out
    assert f"the longest of this task's prompts has {max(lengths)} tokens" in shown
    assert f"time is planned for mean lengths of {mean} + 6 tokens" in shown


def test_a_tokenizer_that_is_not_here(capsys, tmp_path):
    """Of a new model the plan cannot do without it; of another it says that prompts were not looked at."""
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["model.tokenizer=nowhere/to-be-found"])
    assert show(config, None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "model.tokenizer: cannot be loaded on this machine (value 'nowhere/to-be-found'); fetch it"
    )
    config = load_config(
        ROOT / "configs" / "smollm2_135m_char_count.yaml",
        [f"model.name={tmp_path}", "task.held_out=8", "task.train_size=64"],
    )
    assert prompt_lengths(config, config.make_task()) is None


def test_long_steps_are_told_without_an_exponent():
    planned = TimePlan({"generation": 124.0, "optimizer": 0.00071}, None, 1, 2, H100)
    assert planned.lines()[0] == "time: 120 s a step (generation 120 s, optimizer 0.00071 s)"
