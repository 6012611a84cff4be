"""The trainer of a run: TRL's GRPOTrainer, or the one that Unsloth leaves in its place, and the head in it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from memhead.integrations.handle import Handle
from recipes.config.load import RunConfig
from recipes.tracking.run_folder import RunFolder
from recipes.training.session import Session


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


def count_calls(handle: Handle, folder: RunFolder) -> None:
    """Keep how often the head was called, the run's earlier sessions included."""
    earlier = folder.read_json("head.json") or {"calls": 0, "rows": 0}
    calls, rows = earlier["calls"] + handle.calls, earlier["rows"] + handle.rows
    folder.write_json("head.json", {"impl": handle.impl, "calls": calls, "rows": rows})


def make_trainer(session: Session) -> Any:
    """The session's trainer; its GRPOConfig gets the rewards' weights."""
    config, arguments, model = session.config, session.arguments, session.model
    arguments.reward_weights = session.rewards.weights
    unsloth = config.model.loader == "unsloth"  # which has put the adapters on, and whose trainer takes none
    adapters = config.lora.peft_config() if config.lora is not None and not unsloth else None
    trainer_class, options = _step(config, arguments, model, adapters)
    trainer = trainer_class(
        model=model,
        processing_class=session.tokenizer,
        args=arguments,
        train_dataset=session.task.train,
        reward_funcs=session.rewards.functions,
        peft_config=adapters,
        **options,
    )
    if unsloth and "ref" in getattr(model, "peft_config", {}):
        # TRL's trainer copies adapters that a model comes with, as reference. These are new: without them is the
        # same. And of a checkpoint with a copy transformers resumes the copy alone.
        model.delete_adapter("ref")
    return trainer


def _step(config: RunConfig, arguments: Any, model: Any, adapters: Any) -> tuple[type, dict[str, Any]]:
    """The trainer's class by `step.impl`, and what it takes beside TRL's arguments. Says so where it cannot pack."""
    import trl

    if config.step.impl == "trl" or config.model.loader == "unsloth":  # whose trainer has a step of its own
        return trl.GRPOTrainer, {}
    from recipes.training.packed_attention import varlen_available
    from recipes.training.packed_step import packed
    from recipes.training.packed_support import half_precision, why_not

    varlen = varlen_available(arguments.device, half=half_precision(model, arguments))
    reason = why_not(model, arguments, adapters, varlen=varlen)
    if reason is not None:
        print(f"step.impl: packed would not be exact, so TRL's step is used: {reason}", flush=True)
        return trl.GRPOTrainer, {}
    return packed(trl.GRPOTrainer), {"token_budget": config.step.token_budget}
