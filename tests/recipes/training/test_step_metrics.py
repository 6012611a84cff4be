"""The entropy of a window's tokens, whichever process and bin they are in, against one mean over all of them."""

from types import SimpleNamespace

import pytest
import torch

from recipes.training.step_metrics import EntropyMeter


def added(meter, seed, dtype, rows=64):
    """A bin of made-up entropies, its tokens for the loss among them; a third is left out, a row is spare."""
    draw = torch.Generator().manual_seed(seed)
    nats = torch.rand(rows, 32, generator=draw).to(dtype)
    mask = torch.rand(rows, 32, generator=draw) < 0.7
    spare, left_out = torch.arange(rows)[:, None] == 0, torch.arange(rows)[:, None] % 3 == 1
    meter.add(nats.requires_grad_() * 1, mask & ~left_out & ~spare, mask & spare, mask & left_out, 2)
    return nats.detach()[mask & ~left_out & ~spare].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mean_is_of_the_tokens_of_all_processes(dtype):
    meters = EntropyMeter(), EntropyMeter()
    tokens = [added(meter, seed, dtype, rows) for seed, (meter, rows) in enumerate(zip(meters, (64, 7)))]
    tokens.append(added(meters[0], 2, dtype))
    assert not any(
        sums.requires_grad for meter in meters for sums in meter._sums
    )  # no graph outlives its bin
    others = torch.stack(meters[1]._sums).sum(0)
    entries = [0.5] * 6
    meters[0].take(SimpleNamespace(reduce=lambda sums, how: {"sum": sums + others}[how]), entries)
    assert entries[:2] == [0.5, 0.5]  # of an earlier window
    assert entries[2:] == pytest.approx([float(torch.cat(tokens).mean())] * 4, rel=1e-12)


def test_trls_own_entries_stay_where_nothing_is_left_out():
    meter, entries = EntropyMeter(), [0.25, 0.75]
    nothing, all_ = torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    meter.add(torch.ones(2, 3), all_, nothing, nothing, 2)
    meter.take(SimpleNamespace(reduce=lambda sums, how: sums), entries)
    assert entries == [0.25, 0.75]
