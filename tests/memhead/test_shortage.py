"""Where memory fails for a tile, the pass is repeated with half of it, to the same result, and one warning says so.

The allocations fail for real: a process of its own may have no more than so much address space (RLIMIT_AS).
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from memhead.planning import Chunk
from memhead.shortage import in_smaller_tiles, is_out_of_memory

CASES = ("logprobs", "cross_entropy", "chunked_linear")
SCRIPT = """\
import ctypes, os, resource, sys, warnings
import psutil, torch
from torch.nn.functional import cross_entropy
from memhead import chunked_linear, linear_cross_entropy, linear_logprobs

for which in sys.argv[1:]:  # each in a fork of what has imported this much
    if os.fork() == 0:
        break
    print(which, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()

torch.set_num_threads(1)
torch.manual_seed(0)
N, H, V, ROOM = 1024, 8, 32768, 96 * 2**20  # half a tile, and what oneDNN needs for each new shape
hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
targets = torch.randint(0, V, (N,))

def loss(chunk):
    tile = chunk if isinstance(chunk, int) else chunk[0]
    if which == "logprobs":
        found = linear_logprobs(hidden, weight, targets, entropy=True, chunk=chunk)
        return (found.logprobs * torch.linspace(-1, 1, N)).sum() + found.entropy.sum()
    if which == "cross_entropy":
        return linear_cross_entropy(hidden, weight, targets, chunk=tile)
    return chunked_linear(hidden, weight, lambda z, t: cross_entropy(z, t, reduction="none"), targets, chunk=tile)

def run(chunk):
    value = loss(chunk)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))

wanted = run((64, 4096))
ctypes.CDLL(None).malloc_trim(0)  # what free() has kept back would add to the room
before = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (before + ROOM, resource.RLIM_INFINITY))
try:
    torch.empty(N * V)  # 128 MiB: the whole tile
    sys.exit("the limit does not hold")
except RuntimeError:
    pass
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("default")
    for _ in range(2):
        found = run((N, V))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for a, b in zip(found, wanted, strict=True):
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
texts = [str(w.message) for w in said]
assert len(texts) == len(set(texts)) == 1 and "out of memory with a tile" in texts[0], texts
"""


@pytest.fixture(scope="module")
def ended():
    """Exit status by case, and what all of them said."""
    call = [sys.executable, "-c", SCRIPT, *CASES]
    done = subprocess.run(call, capture_output=True, text=True, timeout=240)
    return dict(line.split() for line in done.stdout.splitlines()), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
@pytest.mark.parametrize("which", CASES)
def test_a_pass_that_runs_out_of_memory_is_repeated(which, ended):
    status, errors = ended
    assert status[which] == "0", errors[-3000:]


def test_the_tile_is_halved_to_its_least():
    tile, seen = Chunk(1000, 300), []
    while tile is not None:
        seen.append(tile)
        tile = tile.halved()
    assert seen == [(1000, 300), (500, 300), (250, 300), (125, 300), (62, 300), (32, 300), (32, 128)]
    assert Chunk(32, 200).halved() is None


def test_what_no_tile_helps_is_the_callers():
    def run(rows):
        seen.append(rows)
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    seen: list[int] = []
    with pytest.raises(torch.OutOfMemoryError):
        in_smaller_tiles(8, lambda n: n // 2 or None, run)
    assert seen == [8, 4, 2, 1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not execute a primitive"),
    ],
)
def test_every_way_to_say_that_memory_is_out(error):
    with pytest.warns(RuntimeWarning, match="repeated with a smaller one"):
        assert in_smaller_tiles(8, lambda n: n // 2, lambda n: fail(error) if n > 2 else n) == 2


def fail(error):
    raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not fit"),
        RuntimeError("could not create a primitive descriptor for the matmul"),
        RuntimeError(
            "This is a transient race on a shared GPU, NOT an out of memory error. Free VRAM went up"
        ),
        ValueError("out of memory"),
        KeyError("x"),
    ],
)
def test_other_errors_are_not_tried_again(error):
    def run(rows):
        seen.append(rows)
        raise error

    seen: list[int] = []
    with pytest.raises(type(error)):
        in_smaller_tiles(8, lambda n: n // 2, run)
    assert seen == [8]
    assert not is_out_of_memory(error)
