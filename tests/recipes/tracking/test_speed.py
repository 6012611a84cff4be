"""Tokens a second and the share of the matrix rate, by hand from what a real run sampled."""

import io
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny import tiny_trainer
from trl import GRPOTrainer

from recipes.plan.rate import matrix_rate
from recipes.plan.shapes import ModelShape, Trained
from recipes.plan.work import Flow, Work
from recipes.report.charts import charts
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.speed import TRAINING, WHOLE, Speed, compute_dtype
from recipes.tracking.summary import by_speed, summarize
from recipes.tracking.tracker import print_summary, track
from recipes.training.packed_step import packed
from recipes.training.ratios import sampler_dtype


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps a generation, so that the second one's old log-probabilities are scored."""
    from memhead.integrations import trl as memhead_trl

    folder = RunFolder.create(tmp_path_factory.mktemp("runs"), "run")
    settings = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "logging_steps": 2}
    seen = []
    with memhead_trl.install():
        trainer = tiny_trainer(folder.path / "checkpoints", steps=4, **settings)
        work = Work.of(ModelShape.of(trainer.model), Trained.of(trainer.model, None))
        folder.write_json("plan.json", {"work": asdict(work)})
        generate = trainer._generate
        trainer._generate = lambda prompts: seen.append(found := generate(prompts)) or found
        console = Console(file=io.StringIO(), width=160)
        tracker = track(trainer, folder, console=console)
        trainer.train()
        tracker.close()
        print_summary(tracker.summary(), folder, console)
    return folder, work, [(found[0], found[1]) for found in seen], console.file.getvalue()


@pytest.mark.parametrize(
    ("bf16", "fp16", "weights", "products"),
    [
        (True, False, torch.float32, torch.bfloat16),
        (False, True, torch.float32, torch.float16),
        (False, False, torch.float32, torch.float32),
        (False, False, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_rate_is_that_of_the_products_dtype(bf16, fp16, weights, products):
    trainer = SimpleNamespace(
        args=SimpleNamespace(bf16=bf16, fp16=fp16), model=SimpleNamespace(dtype=weights), vllm_generation=None
    )
    assert compute_dtype(trainer) == sampler_dtype(trainer) == products


def test_tokens_are_those_that_were_sampled(run):
    folder, _, rollouts, _ = run
    records = [r for r in folder.metrics.read() if "speed" in r]
    # TRL logs the first step by itself where asked to; here every second.
    assert [r["step"] for r in records] == [2, 4]
    for record, (prompts, completions) in zip(records, rollouts, strict=True):
        sampled, real = sum(map(len, completions)), sum(map(len, prompts)) + sum(map(len, completions))
        speed = record["speed"]
        assert speed["generation"]["tokens"] == sampled / 2  # of two steps
        assert speed["scoring"]["tokens"] == speed[TRAINING]["tokens"] == real / 2
        seconds = record["time"]["forward"] + record["time"]["backward"]
        assert speed[TRAINING]["per_second"] == pytest.approx(real / 2 / seconds)


def test_shares_are_the_floor_of_what_it_took(run):
    folder, work, rollouts, _ = run
    for record, (prompts, completions) in zip(
        [r for r in folder.metrics.read() if "speed" in r], rollouts, strict=True
    ):
        p, c = [list(map(len, x)) for x in (prompts, completions)]
        each = Flow.of_lengths(p, c, list(range(len(p))))
        time, speed = record["time"], record["speed"]
        floor = {"scoring": work.forward(each), TRAINING: work.training(each)}
        distinct = Flow.of_lengths(p, c, [tuple(ids) for ids in prompts])
        floor["generation"] = work.forward(distinct)
        seconds = time | {TRAINING: time["forward"] + time["backward"]}
        for phase, operations in floor.items():
            assert speed[phase]["share"] == pytest.approx(operations / speed["rate"] / (2 * seconds[phase]))
        assert speed[WHOLE]["share"] == pytest.approx(
            sum(floor.values()) / speed["rate"] / (2 * sum(time.values()))
        )
        assert 0 < speed[WHOLE]["share"] < 1


def test_the_summary_weighs_steps_by_their_time(run):
    folder, _, rollouts, shown = run
    records = folder.metrics.read()
    speed = summarize(records)["speed"]
    sampled = sum(len(ids) for _, completions in rollouts for ids in completions)
    seconds = sum(r["steps"] * r["time"]["generation"] for r in records if "time" in r)
    assert speed["generation"]["per_second"] == pytest.approx(sampled / seconds)
    assert speed["generation"]["tokens"] == pytest.approx(sampled / 4)
    parts = [
        (r["speed"][WHOLE]["share"], r["steps"] * sum(r["time"].values())) for r in records if "speed" in r
    ]
    assert speed[WHOLE]["share"] == pytest.approx(sum(a * b for a, b in parts) / sum(b for _, b in parts))
    assert "of the matrix rate" in shown
    assert "tokens a second" in shown
    titles = {chart.title for chart in charts({"run": records})}
    assert {"Tokens a second by phase", "Share of the matrix rate"} <= titles


def test_a_rate_that_was_timed_beside_other_work_is_timed_again(run, tmp_path, monkeypatch):
    """A phase cannot be faster than the device: the run would say so to its end."""
    folder, work, _, _ = run
    again = RunFolder.create(tmp_path, "run")
    again.write_json("plan.json", folder.read_json("plan.json"))
    rates = iter([1.0])
    monkeypatch.setattr("recipes.tracking.speed.matrix_rate", lambda *_: next(rates, 1e12))
    trainer = SimpleNamespace(
        args=SimpleNamespace(bf16=False, fp16=False),
        model=SimpleNamespace(dtype=torch.float32),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    speed = Speed(trainer, again)
    speed.counter("generation")(([[1, 2]], [[3, 4, 5]]))
    found = speed.take({"generation": 0.5}, 1)
    floor = work.forward(Flow.of_lengths([2], [3], [0]))
    assert found["rate"] == 1e12
    assert found["generation"]["share"] == pytest.approx(floor / 1e12 / 0.5)


def test_nothing_counted_has_no_table():
    assert by_speed(summarize([{"step": 1, "reward": 0.5, "time": {"generation": 1.0}, "steps": 1}])) is None


def test_the_rate_is_that_of_a_product():
    before = torch.get_rng_state()
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e9 < rate < 1e14
    assert torch.equal(before, torch.get_rng_state())


def test_a_packed_step_counts_a_prompt_once_and_its_scoring(tmp_path, memhead_in_trl):
    """Of two updates a generation the second one's log-probabilities are scored before the first."""
    folder = RunFolder.create(tmp_path, "run")
    settings = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "entropy_coef": 1e-6}
    settings["max_completion_length"] = 4  # a group of longer ones is divided at this width
    trainer = tiny_trainer(folder.path / "checkpoints", steps=2, kind=packed(GRPOTrainer), **settings)
    tracker = track(trainer, folder, progress=False)
    trainer.train()
    tracker.close()
    first, second = folder.metrics.read()
    completions = first["completion_length"] * 16
    # Without each one's last token, with prompts of three tokens, one for each group of four.
    everything = completions - 16 + 4 * 3
    assert first["time"]["scoring"] > 0.0
    assert "scoring" not in second["speed"]
    assert first["speed"]["generation"]["tokens"] == pytest.approx(completions)
    once = first["speed"]["scoring"]["tokens"]
    assert once == second["speed"][TRAINING]["tokens"]  # the same rows, later
    assert first["speed"][TRAINING]["tokens"] + once == pytest.approx(everything)
    for record in (first, second):
        assert record["speed"][TRAINING]["tokens"] == record["tokens"]["computed"]
