"""A configuration means the same under every loader: TRL's defaults, where Unsloth's GRPOConfig has others.

Unsloth derives a class from TRL's and changes what is left out, the learning rate and the optimizer among it; a few
options it fills in from others. docs/configuration.md promises TRL's, so what Unsloth would change is written out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

# Of TRL 1.15. Fields whose default Unsloth changes too, but to no effect on what is trained, are left to it.
TRL_DEFAULTS: dict[str, Any] = {
    "beta": 0.0,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-6,
    "mask_truncated_completions": False,
    "optim": "adamw_torch_fused",
    "per_device_train_batch_size": 8,
    "vllm_importance_sampling_correction": True,
    "warmup_steps": 0,
    "weight_decay": 0.0,
}


def is_unsloths(grpo_config: type) -> bool:
    """Whether this GRPOConfig is the one that Unsloth derives; on its CPU backend it leaves TRL's."""
    return "unsloth_num_chunks" in inspect.signature(grpo_config).parameters


def trl_meaning(grpo: Mapping[str, Any]) -> dict[str, Any]:
    """The `grpo` section for Unsloth's GRPOConfig, so that it means what it means to TRL's."""
    meant = {**TRL_DEFAULTS, **grpo}
    if meant.get("epsilon_high") is None:  # TRL: as epsilon; Unsloth: 0.28 for dapo, 5 for cispo
        meant["epsilon_high"] = meant.get("epsilon", 0.2)
    if meant.get("loss_type") == "dr_grpo" and meant.get("scale_rewards", "group") in ("group", True):
        meant["scale_rewards"] = None  # Unsloth turns "group" into no scaling, and null into "group"
    return meant
