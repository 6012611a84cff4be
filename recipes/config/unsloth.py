"""Unsloth, as far as a configuration is concerned: importing it, and giving a configuration the same meaning under it.

Unsloth rewrites TRL's trainers when it is imported, so it comes before TRL, and at that moment it reads whether vLLM
should sleep between generations. It derives a class from TRL's GRPOConfig with other defaults, for the learning rate
and the optimizer among others, and fills in a few options from others. docs/configuration.md promises TRL's defaults,
so every field is passed to the class.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

MAX_SEQ_LENGTH = 2048  # Unsloth's own default
_STANDBY = "UNSLOTH_VLLM_STANDBY"
_OF_ITS_LOSS = (
    "UNSLOTH_GRPO_ROLLOUT_LOGPROBS_AS_OLD", "UNSLOTH_GRPO_ZERO_VARIANCE_EXCLUDE", "UNSLOTH_GRPO_LOSS_AGGREGATION",
    "UNSLOTH_GRPO_VLLM_IS_MODE", "UNSLOTH_GRPO_VLLM_IS_CLIP", "UNSLOTH_GRPO_ROLLOUT_RS",
    "UNSLOTH_GRPO_TRUNCATED_SUPPORT",
)  # fmt: skip
_OFF = ("", "0", "false", "no", "off")
_failures: list[
    Exception
] = []  # of the first try: once half imported, Unsloth fails with messages that mislead


def import_unsloth(standby: bool = False) -> None:
    """Import it, before TRL. standby: `model.vllm_standby`.

    Raises:
        ImportError, NotImplementedError, RuntimeError: it is missing, or does not work here.
        ValueError: this process has imported it with the other `standby`.
    """
    wanted = "1" if standby else "0"
    if "unsloth" in sys.modules:
        if os.environ.get(_STANDBY, "0") != wanted:
            raise ValueError(
                f"model.vllm_standby: {str(standby).lower()}, but this process has imported Unsloth with the "
                "other choice, which it reads once; start a new process (in a notebook: restart the kernel)"
            )
        return
    if _failures:
        raise _failures[0]
    os.environ[_STANDBY] = wanted  # the only way to tell Unsloth
    try:
        import unsloth  # noqa: F401
    except Exception as error:
        _failures.append(error)
        raise


def set_for_its_loss() -> list[str]:
    """Environment variables that the loss of Unsloth's own step reads and TRL's does not, as they are set."""
    values = {name: os.environ.get(name, "") for name in _OF_ITS_LOSS}
    return [f"{name}={value}" for name, value in values.items() if value.lower() not in _OFF]


def is_unsloths(grpo_config: type) -> bool:
    """Whether this GRPOConfig is the one that Unsloth derives; on its CPU backend it keeps TRL's."""
    return "unsloth_num_chunks" in inspect.signature(grpo_config).parameters


def trl_meaning(grpo: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of the `grpo` section, so that Unsloth's GRPOConfig means what TRL's means."""
    meant = dict(grpo)
    if grpo["epsilon_high"] is None:  # TRL: as epsilon; Unsloth: 0.28 for dapo, 5 for cispo
        meant["epsilon_high"] = grpo["epsilon"]
    if grpo["loss_type"] == "dr_grpo" and grpo["scale_rewards"] in ("group", True):
        meant["scale_rewards"] = None  # Unsloth turns "group" into no scaling, and null into "group"
    return meant
