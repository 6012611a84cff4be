"""Trackers in addition to the run folder's own files: `tracking.report_to`.

tensorboard    event files in runs/<name>/tensorboard; look at them with `tensorboard --logdir runs`
trackio        its own local store; `trackio show --project memhead`
wandb          wandb.ai, or a local folder after `wandb offline`; the project is what WANDB_PROJECT names

transformers' callbacks do the writing. They get what TRL logs, the seconds and MiB by phase, and the evaluations.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from recipes.problems import Problem
from recipes.tracking.run_folder import RunFolder


def missing(report_to: str) -> Iterator[Problem]:
    """What the tracker lacks on this machine: its package, or somewhere to write."""
    if report_to == "none":
        return
    if importlib.util.find_spec(report_to) is None:
        remedy = f"pip install {report_to}, or set it to none: the run folder's own files are always written"
        yield Problem("tracking.report_to", "its package is not installed", report_to, remedy)
    elif report_to == "wandb" and not _wandb_can_write():
        remedy = "log in: wandb login; or write to this machine alone: wandb offline"
        yield Problem("tracking.report_to", "not logged in", report_to, remedy)


def _wandb_can_write() -> bool:
    """Whether wandb.init will not ask for a key in the middle of the run."""
    import wandb

    offline = wandb.setup().settings.mode in ("offline", "disabled")
    return offline or wandb.login(prompt=False, verify=False)


def keep_in_folder(trainer: Any, folder: RunFolder) -> None:
    """TensorBoard's files beside the run's others; transformers would put them below the checkpoints."""
    from transformers.integrations import TensorBoardCallback  # not before Unsloth, which preflight imports

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(folder.path / "tensorboard")


def evaluated(trainer: Any, figures: dict[str, Any]) -> None:
    """Hands an evaluation's figures to the trackers; an interval as its two ends."""
    logs: dict[str, float] = {}
    for name, value in figures.items():
        ends = zip(("low", "high"), value, strict=True) if isinstance(value, list) else [("", value)]
        logs.update({f"eval_{name}{end and '_' + end}": number for end, number in ends})
    # The callback handler's on_log would also remove the step's log, which is still to come, from the trainer's list.
    trainer.callback_handler.call_event("on_log", trainer.args, trainer.state, trainer.control, logs=logs)
