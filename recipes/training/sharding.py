"""FSDP2 as accelerate sets it up, in the precision of a run in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback


def keep_precision(trainer: Any) -> None:
    """Before a trainer shards its model: what the model returns keeps its dtype, and gradients add up in float32.

    accelerate's policy for bfloat16 rounds all that the model returns, and with it the log-probabilities, one of -8 by
    up to 0.016; and it sums gradients in bfloat16, over micro-batches and over processes.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and plugin.fsdp_version == 2 and policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        trainer.add_callback(_GatheredOnce())


class _GatheredOnce(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        gather_once(model)


def gather_once(model: torch.nn.Module) -> None:
    """Gathers each part of a sharded model, and lets go of it.

    A head whose module is never called, since its weight is gathered for a fused head, has no gathered form otherwise,
    and torch looks there for a gradient to put into float32.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()
