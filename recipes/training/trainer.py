"""The trainer of a run: TRL's GRPOTrainer, or the one that Unsloth leaves in its place, and the head in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from memhead.integrations.handle import Handle
from recipes.config.load import RunConfig
from recipes.models.adapters import without_adapters
from recipes.models.static_cache import sample_by_graphs
from recipes.tracking.run_folder import RunFolder
from recipes.training.resume import model_to_load
from recipes.training.session import Session
from recipes.training.sharding import keep_precision
from recipes.training.step_choice import trainer_with_step
from recipes.training.vllm_engine import engine
from recipes.training.vllm_server import giving_up, say_where_it_fails


def install_head(config: RunConfig, arguments: Any) -> Handle:
    """Put `head.impl` where the trainer looks for it. arguments: the run's GRPOConfig.

    Raises ValueError for an option that would bypass memhead, naming it.
    """
    if config.model.loader == "unsloth":
        from memhead.integrations import unsloth

        head = config.head
        # No other step computes entropies past memhead.
        looked_at = arguments if config.unsloths_step else None
        return unsloth.install(head.impl, args=looked_at, chunk=head.chunk, backend=head.backend)
    from memhead.integrations import trl

    head = config.head
    parallel = head.parallel == "vocabulary"
    return trl.install(head.impl, chunk=head.chunk, backend=head.backend, vocab_parallel=parallel)


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


@contextmanager
def reference_like_the_model(session: Session) -> Iterator[None]:
    """Has TRL load the reference model as the trained one was: by the name alone it takes the main branch, in float32.

    It says of these options that the model, which is loaded already, ignores them; that is meant so.
    """
    config, arguments, model = session.config, session.arguments, session.model
    if not config.grpo["beta"] or config.lora is not None or config.model.loader == "unsloth":
        yield
        return
    loaded = model_to_load(config, session.folder)
    options = {"revision": loaded.revision, "attn_implementation": loaded.attn_implementation}
    options = {name: value for name, value in options.items() if value is not None}
    log, told = logging.getLogger("trl.trainer.grpo_trainer"), arguments.model_init_kwargs
    log.addFilter(_ignores_no_options)
    arguments.model_init_kwargs = {"dtype": model.dtype, **options}
    try:
        yield
    finally:
        arguments.model_init_kwargs = told
        log.removeFilter(_ignores_no_options)


def _ignores_no_options(record: logging.LogRecord) -> bool:
    return "`model_init_kwargs` will be ignored" not in record.getMessage()


def make_trainer(session: Session) -> Any:
    """The session's trainer; its GRPOConfig gets the rewards' weights.

    Raises ConfigError for a step that was asked for by name and is not exact.
    """
    config, arguments, model = session.config, session.arguments, session.model
    arguments.reward_weights = session.rewards.weights
    unsloth = config.model.loader == "unsloth"  # which has put the adapters on, and whose trainer takes none
    adapters = config.lora.peft_config() if config.lora is not None and not unsloth else None
    if adapters is not None:  # PEFT writes the base's name into them, and no more
        adapters.revision = model_to_load(config, session.folder).revision
    given = {
        "model": model,
        "processing_class": session.tokenizer,
        "args": arguments,
        "train_dataset": session.task.train,
        "reward_funcs": session.rewards.functions,
        "peft_config": adapters,
        "max_bad_steps": config.run.max_bad_steps,
    }
    with engine(config), giving_up(config), reference_like_the_model(session):
        trainer = trainer_with_step(session, given)
    keep_precision(trainer)
    say_where_it_fails(trainer)
    if arguments.cache_implementation == "static" and not (unsloth or arguments.use_vllm):
        sample_by_graphs(trainer, without_adapters(trainer.model))
    if unsloth and "ref" in getattr(model, "peft_config", {}):
        # TRL's trainer copies adapters that a model comes with, as reference. These are new: without them is the
        # same. And of a checkpoint with a copy transformers resumes the copy alone.
        model.delete_adapter("ref")
    return trainer
