"""train_grpo.py under FSDP2 on a CPU: accelerate launch --config_file configs/accelerate/fsdp2.yaml fsdp_on_cpu.py …

accelerate takes FSDP where its launcher asks for it, but on a CPU plain DDP, without a word. Here it takes FSDP there
too, by the plugin that it makes of what its launcher says; the rest is accelerate's.
"""

import sys
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import train_grpo

make = AcceleratorState.__init__


def make_sharding(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    first = not AcceleratorState._shared_state
    make(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if first:
        assert fsdp_plugin is not None, "the launcher has not asked for FSDP"
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = make_sharding  # type: ignore[method-assign]
    sys.exit(train_grpo.main(sys.argv[1:]))
