"""One process of a stage of benchmarks.multi_gpu, which starts it."""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.packed_models import CHECKPOINTING, MODELS, make_model
from benchmarks.rollouts import SHAPES, SIZE, TOY_SHAPES, Shape, rollout
from recipes import processes
from recipes.training.sharding import gather_once, keep_precision

GIB = 2**30
GROUPS = {"llama-1b": 16, "llama-8b": 4, "toy": 4}  # of the rollout, all processes together
ROWS, WIDTH, VOCABULARY = 8192, 4096, 128256  # of the head alone
QUEUED = 5  # passes of it in a row, as in a step: the GPU need not wait for the host


class Way(NamedTuple):
    """How a window is computed."""

    name: str
    step: str  # with the head, what is compared across numbers of GPUs
    packed: bool
    head: str
    split: bool = False


def ways(stage: str, toy: bool) -> list[Way]:
    """Of a stage, the most important first."""
    stock = "full" if toy else "trl"  # TRL 1.15 has no head for a CPU
    packed = Way("packed, memhead", "packed", True, "memhead")
    found = [packed, Way(f"TRL's step, its head ({stock})", "trl", False, stock)]
    if stage != "one":
        found.insert(1, Way("packed, memhead, vocabulary split", "packed", True, "memhead", True))
    return [*found, Way("TRL's step, full logits", "full", False, "full")]


def make_trainer(way: Way, stage: str, name: str, shape: Shape, toy: bool) -> Any:
    """A trainer on its share of the rollout, as `train()` leaves it before the first step."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from recipes.models.tokenizers import character_tokenizer
    from recipes.training.packed_step import packed

    class Fed(packed(GRPOTrainer) if way.packed else GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            return dict(self.fed)

    count = processes.count()
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=toy, per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=shape.groups // count, num_generations=SIZE, bf16=not toy,
        max_completion_length=shape.longest, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = Fed(
        model=make_model(name, toy),
        processing_class=character_tokenizer("0123456789"),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * SIZE * count),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
    )
    if CHECKPOINTING[name]:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    if stage == "fsdp2":
        shard(trainer, toy)
    trainer.create_optimizer()
    trainer.wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    if stage == "fsdp2":
        trainer.model = trainer.wrapped
        gather_once(trainer.model)
    trainer.current_gradient_accumulation_steps = arguments.gradient_accumulation_steps
    trainer.model.train()
    trainer.fed = share(rollout(shape, MODELS[name]["vocab_size"], 0.0, trainer.accelerator.device))
    return trainer


def shard(trainer: Any, toy: bool) -> None:
    """FSDP2 by accelerate, as its launcher asks for it; said here, because on a CPU it would quietly take DDP."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    if not toy:
        plugin.set_mixed_precision("bf16")
    trainer.accelerator.state.fsdp_plugin = plugin
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate leaves it
    trainer.is_fsdp_enabled = True
    keep_precision(trainer)


def share(fed: dict[str, Any]) -> dict[str, Any]:
    """This process's groups; the number of tokens stays that of all."""
    rows = len(fed["advantages"]) // processes.count()
    mine = slice(processes.rank() * rows, (processes.rank() + 1) * rows)
    return {k: v[mine] if v.ndim else v for k, v in fed.items()}


def window(trainer: Any) -> float:
    """Forward and backward of one accumulation window, gradients exchanged; the mean of the processes' losses."""
    trainer._step, trainer._buffered_inputs = 0, None
    count = trainer.args.gradient_accumulation_steps
    losses = []
    for place in range(count):
        last = place == count - 1
        trainer.accelerator.gradient_state._set_sync_gradients(last)
        with nullcontext() if last else trainer.accelerator.no_sync(trainer.wrapped):
            losses.append(trainer.training_step(trainer.wrapped, None, None))
    return statistics.mean(processes.gathered(float(torch.stack(losses).sum())))


def gradient(trainer: Any) -> Tensor:
    """The gradients of all adapters as one float32 vector on the host; whole on every process."""
    found = []
    for parameter in trainer.model.parameters():
        grad = parameter.grad
        if grad is not None:
            found.append((grad.full_tensor() if isinstance(grad, DTensor) else grad).float().flatten().cpu())
    trainer.model.zero_grad(set_to_none=True)
    return torch.cat(found)


def timed(function: Callable[[], Any], rounds: int) -> float:
    """Median seconds of a function that has been called before; processes begin together, the slowest counts."""
    seconds = []
    for _ in range(rounds):
        processes.gathered(None)
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(max(processes.gathered(time.perf_counter() - began)))
        if sum(seconds) > 6:
            break
    return statistics.median(seconds)


def measure(way: Way, name: str, row: dict[str, Any], options: argparse.Namespace) -> None:
    """Fills and keeps one row: loss, gradient beside one GPU's, seconds, peaks."""
    from memhead.integrations import trl as memhead_trl

    shape = (TOY_SHAPES if options.toy else SHAPES)["gsm8k"]._replace(groups=GROUPS[name])
    stage = options.stage
    with memhead_trl.install(way.head, vocab_parallel=way.split) as handle:
        trainer = make_trainer(way, stage, name, shape, options.toy)
        row["loss"] = window(trainer)
        row["calls"] = handle.calls
        found = gradient(trainer)
        reference = options.scratch / f"{name}.pt"  # of one GPU's packed step, the first of all
        if stage == "one" and way.packed:
            torch.save(found, reference)
        elif reference.exists():
            expected = torch.load(reference)
            row["gradient_error"] = float((found - expected).norm() / expected.norm())
        del found

        def once() -> None:
            window(trainer)
            trainer.model.zero_grad(set_to_none=True)

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row["seconds"] = timed(once, 3)
        peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
        row["peak_gib"] = processes.gathered(peak)
        keep(row, options)
        if stage == "fsdp2" and way.packed and not way.split:
            trace(trainer, handle, name, options)


class Gathers(TorchDispatchMode):
    """Counts what is gathered into one tensor, by its number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.c10d._allgather_base_.default:  # of FSDP2
            self.times[args[0].numel()] += 1
        elif function is torch.ops._c10d_functional.all_gather_into_tensor.default:  # of a DTensor
            self.times[found.numel()] += 1
        return found


def trace(trainer: Any, handle: Any, name: str, options: argparse.Namespace) -> None:
    """What FSDP2 gathers in one window, counted, and kept as a trace of the profiler."""
    from torch.profiler import ProfilerActivity, profile

    calls = handle.calls
    vocabulary, width = MODELS[name]["vocab_size"], MODELS[name]["hidden_size"]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler, Gathers() as gathers:
        window(trainer)
    trainer.model.zero_grad(set_to_none=True)
    if not processes.is_main():
        return
    if name != "llama-8b":  # whose trace is twice as large and says the same
        keep_trace(profiler, options.results.with_name(f"multi_fsdp2_{name}.json.gz"))
    found = []
    for size, times in sorted(gathers.times.items()):
        what = ", the head's weight among them" if size >= vocabulary * width else ""
        found.append((size, times, what))
    keep({"stage": "fsdp2", "model": name, "calls": handle.calls - calls, "gathered": found}, options)


def keep_trace(profiler: Any, path: Path) -> None:
    """Of the profiler's trace what says when a device computed and gathered, and FSDP2's own marks."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(whole))
        events = json.loads(whole.read_text(encoding="utf-8"))["traceEvents"]
    kept = [
        event
        | {"name": event["name"][:80]}
        | ({} if event["ph"] == "M" or "nccl" in event["name"] else {"args": {}})
        for event in events
        if event.get("ph") == "M" or event.get("cat") == "kernel" or "FSDP" in event.get("name", "")
    ]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": kept}, file)


def head_alone(options: argparse.Namespace) -> None:
    """The split head on the same rows, beside two products of its size, its messages, and a try to overlap them."""
    from memhead.own_rows import even_sizes, own_logprobs, part_of
    from memhead.parallel import vocab_parallel_logprobs
    from memhead.planning import default_tile

    toy = options.toy
    rows, width, vocabulary = (64, 32, 503) if toy else (ROWS, WIDTH, VOCABULARY)
    device = torch.device("cpu") if toy else torch.device("cuda", processes.rank())
    dtype = torch.float32 if toy else torch.bfloat16
    torch.manual_seed(0)
    mine, sizes = part_of(vocabulary), even_sizes(vocabulary)
    hidden = torch.randn(rows, width, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device, dtype=dtype) / width**0.5)[mine].clone()
    targets = torch.randint(vocabulary, (rows,), device=device)
    grad = torch.randn(rows, device=device)
    groups = [dist.new_group() for _ in range(2)]
    streams = [None, None] if toy else [torch.cuda.Stream(), torch.cuda.Stream()]

    def backward(*logprobs: Tensor) -> None:
        hidden.grad = None
        torch.autograd.backward(logprobs, list(grad.split([len(x) for x in logprobs])))

    def overlapped() -> None:
        """Two halves of the rows, each on a stream and in a group of its own: one computes while the other talks."""
        found = []
        for part, labels, group, stream in zip(hidden.chunk(2), targets.chunk(2), groups, streams):
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                if stream is not None:
                    stream.wait_stream(torch.cuda.default_stream())
                found.append(vocab_parallel_logprobs(part, weight, labels, group=group, sizes=sizes).logprobs)
        for stream in streams:
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)
        backward(*found)

    logits = torch.empty(rows, len(weight), device=device, dtype=dtype)
    by_hidden = torch.empty(rows, width, device=device, dtype=dtype)

    def products() -> None:
        torch.mm(hidden.detach(), weight.t(), out=logits)
        torch.mm(logits, weight, out=by_hidden)

    tile = min(rows, default_tile(device.type, 4).rows)
    stats, wide = torch.zeros(4, tile, device=device), torch.zeros(rows, width, device=device)

    def messages() -> None:
        """As many and as large as the head's."""
        for _ in range(-(-rows // tile)):
            dist.all_reduce(stats, dist.ReduceOp.MAX)
            dist.all_reduce(stats)
        dist.all_reduce(wide)

    contestants: dict[str, Callable[[], Any]] = {
        "floor: two products of half the vocabulary": products,
        "its messages alone": messages,
        "split head, forward and backward": lambda: backward(
            vocab_parallel_logprobs(hidden, weight, targets, sizes=sizes).logprobs
        ),
        "split head, this many rows of its own in each process": lambda: backward(
            own_logprobs(hidden, weight, targets, sizes=sizes).logprobs
        ),
        "split head, no gradient": lambda: vocab_parallel_logprobs(
            hidden.detach(), weight, targets, sizes=sizes
        ),
        "split head, forward and backward, two streams that overlap": overlapped,  # last: two groups may wait for ever
    }
    floor = None
    for what, function in contestants.items():
        row = {"stage": "head", "what": what}
        if (kept := processes.by_main(lambda row=row: begun(row, options))) is not None:
            floor = kept.get("ms") if floor is None else floor
            continue
        keep(row | {"error": "did not end"}, options)
        for _ in range(2):
            function()
        row["ms"] = ms = (
            1000 / QUEUED * timed(lambda function=function: [function() for _ in range(QUEUED)], 5)
        )
        floor = ms if floor is None else floor
        products_in_it = 2 if "of its own" in what else 0.5 if "no gradient" in what else 1
        keep(row | {"of_floor": ms / (floor * products_in_it)}, options)


SAME = ("stage", "model", "way", "what", "gathered")  # keys by which a row is known, beside those it lacks


def begun(row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any] | None:
    """What is kept of this row, if it has been begun: of an earlier try of the stage, or of this one. Main process."""
    rows = json.loads(options.results.read_text())["rows"]
    return next((r for r in rows if all(r.get(key) == row.get(key) for key in SAME)), None)


def keep(row: dict[str, Any], options: argparse.Namespace) -> None:
    """A row of the results, in place of the one it was begun with; by the main process."""
    if not processes.is_main():
        return
    print(json.dumps(row), flush=True)
    earlier = begun(row, options)
    results = json.loads(options.results.read_text())
    results["rows"] = [r for r in results["rows"] if r != earlier] + [row]
    if not options.toy:
        name = torch.cuda.get_device_name()
        results["device"] = f"{name}, torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}"
    options.results.write_text(json.dumps(results, indent=1) + "\n")


@contextmanager
def freed() -> Iterator[None]:
    """Nothing of a way stays for the next."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    """One process of a stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args(argv)
    from trl import GRPOConfig

    GRPOConfig(output_dir=tempfile.mkdtemp(), use_cpu=options.toy, bf16=not options.toy, report_to="none")
    if options.stage == "head":
        head_alone(options)
    else:
        steps(options)
    processes.end()


def steps(options: argparse.Namespace) -> None:
    """The rows of a stage, in the group of processes that is there."""
    for name in options.models:
        for way in ways(options.stage, options.toy):
            if processes.anywhere(time.time() > options.until):
                return
            with freed():
                step(way, name, options)


def step(way: Way, name: str, options: argparse.Namespace) -> None:
    """Measures, unless an earlier try of the stage began it; an error ends all processes, or the others would wait."""
    stage = options.stage
    row = {"stage": stage, "model": name, "processes": processes.count(), "step": way.step}
    row["way"] = f"{stage if stage != 'one' else 'one process'}: {way.name}"
    if processes.by_main(lambda: begun(row, options)) is not None:
        return
    keep(row | {"error": "did not end; the output says why"}, options)
    try:
        measure(way, name, row, options)
    except torch.OutOfMemoryError as error:
        keep(row | {"error": f"out of memory: {error}".splitlines()[0][:120]}, options)
        raise


if __name__ == "__main__":
    main()
