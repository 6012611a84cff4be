"""train_grpo.py under ZeRO-3 on a CPU: accelerate launch --config_file configs/accelerate/zero3.yaml zero3_on_cpu.py …

accelerate takes deepspeed where its launcher asks for it, but on a CPU plain DDP, without a word. Here its state is
what it would be on GPUs, and deepspeed talks over gloo; the engine, the trainer and the run are real.
"""

import sys
from typing import Any

import deepspeed.comm
import deepspeed.comm.torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import train_grpo

make_partial, make = PartialState.__init__, AcceleratorState.__init__


def make_partial_for_deepspeed(self: PartialState, *args: Any, **options: Any) -> None:
    first = not PartialState._shared_state
    make_partial(self, *args, **options)
    if first and self.num_processes > 1:
        deepspeed.comm.init_distributed("gloo", verbose=False)
        self.distributed_type = DistributedType.DEEPSPEED


def make_for_deepspeed(self: AcceleratorState, *args: Any, cpu: bool = False, **options: Any) -> None:
    first = not AcceleratorState._shared_state
    make(self, *args, cpu=False, **options)  # with cpu, deepspeed is passed over
    if first:  # else it leaves weights whole that are as small as all of a test's
        self.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


if __name__ == "__main__":
    # Two processes that compile it for the first time at once wait for each other.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    PartialState.__init__ = make_partial_for_deepspeed  # type: ignore[method-assign]
    AcceleratorState.__init__ = make_for_deepspeed  # type: ignore[method-assign]
    sys.exit(train_grpo.main(sys.argv[1:]))
