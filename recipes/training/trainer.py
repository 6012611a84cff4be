"""The trainer of a run: TRL's GRPOTrainer, or the one that Unsloth leaves in its place, and the head in it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from memhead.integrations.handle import Handle
from recipes.config.load import RunConfig
from recipes.tasks import Task
from recipes.training.rewards import Rewards


def install_head(config: RunConfig, arguments: Any) -> Handle:
    """Put `head.impl` where the trainer looks for it. arguments: the run's GRPOConfig.

    Raises ValueError for an option that would bypass memhead, naming it.
    """
    if config.model.loader == "unsloth":
        from memhead.integrations import unsloth

        return unsloth.install(
            config.head.impl, args=arguments, chunk=config.head.chunk, backend=config.head.backend
        )
    from memhead.integrations import trl

    return trl.install(config.head.impl, chunk=config.head.chunk, backend=config.head.backend)


def head_of_warm_start(config: RunConfig, model: Any) -> AbstractContextManager[Any]:
    """memhead in the supervised loss as well, where it is the run's head; Unsloth's own loss has no full logits either.

    Raises ValueError for a model whose loss memhead does not know.
    """
    if config.head.impl != "memhead" or config.model.loader == "unsloth":
        return nullcontext()
    from memhead.integrations import transformers

    return transformers.patch(model, chunk=config.head.chunk, backend=config.head.backend)


def make_trainer(
    config: RunConfig,
    arguments: Any,
    rewards: Rewards,
    task: Task,
    model: Any,
    tokenizer: Any,
) -> Any:
    """The trainer. arguments: the run's GRPOConfig, which gets the rewards' weights."""
    import trl

    arguments.reward_weights = rewards.weights
    unsloth = config.model.loader == "unsloth"  # which has put the adapters on, and whose trainer takes none
    trainer = trl.GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=arguments,
        train_dataset=task.train,
        reward_funcs=rewards.functions,
        peft_config=config.lora.peft_config() if config.lora is not None and not unsloth else None,
    )
    if unsloth and "ref" in getattr(model, "peft_config", {}):
        # TRL's trainer copies adapters that a model comes with, as reference. These are new: without them is the
        # same. And of a checkpoint with a copy transformers resumes the copy alone.
        model.delete_adapter("ref")
    return trainer
