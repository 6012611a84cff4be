"""The measuring itself: clocks and meters whose answers are known, sums that must agree, units by literal numbers."""

import itertools
import json
import subprocess
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console
from tiny import digits_reward, length_reward, tiny_trainer

from recipes.config.schema import TrackingConfig
from recipes.plan import plan
from recipes.report.page import write_report
from recipes.tracking import environment, meters, phases
from recipes.tracking import tracker as tracker_module
from recipes.tracking.meters import CpuMeter, CudaMeter, TensorMeter, make_meter, persistent_tensors
from recipes.tracking.phases import PHASES, PLANNED, PhaseClock, attach, attach_optimizer, phase_of
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.summary import (
    before_and_after,
    by_phase,
    format_mib,
    highest_peak,
    logged_steps,
    main_figures,
    percent,
    summarize,
    tokens_in_words,
)
from recipes.tracking.tracker import Tracker, highest, last_completions, track
from recipes.training import memory
from recipes.training.step_metrics import StepMeter


class Clock:
    """Seconds that pass only when told; the phases' own `time`."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


class Ticking:
    """One second passes between any two looks."""

    def __init__(self):
        self.seconds = itertools.count()

    def perf_counter(self):
        return float(next(self.seconds))


class KnownMeter:
    """Gives the peaks that it is told, and keeps what it was told of each step."""

    def __init__(self):
        self.next = {}
        self.steps = []

    def begin_step(self, step, persistent):
        self.steps.append((step, [tuple(tensor.shape) for tensor in persistent]))

    def measure(self, figures):
        from contextlib import contextmanager

        @contextmanager
        def measured():
            yield
            figures.update(self.next)

        return measured()


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(phases, "time", found)
    return found


def pass_in(phase_clock, clock, name, seconds, **peaks):
    phase_clock._meter.next = {f"{figure}_mib": value for figure, value in peaks.items()}
    with phase_clock.phase(name):
        clock.passes(seconds)


MODEL = torch.nn.Linear(2, 3)


def test_seconds_are_summed_peaks_are_maxima_and_other_is_the_rest(clock):
    known = PhaseClock(torch.device("cpu"), KnownMeter())
    known.begin_step(0, MODEL, None)
    clock.passes(0.5)
    pass_in(known, clock, "generation", 3.0, tensor_peak=5.0, resident=100.0)
    pass_in(known, clock, "forward", 2.0, tensor_peak=7.0)
    pass_in(known, clock, "forward", 1.0, tensor_peak=3.0)
    clock.passes(1.5)
    known.end_step()
    clock.passes(50.0)  # between two steps: no one's time
    pass_in(known, clock, "generation", 7.0, tensor_peak=900.0)  # an evaluation's
    known.begin_step(1, MODEL, None)
    pass_in(known, clock, "generation", 4.0, tensor_peak=4.0, resident=90.0)
    clock.passes(0.25)
    known.end_step()
    seconds, peaks, steps = known.take()
    assert seconds == {"generation": 7.0, "forward": 3.0, "other": 2.25}
    assert sum(seconds.values()) == 8.0 + 4.25  # of the two steps
    assert peaks == {
        "generation": {"tensor_peak_mib": 5.0, "resident_mib": 100.0},
        "forward": {"tensor_peak_mib": 7.0},
    }
    assert steps == 2
    known.begin_step(2, MODEL, None)
    pass_in(known, clock, "forward", 1.0, tensor_peak=0.25)
    known.end_step()
    assert known.take() == ({"forward": 1.0, "other": 0.0}, {"forward": {"tensor_peak_mib": 0.25}}, 1)
    assert [step for step, _ in known._meter.steps] == [0, 1, 2]
    assert known._meter.steps[0][1] == [(3, 2), (3,)]


@pytest.mark.parametrize("meter", [KnownMeter, lambda: None])
def test_who_asks_is_told_whether_a_phase_is_measured(clock, meter):
    known = PhaseClock(torch.device("cpu"), meter())
    with known.phase("forward") as before:
        pass
    known.begin_step(0, MODEL, None)
    with known.phase("forward") as outer, known.phase("scoring") as inner:
        pass
    assert (before, outer, inner) == (False, True, False)


def test_an_end_without_a_beginning_counts_nothing(clock):
    known = PhaseClock(torch.device("cpu"), None)
    known.end_step()
    known.begin_step(0, MODEL, None)
    clock.passes(2.0)
    known.end_step()
    known.end_step()
    assert known.take() == ({"other": 2.0}, {}, 1)


def test_a_phase_that_fails_leaves_the_clock_ready_and_its_name_on_the_error(clock):
    known = PhaseClock(torch.device("cpu"), KnownMeter())
    known.begin_step(0, MODEL, None)

    def fail():
        with known.phase("forward"), known.phase("scoring"):
            clock.passes(1.0)
            raise RuntimeError("of its own")

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert phase_of(caught.value) == "forward"
    assert phase_of(ValueError()) is None
    pass_in(known, clock, "backward", 2.0)
    known.end_step()
    assert known.take()[0] == {"backward": 2.0, "other": 1.0}


class Methods:
    """What of a trainer is wrapped; each call takes a second and says under which phase it ran."""

    def __init__(self, clock):
        self._clock = clock
        self.accelerator = SimpleNamespace(backward=self._take)

    def _take(self, *args, **kwargs):
        self._clock.passes(1.0)
        return args, kwargs

    _generate = _calculate_rewards = compute_loss = _score_before_updates = _take

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):  # known by its name
        return self._take(*args, **kwargs)


@pytest.mark.parametrize(
    ("method", "phase"),
    [
        ("_generate", "generation"),
        ("_calculate_rewards", "rewards"),
        ("_get_per_token_logps_and_entropies", "scoring"),
        ("_score_before_updates", "scoring"),
        ("compute_loss", "forward"),
        ("backward", "backward"),
        ("step", "optimizer"),
    ],
)
def test_each_method_is_timed_as_its_phase(clock, method, phase):
    known = PhaseClock(torch.device("cpu"), None)
    trainer = Methods(clock)
    optimizer = SimpleNamespace(step=trainer._take)
    attach(trainer, known)
    for _ in range(2):  # a resumed training attaches again
        attach_optimizer(optimizer, known)
    call = {"backward": trainer.accelerator.backward, "step": optimizer.step}.get(
        method, getattr(trainer, method, None)
    )
    known.begin_step(0, MODEL, None)
    with torch.no_grad():
        assert call(1, two=2) == ((1,), {"two": 2})
    known.end_step()
    assert known.take()[0] == {phase: 1.0, "other": 0.0}
    known.begin_step(1, MODEL, None)
    call()
    known.end_step()
    # With a gradient, log-probabilities belong to the forward pass that wanted them.
    unwanted = method == "_get_per_token_logps_and_entropies"
    assert known.take()[0] == ({"other": 1.0} if unwanted else {phase: 1.0, "other": 0.0})


def test_a_timed_method_keeps_its_name_and_what_is_written_on_it():
    """torch's schedulers mark the optimizer's step, and warn where the mark is missing."""

    def step():
        """Of the optimizer."""

    step.marked = True
    optimizer = SimpleNamespace(step=step)
    attach_optimizer(optimizer, PhaseClock(torch.device("cpu"), None))
    assert optimizer.step is not step
    assert (optimizer.step.__name__, optimizer.step.__doc__) == ("step", "Of the optimizer.")
    assert optimizer.step.marked


def test_every_phase_that_a_plan_foresees_is_measured_and_the_rest_is_named():
    assert set(PLANNED) < set(PHASES)
    assert set(PHASES) - set(PLANNED) == {"rewards", "other"}


# A real trainer on a clock that ticks at every look


@pytest.fixture(scope="module")
def ticked(tmp_path_factory):
    """A run of five steps logged in twos, two micro-batches a step; the first two and each fourth metered."""
    from memhead.integrations import trl as memhead_trl

    root = tmp_path_factory.mktemp("runs")
    folder = RunFolder.create(root, "run")
    settings = {"gradient_accumulation_steps": 2, "logging_steps": 2, "num_iterations": 2}
    with pytest.MonkeyPatch.context() as patch, memhead_trl.install():
        patch.setattr(phases, "time", Ticking())
        patch.setattr(tracker_module, "time", SimpleNamespace(time=lambda: 1234.5678))
        trainer = tiny_trainer(folder.path / "checkpoints", steps=5, logging_first_step=True, **settings)
        tracking = TrackingConfig(logging_every=2, completions_sample=3, memory_every=4)
        tracker = track(trainer, folder, tracking, progress=False)
        tracker.evaluated(0, {"accuracy": 0.25})
        trainer.train()
        tracker.evaluated(5, {"accuracy": 0.75})
        tracker.close()
    return folder, tracker


def test_a_records_seconds_are_means_over_its_steps(ticked):
    records = logged_steps(ticked[0].metrics.read())
    assert [(record["step"], record["steps"]) for record in records] == [(1, 1), (2, 1), (4, 2), (5, 1)]
    for record in records:
        seconds = record["time"]
        assert (seconds["forward"], seconds["backward"], seconds["optimizer"]) == (2.0, 2.0, 1.0)
        # Each measured phase takes two looks, a second apart; between two of them another second passes.
        assert sum(seconds.values()) == pytest.approx(seconds["other"] * 2 - 1)
    # Two steps from one generation: the first samples, the second does not.
    assert records[0]["time"]["generation"] == records[0]["time"]["rewards"] == 1.0
    assert "generation" not in records[1]["time"]
    assert records[2]["time"]["generation"] == 0.5


def test_a_record_says_where_and_when_and_of_one_process_nothing_apart(ticked):
    folder, tracker = ticked
    for record in logged_steps(folder.metrics.read()):
        assert (record["device"], record["at"]) == ("cpu", 1234.6)
        assert "memory_by_process" not in record
    assert tracker._progress is None  # none was asked for


def test_a_log_that_is_no_new_steps_is_no_record(ticked, monkeypatch):
    folder, tracker = ticked
    trainer, before = tracker._trainer, folder.metrics.read()
    trainer.log({"loss": 9.0})  # of a step that is recorded
    monkeypatch.setattr(trainer.state, "global_step", 6)
    trainer.log({"eval_reward": 9.0})
    assert folder.metrics.read() == before


def test_a_record_has_trls_figures_by_our_names_and_the_rest_by_its_own():
    ours = {
        "reward": 1.0, "reward_std": 2.0, "entropy": 3.0, "kl": 4.0, "step_time": 8.0, "loss": 9.0, "grad_norm": 10.0,
        "learning_rate": 11.0, "epoch": 12.0, "bad_step": 13.0,
    }  # fmt: skip
    renamed = {
        "completions/mean_length": ("completion_length", 5.0),
        "completions/clipped_ratio": ("clipped_share", 6.0),
        "frac_reward_zero_std": ("zero_std_share", 7.0),
    }
    tokens = {
        "step/tokens_computed": ("computed", 14.0),
        "step/tokens_real": ("real", 15.0),
        "step/left_out": ("left_out_share", 16.0),
    }
    rest = {"rewards/one/std": 19.0, "num_tokens": 20.0}
    logs = {
        **ours, **rest, **{name: value for name, (_, value) in (renamed | tokens).items()}, "rewards/one/mean": 18.0,
        "step": 3, "time/forward": 21.0, "memory/forward/resident_mib": 22.0, "mismatch/total": 23.0,
    }  # fmt: skip
    assert tracker_module._record(3, logs) == {
        "step": 3,
        **ours,
        **dict(renamed.values()),
        "tokens": dict(tokens.values()),
        "rewards": {"one": 18.0},
        "trl": rest,
        "mismatch": {"total": 23.0},
    }
    assert tracker_module._record(4, {}) == {"step": 4, "rewards": {}, "trl": {}}


def test_a_share_in_words_has_two_digits_below_a_tenth():
    shares = {
        None: "–",
        0.0: "0 %",
        0.00123: "0.12 %",
        0.0123: "1.2 %",
        0.095: "9.5 %",
        0.1: "10 %",
        0.456: "46 %",
        0.947: "95 %",
        1.0: "100 %",
    }
    assert {share: percent(share) for share in shares} == shares


def test_of_several_processes_the_highest():
    one = {"forward": {"tensor_peak_mib": 0.25, "resident_mib": 90.0}, "rewards": {"resident_mib": 7.0}}
    other = {"forward": {"tensor_peak_mib": 0.5, "resident_mib": 80.0}, "scoring": {"resident_mib": 0.5}}
    assert highest([one, other]) == {
        "forward": {"tensor_peak_mib": 0.5, "resident_mib": 90.0},
        "rewards": {"resident_mib": 7.0},
        "scoring": {"resident_mib": 0.5},
    }


def test_summary_report_and_records_agree(ticked):
    folder, tracker = ticked
    records = logged_steps(folder.metrics.read())
    summary = folder.read_json("summary.json")
    assert summary == json.loads(json.dumps(tracker.summary()))
    for phase, total in summary["seconds"].items():
        assert total == pytest.approx(sum(r["time"].get(phase, 0.0) * r["steps"] for r in records)), phase
    assert summary["seconds"]["forward"] == 10.0  # of five steps
    assert summary["seconds"]["generation"] == 3.0  # of steps 1, 3 and 5
    assert summary["seconds_total"] == pytest.approx(sum(summary["seconds"].values()))
    for phase, figures in summary["memory"].items():
        for figure, value in figures.items():
            assert value == max(r["memory"].get(phase, {}).get(figure, 0.0) for r in records)
    write_report(folder)
    page = (folder.path / "report.html").read_text()
    for phase in ("generation", "forward", "optimizer"):
        assert f"{summary['seconds'][phase]:.1f}" in page
        assert format_mib(summary["memory"][phase]["tensor_peak_mib"]) in page


def test_tensors_are_metered_on_the_first_two_steps_and_each_fourth(ticked):
    records = logged_steps(ticked[0].metrics.read())
    found = {record["step"]: record["memory"]["backward"] for record in records}
    assert [step for step, figures in found.items() if "tensor_peak_mib" in figures] == [1, 2, 5]
    assert all("resident_mib" in figures for figures in found.values())


def test_each_completion_has_its_own_rewards_and_advantage(ticked):
    kept = ticked[0].completions.read()
    assert [line["step"] for line in kept] == [step for step in (1, 2, 4, 5) for _ in range(3)]
    for line in kept:
        text = [line["completion"]]
        assert line["rewards"] == {
            "digits_reward": pytest.approx(digits_reward(text)[0]),
            "length_reward": pytest.approx(length_reward(text)[0]),
        }
    assert len({line["completion"] for line in kept}) > 3


def test_the_last_completions_are_those_of_the_batch_in_their_order():
    logs = {
        "prompt": ["p", "q"],
        "completion": ["a", "b"],
        "rewards": {"one": [1.0, 2.0], "two": [3.0, None]},
        "advantages": [0.5, -0.5],
    }
    assert last_completions(SimpleNamespace(_logs=logs)) == [
        {"prompt": "p", "completion": "a", "rewards": {"one": 1.0, "two": 3.0}, "advantage": 0.5},
        {"prompt": "q", "completion": "b", "rewards": {"one": 2.0, "two": None}, "advantage": -0.5},
    ]
    assert last_completions(SimpleNamespace()) == []


# Meters


def test_a_mib_is_1048576_bytes_everywhere():
    assert meters.MIB == memory.MIB == plan.MIB == 1_048_576
    assert plan.GIB == 1_073_741_824


def test_the_meter_of_a_cpu_gives_mib(monkeypatch):
    class Process:
        def memory_info(self):
            return SimpleNamespace(rss=300 * 1_048_576)

    monkeypatch.setattr(psutil, "Process", Process)
    meter, figures = make_meter(torch.device("cpu"), 3), {}
    assert isinstance(meter, CpuMeter)
    outlives = torch.ones(3 * 262_144)  # 3 MiB
    meter.begin_step(0, [outlives])
    with meter.measure(figures):
        first = torch.ones(2 * 262_144)
        del first
        second = torch.ones(262_144)
    assert figures == {"tensor_peak_mib": 5.0, "resident_mib": 300.0}
    # The next stretch begins with what is live.
    with meter.measure(figures):
        pass
    assert figures["tensor_peak_mib"] == 4.0
    del second
    figures.clear()
    meter.begin_step(2, [outlives])
    with meter.measure(figures):
        pass
    assert figures == {"resident_mib": 300.0}


def test_a_meter_of_tensors_counts_every_output_of_an_operator():
    meter = TensorMeter()
    assert (meter.live_bytes, meter.peak_bytes) == (0, 0)
    with meter:
        assert meter.peak_bytes == 0
        values, places = torch.arange(12).float().view(3, 4).max(1)  # 12 int64, 12 float32; then 3 and 3
        assert meter.live_bytes == values.nbytes + places.nbytes == 12 + 24
        assert meter.peak_bytes == 96 + 48


def test_a_meter_of_tensors_counts_dense_ones_in_main_memory():
    meter = TensorMeter()
    with meter:
        elsewhere, sparse = torch.empty(1000, device="meta"), torch.eye(2).to_sparse()
        assert (elsewhere.device.type, sparse.layout) == ("meta", torch.sparse_coo)
        assert meter.live_bytes == 0


def test_a_meter_that_no_step_has_begun_counts_no_tensors():
    figures = {}
    with make_meter(torch.device("cpu"), None).measure(figures):
        pass
    assert set(figures) == {"resident_mib"}


@pytest.mark.parametrize(
    ("every", "counted"), [(None, [0, 1, 10, 20]), (10, [0, 1, 10, 20]), (7, [0, 1, 7, 14, 21])]
)
def test_steps_whose_tensors_are_counted(every, counted):
    meter, found = make_meter(torch.device("cpu"), every), []
    for step in range(22):
        figures = {}
        meter.begin_step(step, [])
        with meter.measure(figures):
            pass
        found += [step] if "tensor_peak_mib" in figures else []
    assert found == counted


def test_the_meter_of_a_gpu_gives_mib_of_its_own_stretch(monkeypatch):
    """By an allocator of our own, as this machine may have none."""
    device, called = torch.device("cuda", 0), []
    answers = {"max_memory_allocated": 3 * 1_048_576, "max_memory_reserved": 5 * 1_048_576}

    def answering(name, value):
        return lambda asked: (called.append((name, asked)), value)[1]

    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, answering(name, value))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", answering("reset", None))
    monkeypatch.setattr(torch.cuda, "mem_get_info", answering("info", (9 * 1_048_576, 16 * 1_048_576)))
    meter, figures = make_meter(device, 5), {}
    assert isinstance(meter, CudaMeter)
    with meter.measure(figures):
        assert called == [("reset", device)]
        assert figures == {}
    assert figures == {"allocated_peak_mib": 3.0, "reserved_peak_mib": 5.0, "device_in_use_mib": 7.0}
    assert {asked for _, asked in called} == {device}


def test_what_outlives_a_step():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.BatchNorm1d(3, affine=False))
    optimizer = torch.optim.AdamW(model.parameters())
    assert [tuple(t.shape) for t in persistent_tensors(model, optimizer)] == [(3, 2), (3,), (3,), ()]
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    shapes = [tuple(t.shape) for t in persistent_tensors(model, optimizer)]
    assert shapes == [(3, 2), (3, 2), (3,), (3,), (), (), (3, 2), (3, 2)]  # the state: its step, two moments


def test_gib_of_a_machine(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=int(15.5 * 1_073_741_824)))
    properties = SimpleNamespace(name="a card", total_memory=80 * 1_073_741_824)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = environment.environment()
    assert found["memory_gib"] == 15.5
    assert found["gpus"] == [{"name": "a card", "memory_gib": 80.0}]


# The summary, by numbers that can be added up


def step(number, reward=None, steps=1, seconds=None, peaks=None, **more):
    return {
        "step": number,
        "reward": reward,
        "steps": steps,
        "time": seconds or {},
        "memory": peaks or {},
        **more,
    }


RECORDS = [
    {"step": 0, "accuracy": 0.2, "accuracy_interval": [0.1, 0.3], "evaluation_seconds": 900.0},
    *(step(n, reward=float(n), rewards={"a": n / 10, "b": None if n < 19 else 1.0}) for n in range(1, 19)),
    step(20, 20.0, 2, {"forward": 1.5, "backward": 2.0}, {"forward": {"tensor_peak_mib": 7.0}}, rewards={"a": 2.0}),
    step(24, None, 4, {"forward": 0.5}, {"forward": {"tensor_peak_mib": 5.0}, "backward": {"tensor_peak_mib": 9.0},
                                         "rewards": {"tensor_peak_mib": 0.25}}),
    {"step": 24, "accuracy": 0.6, "accuracy_interval": [0.5, 0.7]},
]  # fmt: skip


def test_a_summary_by_hand():
    found = summarize(RECORDS)
    assert found["steps"] == 24
    assert (found["accuracy_before"], found["accuracy_after"]) == (0.2, 0.6)
    assert found["before"] == {"accuracy": 0.2, "accuracy_interval": [0.1, 0.3]}
    assert found["seconds"] == {"forward": 1.5 * 2 + 0.5 * 4, "backward": 4.0}
    assert found["seconds_total"] == 9.0
    assert found["memory"] == {
        "forward": {"tensor_peak_mib": 7.0},
        "backward": {"tensor_peak_mib": 9.0},
        "rewards": {"tensor_peak_mib": 0.25},
    }
    assert highest_peak(found, "tensor_peak_mib") == 9.0
    assert highest_peak(found, "resident_mib") is None
    assert found["reward_window"] == 1  # a tenth of the 19 with a reward
    assert (found["reward_first"], found["reward_last"]) == (1.0, 20.0)
    assert found["rewards_first"] == {"a": 0.1, "b": None}
    assert found["rewards_last"] == {"a": 2.0}
    assert (found["device"], found["memory_figure"]) == ("cpu", "tensor_peak_mib")


def test_windows_are_a_tenth_of_the_steps_that_have_a_reward():
    found = summarize([step(n, reward=float(n)) for n in range(1, 31)])
    assert (found["reward_window"], found["reward_first"], found["reward_last"]) == (3, 2.0, 29.0)


@pytest.mark.parametrize(
    ("records", "before", "after"),
    [
        ([], None, None),
        ([{"step": 0, "accuracy": 0.5}], 0.5, None),
        ([{"step": 3, "accuracy": 0.5}], None, 0.5),  # a resumed run whose first is lost
        ([{"step": 0, "accuracy": 0.5}, {"step": 2, "accuracy": None}], 0.5, None),
        ([{"step": 0, "accuracy": 0.1}, {"step": 2, "accuracy": 0.2}, {"step": 4, "accuracy": 0.3}], 0.1, 0.3),
    ],
)  # fmt: skip
def test_before_is_of_step_0_and_after_of_the_last(records, before, after):
    found = summarize(records)
    assert (found["accuracy_before"], found["accuracy_after"]) == (before, after)


def test_a_cards_headline_is_its_allocator():
    peaks = {"forward": {"reserved_peak_mib": 9.0, "allocated_peak_mib": 7.0}}
    found = summarize([step(1, 1.0, seconds={"forward": 3.0, "other": 1.0}, peaks=peaks, device="cuda")])
    assert found["memory_figure"] == "allocated_peak_mib"
    table = by_phase(found)
    assert table.header == (
        "phase", "seconds", "share", "peak of the CUDA allocator", "peak reserved by the CUDA allocator",
    )  # fmt: skip
    assert table.rows == [
        ("forward", "3.0", "75 %", "7.0 MiB", "9.0 MiB"),
        ("other", "1.0", "25 %", "–", "–"),
        ("all", "4.0", "", "7.0 MiB", "9.0 MiB"),
    ]


def test_a_run_that_moved_is_of_the_device_where_it_ended():
    moved = [step(1, 1.0, device="cpu"), step(2, 1.0, device="cuda"), {"step": 2, "accuracy": 0.5}]
    found = summarize(moved)
    assert (found["device"], found["memory_figure"]) == ("cuda", "allocated_peak_mib")


def test_tables_by_hand():
    found = summarize(RECORDS)
    assert by_phase(found).rows == [
        ("forward", "5.0", "56 %", "7.0 MiB"),
        ("backward", "4.0", "44 %", "9.0 MiB"),
        ("all", "9.0", "", "9.0 MiB"),
    ]
    rows = {name: cells for name, *cells in before_and_after(found).rows}
    assert rows["accuracy"] == ["0.200 [0.100, 0.300]", "0.600 [0.500, 0.700]"]
    assert rows["reward, first and last tenth of the steps"] == ["1.000", "20.000"]
    assert rows["  a"] == ["0.100", "2.000"]
    figures = dict(main_figures([("run", found)]).rows)
    assert figures == {
        "optimizer steps": "24",
        "accuracy before": "0.200",
        "accuracy after": "0.600",
        "reward, first tenth of the steps": "1.000",
        "reward, last tenth of the steps": "20.000",
        "training time": "9.0 s",
        "time a step": "0.375 s",
        "highest peak of live tensor bytes": "9.0 MiB",
    }
    assert dict(main_figures([("nothing", summarize([]))]).rows)["time a step"] == "–"


def test_tokens_in_words():
    tokens = {"per_second": 1234.6, "left_out_share": 0.79, "computed": 5678.4, "real": 23539.0}
    assert tokens_in_words(tokens) == {
        "tokens a second": "1,235",
        "tokens a step, real": "23,539",
        "tokens a step, computed": "5,678",
        "completions left out": "79 %",
    }
    assert tokens_in_words({}) == {}
    for name in tokens:
        assert tokens_in_words({**tokens, name: None}) == {}
        assert tokens_in_words({other: tokens[other] for other in tokens if other != name}) == {}


def test_a_sample_is_spread_over_the_batch():
    """The first completions of a batch are all of one prompt."""
    ten = [str(number) for number in range(10)]
    logs = {"prompt": ten, "completion": ten, "rewards": {}, "advantages": ten}
    found = {}
    for count in (0, 1, 3, 10, 40):
        sampled = SimpleNamespace(
            _trainer=SimpleNamespace(_logs=logs), _tracking=TrackingConfig(completions_sample=count)
        )
        found[count] = [int(line["completion"]) for line in Tracker._sample(sampled)]
    assert found == {0: [], 1: [0], 3: [0, 3, 6], 10: list(range(10)), 40: list(range(10))}


def test_a_commit_is_modified_where_a_file_of_it_is(tmp_path, monkeypatch):
    """Not where a file lies beside them, such as a run's."""

    def git(*given):
        call = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *given]
        return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "code.py").write_text("1")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "code.py"))
    git("init"), git("add", "."), git("commit", "-m", "a")
    (tmp_path / "run.json").touch()
    assert environment._git() == {"commit": git("rev-parse", "HEAD"), "modified": False}
    (tmp_path / "code.py").write_text("2")
    assert environment._git()["modified"] is True


def test_processes_are_those_of_all_machines(monkeypatch):
    for name, value in {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert environment.environment()["processes"] == 16


def test_the_device_of_a_process_is_that_of_its_number_on_the_machine(monkeypatch):
    """Of the second machine the tenth process has the second card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    assert environment.device_name() == "card 0"
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert environment.device_name() == "card 1"


def test_what_was_computed_before_the_first_step_is_in_no_figure_of_it():
    """The evaluation before training, and a step of the worst case."""
    calls = []
    session = SimpleNamespace(
        _session_steps=0,
        _speed=SimpleNamespace(begin=lambda: calls.append("forget")),
        _clock=SimpleNamespace(begin_step=lambda step, *_: calls.append(step)),
        _trainer=SimpleNamespace(model=None, optimizer=None),
    )
    for session._session_steps in range(3):
        Tracker.begin_step(session)
    assert calls == ["forget", 0, 1, 2]


def test_without_a_terminal_a_run_is_about_twenty_lines_and_its_last_step(capsys):
    from recipes.tracking.terminal import Progress

    for total, expected in ((3, [1, 2, 3]), (45, [*range(2, 45, 2), 45]), (1000, list(range(50, 1001, 50)))):
        progress = Progress(Console(width=200))
        progress.start(0, total)
        for step in range(1, total + 1):
            progress.logged(step, {"reward": 0.5}, [])
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in lines] == [f"step {step}/{total}" for step in expected]


def test_a_resumed_run_shows_the_accuracy_that_was_measured_last(tmp_path):
    folder, shown = RunFolder.create(tmp_path, "run"), []
    for record in (
        {"step": 0, "accuracy": 0.2},
        {"step": 2, "accuracy": 0.43},
        {"step": 3, "accuracy": None},
    ):
        folder.metrics.write(record)
    begun = SimpleNamespace(
        folder=folder, _clock=None, _trainer=SimpleNamespace(is_world_process_zero=lambda: True),
        _progress=SimpleNamespace(start=lambda *given: shown.append(given)), drop_after=shown.append,
        _last_accuracy=lambda: Tracker._last_accuracy(begun),
    )  # fmt: skip
    optimizer = SimpleNamespace(step=SimpleNamespace(on_a_clock=True))
    Tracker.begin_training(begun, 4, 9, optimizer)
    Tracker.begin_training(begun, 0, 9, optimizer)
    assert shown == [4, (4, 9, 0.43), (0, 9, 0.43)]


def test_a_steps_tokens_are_those_of_all_processes(monkeypatch):
    monkeypatch.setattr("recipes.training.step_metrics.gathered", lambda own: [own, (10, 300, 8, 8)])
    window = StepMeter()
    window.add(computed=999, real=999, rows=999, left_out=999)  # of the window before
    window.begin()
    window.add(computed=70, real=100, rows=16, left_out=2)
    window.add(computed=20, real=100, rows=8, left_out=2)
    assert window.metrics() == {
        "step/tokens_computed": 100.0,
        "step/tokens_real": 500.0,
        "step/left_out": 12 / 32,
    }


def test_measured_beside_planned_in_bytes_and_the_higher_of_two_phases():
    """The plan counts forward and backward as one."""
    peaks = {"generation": 1.5, "forward": 4.0, "backward": 2.0, "rewards": 9.0, "other": 9.0}
    summary = {
        "memory_figure": "tensor_peak_mib",
        "memory": {phase: {"tensor_peak_mib": peak, "resident_mib": 100.0} for phase, peak in peaks.items()},
    }
    assert memory._measured(summary) == {
        "generation": 1_572_864,
        "forward, loss and backward": 4_194_304,
    }
    summary["memory"]["backward"]["tensor_peak_mib"] = 5.0
    assert memory._measured(summary)["forward, loss and backward"] == 5_242_880


@pytest.mark.parametrize(
    ("mib", "text"),
    [(None, "–"), (0.0, "0.0 MiB"), (1023.94, "1023.9 MiB"), (1024.0, "1.00 GiB"), (81_559.0, "79.65 GiB")],
)
def test_units_of_memory(mib, text):
    assert format_mib(mib) == text


def test_the_terminal_shows_the_highest_peak_so_far(capsys):
    from recipes.tracking.terminal import Progress

    progress = Progress(Console(width=200))
    progress.start(0, 3)
    for number, peaks in enumerate(([5.0, 3.0], [2048.0, None], [7.0]), 1):
        progress.logged(number, {"reward": number / 4}, peaks)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 1/3: reward 0.250  accuracy –  peak 5.0 MiB",
        "step 2/3: reward 0.500  accuracy –  peak 2.00 GiB",
        "step 3/3: reward 0.750  accuracy –  peak 2.00 GiB",
    ]
