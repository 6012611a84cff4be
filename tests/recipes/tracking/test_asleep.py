"""A sleeping vLLM's memory, on a device of two numbers: what is mapped, and what the allocator believes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from recipes.config.load import load_config
from recipes.plan.plan import plan
from recipes.tracking.asleep import sleeping_engine
from recipes.tracking.meters import CudaMeter
from recipes.tracking.run_folder import RunFolder
from recipes.training.memory import write_measured

MIB = 1_048_576
TOTAL = 80_000


class Device:
    """MiB. The allocator counts weights, scratch and the engine's cache, asleep or not."""

    def __init__(self):
        self.weights, self.cache, self.scratch, self.mapped = 6_000, 48_000, 0, True

    @property
    def reserved(self):
        return self.weights + self.cache + self.scratch

    def free(self):
        used = self.weights + self.scratch + (self.cache if self.mapped else 0)
        return TOTAL - used


class Engine:
    def __init__(self, device):
        self.device = device

    def sleep(self, level=1):
        self.device.mapped = False
        self.device.scratch = 0  # the allocator's spare blocks go too
        return level

    def wake_up(self, tags=None):
        self.device.mapped = True
        return tags


@pytest.fixture
def device(monkeypatch):
    made = Device()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (made.free() * MIB, TOTAL * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: made.reserved * MIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda _: made.reserved * MIB)
    return made


def measured(meter, what):
    figures = {}
    with meter.measure(figures):
        what()
    return figures


@pytest.mark.parametrize("slept_before", [True, False])
def test_a_peak_has_the_cache_only_while_the_engine_is_awake(device, slept_before):
    engine, meter = Engine(device), CudaMeter(torch.device("cuda", 0))
    if slept_before:
        engine.sleep()
    meter.asleep.watch(engine)
    assert engine.wake_up(tags=["kv_cache"]) == ["kv_cache"]
    assert engine.sleep(level=2) == 2

    def sample():
        engine.wake_up()
        device.scratch = 500
        engine.sleep()

    def train():
        device.scratch = 2_000

    assert measured(meter, sample)["allocated_peak_mib"] == 54_000
    training = measured(meter, train)
    assert training["allocated_peak_mib"] == training["reserved_peak_mib"] == 8_000
    assert training["asleep_mib"] == 48_000
    assert training["device_in_use_mib"] == 8_000


def test_an_engine_that_never_sleeps_changes_nothing(device):
    figures = measured(CudaMeter(torch.device("cuda", 0)), lambda: None)
    assert figures["allocated_peak_mib"] == 54_000
    assert "asleep_mib" not in figures


def test_whose_engine_sleeps():
    engine = Engine(Device())
    assert sleeping_engine(SimpleNamespace(vllm_generation=SimpleNamespace(llm=engine))) is engine
    assert sleeping_engine(SimpleNamespace(llm=engine, vllm_generation=None)) is engine
    assert sleeping_engine(SimpleNamespace(vllm_generation=SimpleNamespace(mode="server"))) is None
    assert sleeping_engine(SimpleNamespace()) is None


def test_the_cache_as_seen_is_a_part_of_the_plan(tmp_path):
    folder = RunFolder.create(tmp_path, "run")
    parts = {"parameters": 6 * 2**30, "KV cache and sampling": 2**30}
    phases = {"generation": 7 * 2**30, "optimizer": 6 * 2**30}
    planned = plan(load_config("configs/quickstart.yaml"))
    planned = replace(planned, memory=replace(planned.memory, parts=parts, phases=phases))
    memory = {
        "generation": {"allocated_peak_mib": 54 * 1024, "asleep_mib": 48 * 1024},
        "optimizer": {"allocated_peak_mib": 6.5 * 1024, "asleep_mib": 48 * 1024},
    }
    lines = write_measured(planned, folder, {"memory_figure": "allocated_peak_mib", "memory": memory})
    assert lines == [
        "memory  generation: planned 54.00 GiB, measured 54.00 GiB",
        "memory  optimizer: planned 6.00 GiB, measured 6.50 GiB",
    ]
    assert folder.read_json("plan.json")["parts"]["vLLM's cache, as seen"] == 48 * 2**30
