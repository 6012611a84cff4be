"""The trainer of a run: TRL's GRPOTrainer, or the one that Unsloth leaves in its place, and the head in it."""

from __future__ import annotations

from typing import Any

from memhead.integrations.handle import Handle
from recipes.config import RunConfig


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


def make_trainer(
    config: RunConfig,
    arguments: Any,
    rewards: tuple[list[Any], list[float]],
    task: Any,
    model: Any,
    tokenizer: Any,
) -> Any:
    """The trainer. rewards: the functions and their weights."""
    import trl

    functions, arguments.reward_weights = rewards
    by_trainer = config.lora is not None and config.model.loader != "unsloth"  # which has put them on
    return trl.GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=arguments,
        train_dataset=task.train_dataset(config.task.options, config.run.seed),
        reward_funcs=functions,
        peft_config=config.lora.peft_config() if config.lora is not None and by_trainer else None,
    )
