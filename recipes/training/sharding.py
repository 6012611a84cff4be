"""FSDP2 as accelerate sets it up, in the precision of a run in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def keep_precision(trainer: Any) -> None:
    """Before a trainer shards its model: what the model returns keeps its dtype.

    accelerate's policy for bfloat16 rounds all of it, and with it the log-probabilities: one of -8 by up to 0.016.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and plugin.fsdp_version == 2 and policy is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)
