"""What each of several real processes does for test_processes.py: torchrun on_ranks.py FOLDER CASE …

Every case is a few steps of a trainer on its share of one rollout; its results are FOLDER/rank-N.pt.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from rollouts import Fed, PackedFed, model_of, rollout
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from trl import GRPOConfig

from memhead.integrations import trl as memhead_trl
from recipes import processes
from recipes.models.tokenizers import character_tokenizer
from recipes.training.checkpoints import guarded
from recipes.training.sharding import keep_precision

ROWS, STEPS = 16, 3  # of one process and generation; optimizer steps
PER_PROCESS = 4  # micro-batches
BENCHMARK = "benchmark"


class Case(NamedTuple):
    """How a trainer trains, and the case that one process must equal, by name."""

    alone: str
    settings: dict[str, Any] = {}
    vocabulary: bool = False  # the head is split
    sharded: bool = False  # by FSDP2

    @property
    def packed(self) -> bool:
        return self.alone != "trl"


BINS = {"token_budget": 12}
CASES = {
    "trl": Case("trl"),
    "packed": Case("packed", BINS),
    "packed, one bin": Case("packed", {"token_budget": 10_000}),
    "reused": Case("reused", BINS | {"num_iterations": 2}),
    "lora": Case("lora", BINS | {"lora": True}),
    "kl": Case("kl", BINS | {"lora": True, "beta": 0.1}),
    "trl, split head": Case("trl", vocabulary=True),
    "packed, split head": Case("packed", BINS, vocabulary=True),
    "trl, sharded": Case("trl", sharded=True),
    "packed, sharded": Case("packed", BINS, sharded=True),
    "saved, sharded": Case("packed", BINS | {"save_strategy": "steps", "save_steps": 2}, sharded=True),
    "lora, sharded": Case("lora", BINS | {"lora": True}, sharded=True),
    "kl, split head": Case("kl", BINS | {"lora": True, "beta": 0.1}, vocabulary=True),
    "kl, sharded": Case("kl", BINS | {"lora": True, "beta": 0.1}, sharded=True),
    "packed, sharded, split head": Case("packed", BINS, vocabulary=True, sharded=True),
}
ALONE = {name: case for name, case in CASES.items() if name == case.alone}
# The bonus is a mean over a process's own tokens, so its figure depends on how many processes there are: that of a
# split head is compared with the whole head's in as many.
WITH_ENTROPY = {
    "entropy, whole head": Case("packed", BINS | {"entropy_coef": 0.1}),
    "entropy, split head": Case("packed", BINS | {"entropy_coef": 0.1}, vocabulary=True),
}
# Rounded to bfloat16, in whatever order it comes: parts are compared with the whole model in as many processes.
HALF = {"bf16": True, "lora": True}
IN_HALF = {
    f"{step}, bfloat16{', sharded' * sharded}": Case(step, HALF | bins, sharded=sharded)
    for step, bins in {"trl": {}, "packed": BINS}.items()
    for sharded in (False, True)
}
TOGETHER = WITH_ENTROPY | IN_HALF  # compared with each other, not with one process


def global_rollout(world: int) -> dict[str, Any]:
    """Groups of unequal lengths; the first process has some without advantage, the last nothing but such."""
    fed = rollout("shared", "some", groups=ROWS * world // 4)
    fed["advantages"][-ROWS:] = 0.0
    return fed


def share(fed: dict[str, Any], rank: int) -> dict[str, Any]:
    """A process's rows, padded as far as they need; the number of tokens stays everybody's."""
    own = {k: v[rank * ROWS : (rank + 1) * ROWS] if v.ndim else v for k, v in fed.items()}
    width = int(own["completion_mask"].sum(1).max())
    return {k: v[:, :width] if k.startswith("completion") else v for k, v in own.items()}


def new_model() -> Any:
    """Of a vocabulary that neither two nor three processes divide."""
    return model_of("llama", vocab_size=29)


def train(case: Case, fed: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Some real steps; what came of them."""
    settings = dict(case.settings)
    own = {k: settings.pop(k) for k in ("token_budget",) if k in settings}
    if settings.pop("lora", False):
        torch.manual_seed(2)
        own["peft_config"] = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "gradient_accumulation_steps": PER_PROCESS, "num_generations": 4,
        "per_device_train_batch_size": len(fed["advantages"]) // PER_PROCESS, "max_completion_length": 6,
        "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "beta": 0.0, "max_steps": STEPS, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "max_grad_norm": 0.5, "ddp_find_unused_parameters": False,
    }  # fmt: skip
    model = new_model()
    trainer = guarded(PackedFed if case.packed else Fed)(
        model=model.bfloat16() if settings.get("bf16") else model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(**{**arguments, **settings}),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 64}),
        processing_class=character_tokenizer("abc"),
        **own,
    )
    if case.sharded and processes.count() > 1:
        shard(trainer)
    trainer.fed = fed
    with Gathers() as gathers:
        trainer.train()
    if "save_steps" in settings:
        trainer.save_model(str(folder / "final"))
    weights = {n: whole(p) for n, p in trainer.model.named_parameters() if p.requires_grad}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {"weights": weights, "logs": logs, "gathers": gathers.sizes}


class Gathers(TorchDispatchMode):
    """Numbers of elements of all that was gathered into one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.c10d._allgather_base_.default:  # of FSDP2
            self.sizes.append(args[0].numel())
        elif function is torch.ops._c10d_functional.all_gather_into_tensor.default:  # of a DTensor
            self.sizes.append(found.numel())
        return found


def shard(trainer: Any) -> None:
    """FSDP2 as accelerate does it on GPUs; on a CPU it would quietly take DDP."""
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate leaves it
    trainer.is_fsdp_enabled = True
    if trainer.args.bf16:
        trainer.accelerator.state.fsdp_plugin.set_mixed_precision("bf16")  # as accelerate does, too
    keep_precision(trainer)


def whole(parameter: Any) -> torch.Tensor:
    """A parameter's value, gathered where it is sharded."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def results(fed: dict[str, Any], folder: Path, cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """Of every case."""
    found = {}
    for name, case in cases.items():
        with memhead_trl.install(vocab_parallel=case.vocabulary) as handle:
            found[name] = train(case, fed, folder / name / "checkpoints") | {"calls": handle.calls}
    return found


def benchmark(folder: Path, stage: str) -> None:
    """The rows of a stage of benchmarks.multi_gpu on its toy, added to multi.json."""
    from benchmarks import multi_gpu_rank

    multi_gpu_rank.steps(
        SimpleNamespace(
            stage=stage,
            results=folder / "multi.json",
            scratch=folder,
            until=math.inf,
            models=["toy"],
            toy=True,
        )
    )


def main(folder: Path, names: list[str]) -> None:
    GRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none")  # makes the group
    if BENCHMARK in names:
        benchmark(folder, "ddp")
    fed = global_rollout(processes.count())
    cases = {name: (CASES | TOGETHER)[name] for name in names if name != BENCHMARK}
    found = results(share(fed, processes.rank()), folder, cases)
    torch.save(found, folder / f"rank-{processes.rank()}.pt")
    processes.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
