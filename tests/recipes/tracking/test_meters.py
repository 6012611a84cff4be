"""The meters of memory against bytes that can be counted by hand."""

import gc

import psutil
import pytest
import torch

from recipes.tracking.meters import MIB, CpuMeter, CudaMeter, TensorMeter, make_meter, persistent_tensors

SIDE = 512
SIZE = SIDE * SIDE * 4  # bytes of one float32 matrix


def matrix():
    return torch.empty(SIDE, SIDE).fill_(1.0)


def test_a_storage_counts_once_until_it_is_freed():
    with TensorMeter() as meter:
        one = matrix()
        view = one.view(-1)[10:].reshape(2, -1)
        assert meter.live_bytes == SIZE
        two = one + 1
        assert meter.live_bytes == 2 * SIZE
        del one
        assert meter.live_bytes == 2 * SIZE  # the view keeps it
        del view
        assert meter.live_bytes == SIZE
        del two
    assert meter.live_bytes == 0
    assert meter.peak_bytes == 2 * SIZE


def test_what_autograd_saves_and_the_backward_allocates():
    weight = torch.ones(SIDE, SIDE, requires_grad=True)
    meter = TensorMeter()
    meter.watch([weight])
    with meter:
        loss = (weight * 2).exp().sum()  # exp keeps its result for the backward
        assert meter.live_bytes == 2 * SIZE + 4
        loss.backward()
    assert meter.live_bytes == 2 * SIZE + 4  # the weight, its gradient, the loss
    assert meter.peak_bytes >= 3 * SIZE
    weight.grad = None  # outside the meter: noticed all the same
    assert meter.live_bytes == SIZE + 4


def test_in_place_operators_and_views_allocate_nothing():
    x = matrix()
    meter = TensorMeter()
    meter.watch([x])
    with meter:
        x.add_(1).mul_(2).t().clamp_(0)
        torch.add(x, 1, out=x)
    assert meter.peak_bytes == SIZE


def test_the_meter_changes_no_result():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 32)
    plain = layer(x)
    plain.sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with TensorMeter():
        metered = layer(x)
        metered.sum().backward()
    assert torch.equal(plain, metered)
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, layer.parameters(), strict=True))


def test_cpu_meter_counts_on_chosen_steps_only():
    meter = CpuMeter(every=4)
    counted = []
    for step in range(9):
        meter.begin_step(step, [])
        figures = {}
        with meter.measure(figures):
            held = matrix()
        resident = psutil.Process().memory_info().rss / 1_048_576
        assert figures["resident_mib"] == pytest.approx(resident, rel=0.05)
        if "tensor_peak_mib" in figures:
            counted.append(step)
            assert figures["tensor_peak_mib"] == pytest.approx(SIZE / MIB, rel=1e-3)
        del held
        gc.collect()
    assert counted == [0, 1, 4, 8]


def test_persistent_tensors_are_weights_gradients_buffers_and_optimizer_state():
    model = torch.nn.Sequential(torch.nn.Linear(SIDE, SIDE, bias=False), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model[0](torch.ones(1, SIDE)).sum().backward()
    optimizer.step()
    large = [t for t in persistent_tensors(model, optimizer) if t.numel() == SIDE * SIDE]
    assert len(large) == 4  # the weight, its gradient, two moments


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_meter_reads_the_allocator():
    device = torch.device("cuda", torch.cuda.current_device())
    meter = make_meter(device, None)
    assert isinstance(meter, CudaMeter)
    before = torch.cuda.memory_allocated(device) / MIB
    figures = {}
    with meter.measure(figures):
        held = torch.empty(64 * MIB, dtype=torch.uint8, device=device)
        del held
    assert figures["allocated_peak_mib"] - before == pytest.approx(64, abs=2)
    assert figures["reserved_peak_mib"] >= figures["allocated_peak_mib"]
    assert figures["device_in_use_mib"] > 0
