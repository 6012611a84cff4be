"""Before the first step, one with the longest prompt and the longest completions in a full batch, without an update.

What does not fit fails here, within the first minute, and not hours later at the first batch in which everything is
long. Gradients are discarded; as many bytes stand in for the optimizer's state, which is made at the first update;
completions are not generated. Nothing that the run draws or records afterwards changes because of it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from memhead.shortage import is_out_of_memory
from recipes.models.generation import encode
from recipes.models.prompts import widest
from recipes.tracking.phases import in_phase
from recipes.training.session import Session

PHASE = "a worst-case step before the first: forward"
# Attributes of TRL's trainer and of the packed step that one step leaves for the next.
STATE = (
    "_step", "_buffered_inputs", "_metrics", "_rollout", "_place", "_meter", "_entropy", "_gap", "_ratios", "_flow",
    "_even_bins",
)  # fmt: skip


def require_room(session: Session, trainer: Any) -> None:
    """Runs the step, unless `run.checks` is off or the trainer is Unsloth's. What does not fit raises as it would.

    Nor where FSDP or DeepSpeed will shard the model, which here is still whole.
    """
    if not session.config.run.checks or session.config.model.loader == "unsloth":
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        print("worst case  not tried: the model is sharded only when training begins", flush=True)
        return
    began = time.perf_counter()
    batch = worst_case(session, trainer)
    with in_phase(PHASE), _undisturbed(trainer, batch), _optimizer_state(session, trainer):
        try:
            _take(trainer)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # Any other error may come from the made-up batch, and says nothing about real ones.
            print(f"No worst-case step could be taken: {type(error).__name__}: {error}", flush=True)
            return
    prompt, completion = batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]
    seconds = time.perf_counter() - began
    print(
        f"worst case  {len(batch['prompt_ids'])} × ({prompt} + {completion} tokens) fits  {seconds:.0f} s",
        flush=True,
    )


def worst_case(session: Session, trainer: Any) -> dict[str, Any]:
    """The batch that TRL's trainer passes to its loss: prompts (B, P) and completions (B, K), as long as possible."""
    arguments, device = trainer.args, trainer.accelerator.device
    rows, completion = (
        arguments.per_device_train_batch_size * arguments.steps_per_generation,
        (arguments.max_completion_length),
    )
    prompt = longest_prompt(session)
    group = torch.arange(rows) // trainer.num_generations
    prompts = prompt.repeat(rows, 1)
    # No two groups have the same prompt.
    prompts[:, 0] = (prompts[:, 0] + group) % trainer.model.get_input_embeddings().weight.shape[0]
    completions = prompt[-1].repeat(rows, completion)
    ones = torch.ones(rows, completion, device=device)
    batch: dict[str, Any] = {
        "prompt_ids": prompts.to(device),
        "prompt_mask": torch.ones_like(prompts).to(device),
        "completion_ids": completions.to(device),
        "completion_mask": ones.long(),
        "advantages": (torch.arange(rows) % 2 * 2.0 - 1.0).to(device),
        "num_items_in_batch": torch.tensor(rows * completion, device=device),
    }
    if trainer.beta != 0.0:
        batch["ref_per_token_logps"] = -ones
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        batch |= {"sampling_per_token_logps": -ones, "importance_sampling_ratio": ones}
    return batch


def longest_prompt(session: Session) -> torch.Tensor:
    """The training prompt with the most tokens, (P,)."""
    longest = widest(session.task.train["prompt"])
    encoded = encode(session.tokenizer, longest, session.config.chat_template_kwargs)
    most = encoded["attention_mask"].sum(1).argmax()
    return encoded["input_ids"][most][encoded["attention_mask"][most].bool()]


def _take(trainer: Any) -> None:
    """Forward and backward of the first micro-batches, until one has been added to another's gradients."""
    computed = 0
    for index in range(min(trainer.args.gradient_accumulation_steps, trainer.args.steps_per_generation)):
        trainer._step = trainer._place = index
        inputs = trainer._prepare_inputs([])
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs)
        trainer.accelerator.backward(loss)
        computed += bool(getattr(inputs, "run", True))  # a packed step computes some with a later one
        if computed == 2:
            return


@contextmanager
def _undisturbed(trainer: Any, batch: dict[str, Any]) -> Iterator[None]:
    """The trainer samples `batch`; afterwards it, its model and the random state are as they were."""
    model = trainer.model
    before = {name: vars(trainer)[name] for name in STATE if name in vars(trainer)}
    own = vars(trainer).get("_generate_and_score_completions")
    training, accumulation = model.training, getattr(trainer, "current_gradient_accumulation_steps", None)
    vars(trainer).update({name: copy.deepcopy(value) for name, value in before.items()})
    trainer._even_bins = False  # in other lengths an even one may be as full
    trainer._generate_and_score_completions = lambda _: batch
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    if trainer.args.gradient_checkpointing:  # as the trainer does when it begins
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    try:
        with torch.random.fork_rng():
            model.train()
            yield
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        for name in (*STATE, "_generate_and_score_completions", "current_gradient_accumulation_steps"):
            vars(trainer).pop(name, None)
        vars(trainer).update(before)
        if own is not None:
            trainer._generate_and_score_completions = own
        if accumulation is not None:
            trainer.current_gradient_accumulation_steps = accumulation


@contextmanager
def _optimizer_state(session: Session, trainer: Any) -> Iterator[None]:
    """Holds as many bytes as the plan counts for the optimizer's state."""
    size = 0 if session.planned is None else session.planned.memory.parts["optimizer"]
    held = torch.empty(size, dtype=torch.uint8, device=trainer.accelerator.device)
    yield
    del held
