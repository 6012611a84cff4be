"""Rates, flows and lines of several steps, added up by hand from numbers of which no two are equal."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from recipes.plan.work import Flow, Work
from recipes.tracking import speed as speed_module
from recipes.tracking.files import LinesFile, MetricsFile, plain
from recipes.tracking.rates import rollouts, together, tokens_of
from recipes.tracking.ratios import EDGES, as_metrics, from_logs, outside
from recipes.tracking.reporters import evaluated
from recipes.tracking.speed import Speed, of_all, padded_flow
from recipes.tracking.terminal import Progress

LOGGED = [
    {"step": 2, "steps": 2, "time": {"generation": 3.0, "forward": 1.0},
     "tokens": {"computed": 50.0, "real": 100.0, "left_out_share": 0.5},
     "speed": {"generation": {"tokens": 30.0, "per_second": 10.0, "share": 0.1}, "rate": 7.0,
               "whole step": {"share": 0.25}}},
    {"step": 2, "accuracy": 0.5},
    {"step": 6, "steps": 4, "time": {"forward": 2.0}, "tokens": {"computed": 20.0, "real": 70.0, "left_out_share": 0.2},
     "speed": {"forward and backward": {"tokens": 8.0, "per_second": 4.0, "share": 0.3}, "rate": 9.0,
               "whole step": {"share": 0.5}}},
    {"step": 7, "time": {"generation": 5.0}, "tokens": {"computed": 1.0, "real": 7.0, "left_out_share": 0.0},
     "speed": {"generation": {"tokens": 10.0, "per_second": 2.0}}},
]  # fmt: skip


def test_a_rollout_goes_from_one_that_samples_to_the_next():
    assert [[record["step"] for record in group] for group in rollouts(LOGGED)] == [[2, 6], [7]]
    assert [[r["step"] for r in group] for group in rollouts(LOGGED[2:])] == [
        [6],
        [7],
    ]  # of one that was cut off
    assert rollouts([]) == rollouts(LOGGED[1:2]) == []


def test_tokens_of_several_steps():
    """Two steps of 100 real tokens and four seconds each, four of 70 and two seconds, one of 7 and five."""
    first, _, second, third = LOGGED
    assert tokens_of([first, second, third]) == {
        "computed": pytest.approx((2 * 50 + 4 * 20 + 1) / 7),
        "real": pytest.approx((2 * 100 + 4 * 70 + 7) / 7),
        "left_out_share": pytest.approx((2 * 0.5 + 4 * 0.2) / 7),
        "per_second": pytest.approx(487 / (8 + 8 + 5)),
    }
    whole = together([first, second])
    assert whole["step"] == 6
    assert whole["tokens"]["per_second"] == pytest.approx(480 / 16)
    assert tokens_of([{"time": {"forward": 1.0}}]) == {}
    assert "per_second" not in tokens_of([{**third, "time": {}}])
    assert together([{"step": 3, "time": {"forward": 1.0}}]) == {
        "step": 3
    }  # of TRL's step, which counts none


def test_speeds_of_several_steps():
    """A phase's seconds are its tokens over their rate: six and five of sampling, eight of training."""
    first, _, second, third = LOGGED
    assert of_all([first, second, third]) == {
        "generation": {
            "share": pytest.approx(6 * 0.1 / 11),
            "tokens": pytest.approx(70 / 7),
            "per_second": 70 / 11,
        },
        "forward and backward": {
            "share": pytest.approx(0.3),
            "tokens": pytest.approx(32 / 7),
            "per_second": 4.0,
        },
        "whole step": {"share": pytest.approx((8 * 0.25 + 8 * 0.5) / 16)},
        "rate": 9.0,
    }
    assert of_all([]) == {}


def test_a_padded_batch_flows_without_its_padding():
    """Two prompts of 3 and 1 tokens in a width of 3, completions of 2 and 4 in one of 4."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    found = padded_flow(mask, 4)
    assert (found.tokens, found.scored) == (10, 6)
    assert found.pairs == (9 // 2 + 2 * 3 + 4 // 2) + (1 // 2 + 4 * 1 + 16 // 2)


WORK = Work(linear=100, adapters=0, head=10, attention=1, frozen=False, frozen_head=False)


def trainer():
    return SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        args=SimpleNamespace(bf16=False, fp16=False),
        model=SimpleNamespace(dtype=torch.float32),
    )


@pytest.fixture
def counting(monkeypatch):
    """By a rate of 1,000 operations a second."""
    monkeypatch.setattr(speed_module, "matrix_rate", lambda device, dtype: 1000.0)
    return Speed(trainer(), SimpleNamespace(read_json=lambda name: {"work": vars(WORK)}))


def test_what_is_counted_between_two_records(counting):
    counting.counter("generation")(([[5, 6], [5, 6], [7]], [[1], [1, 2], [1, 2, 3]]), "given")
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    counting.counter("scoring")((1, 2), "model", "ids", mask, 2)
    counting.counter("scoring")(None, "model", "ids", mask, 2)  # TRL asked for nothing
    inputs = {"prompt_mask": mask[:, :1], "completion_mask": mask[:, 1:]}
    counting.counter("forward")(0.0, "model", inputs)
    counting.counter("forward")(0.0, model="model", inputs=inputs)
    assert counting.counter("optimizer") is None
    sampled = Flow.of_lengths([2, 2, 1], [1, 2, 3], [0, 0, 1])
    scored = Flow.of_lengths([1, 0], [2, 2], [0, 1])
    seconds = {"generation": 3.0, "scoring": 5.0, "forward": 0.5, "backward": 1.5, "other": 10.0}
    found = counting.take(seconds, 2)
    assert {phase: found[phase]["tokens"] for phase in ("generation", "scoring", "forward and backward")} == {
        "generation": 3.0,
        "scoring": 2.5,
        "forward and backward": 5.0,
    }
    assert (found["generation"]["per_second"], found["scoring"]["per_second"]) == (1.0, 0.5)
    assert found["forward and backward"]["per_second"] == 10 / 4
    floors = WORK.forward(sampled), WORK.forward(scored), WORK.training(scored + scored)
    shares = [
        found[phase]["share"] for phase in ("generation", "scoring", "forward and backward", "whole step")
    ]
    expected = [floors[0] / 6000, floors[1] / 10_000, floors[2] / 4000, sum(floors) / 40_000]
    assert shares == pytest.approx(expected)
    assert found["rate"] == 1000.0
    assert counting.take(seconds, 2) == {}  # it starts again
    counting.counter("generation")(([[5]], [[1, 2]]))
    assert counting.take(seconds, 1)["generation"]["tokens"] == 2
    counting.counter("generation")(([[5]], [[1, 2]]))
    assert counting.take({"other": 1.0}, 1) == {}  # of a phase that took no time nothing is known


def test_without_a_plan_there_are_rates_and_no_shares():
    found = Speed(trainer(), SimpleNamespace(read_json=lambda name: None))
    found.counter("generation")(([[5]], [[1, 2]]))
    assert found.take({"generation": 0.5}, 2) == {"generation": {"tokens": 1.0, "per_second": 2.0}}


@pytest.mark.parametrize(
    ("ratio", "one", "ten"),
    [
        (0.895, 1, 1), (0.92, 1, 0), (0.97, 1, 0), (0.995, 0, 0),
        (1.005, 0, 0), (1.03, 1, 0), (1.07, 1, 0), (1.11, 1, 1),
    ],
)  # fmt: skip
def test_a_ratio_outside_of_one_per_cent_or_ten(ratio, one, ten):
    place = int(torch.bucketize(torch.tensor(ratio), torch.tensor(EDGES)))
    shares = [float(number == place) for number in range(len(EDGES) + 1)]
    assert (outside(shares, 1), outside(shares, 10)) == (one, ten)
    assert from_logs(as_metrics("policy", shares)) == {"ratios": {"policy": shares}}


def test_after_a_resume_a_step_has_a_line_of_its_own(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.write({"step": step, "reward": 0.1})
    file.drop_after(2)
    file.write({"step": 2, "accuracy": 0.5})
    file.write({"step": 3, "reward": 0.3})
    assert file.read() == [
        {"step": 1, "reward": 0.1},
        {"step": 2, "reward": 0.1, "accuracy": 0.5},
        {"step": 3, "reward": 0.3},
    ]
    file.drop_after(0)
    file.write({"step": 1, "reward": 0.4})
    assert file.read() == [{"step": 1, "reward": 0.4}]


def test_what_json_can_hold():
    given = {1: float("inf"), "a": (1, True, None), "b": torch.tensor(2), "c": [torch.tensor(float("nan"))]}
    assert plain(given) == {"1": None, "a": [1, True, None], "b": 2, "c": [None]}


def test_a_process_that_only_reads_writes_nothing(tmp_path):
    file = LinesFile(tmp_path / "x.jsonl")
    file.append({"step": 1})
    file.writes = False
    file.append({"step": 2})
    file.rewrite([])
    assert file.read() == [{"step": 1}]


def test_trackers_get_an_interval_by_its_ends():
    told = []
    state = SimpleNamespace(args=1, state=2, control=3)
    state.callback_handler = SimpleNamespace(call_event=lambda *given, logs: told.append((given, logs)))
    evaluated(state, {"accuracy": 0.5, "accuracy_interval": [0.4, 0.7], "accuracy_problems": 9})
    logs = {
        "accuracy": 0.5,
        "accuracy_interval_low": 0.4,
        "accuracy_interval_high": 0.7,
        "accuracy_problems": 9,
    }
    assert told == [(("on_log", 1, 2, 3), {f"eval_{name}": value for name, value in logs.items()})]


def test_a_bar_goes_on_where_the_run_does_and_leaves_the_ends_in_lines_of_their_own():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    progress = Progress(console)
    progress.accuracy(0, 0.125, 16)
    progress.start(3, 6, accuracy=0.25)
    bar = progress._bar
    assert (bar.tasks[0].completed, bar.tasks[0].total) == (3, 6)
    assert bar.tasks[0].fields["figures"] == "reward –  accuracy 0.250  peak –"
    progress.advance(4)
    progress.logged(4, {"reward": 0.5, "step": 4, "time": {}}, [7.0])
    progress.logged(5, {"step": 5, "time": {}}, [None])
    assert bar.tasks[0].completed == 4
    assert bar.tasks[0].fields["figures"] == "reward 0.500  accuracy 0.250  peak 7.0 MiB"
    progress.accuracy(5, 0.375, 16)
    assert bar.tasks[0].fields["figures"] == "reward 0.500  accuracy 0.375  peak 7.0 MiB"
    progress.accuracy(6, 0.5, 16)
    progress.stop()
    progress.stop()
    assert progress._bar is None
    lines = [line for line in console.file.getvalue().splitlines() if "GRPO: " in line or "step " in line]
    assert [line.partition("K")[2] if "\x1b" in line else line for line in lines] == [
        "before GRPO: accuracy 0.125 of 16 held-out problems",
        "after GRPO: accuracy 0.500 of 16 held-out problems",
    ]
