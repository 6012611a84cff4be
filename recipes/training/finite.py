"""Steps whose loss, gradient or weights are not finite: the update is skipped, counted, kept on record; some in a row
end the run, and nothing non-finite is saved.

    _generate_and_…     a model without a distribution, or with the same for every prompt, is not sampled from
    training_step       the loss of every micro-batch is added up (transformers would hide a NaN from the log)
    _get_grad_norm      before the optimizer: a bad step loses its gradients, so that the optimizer changes nothing
    on_optimizer_step   after it: weights that are not finite cannot be undone, and end the run at once
    save_model          refuses

A bad step is a line of bad_steps.jsonl with all its completions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from recipes.models.finite import first_not_finite, why_no_distribution, why_unusable
from recipes.models.generation import encode
from recipes.processes import anywhere, first
from recipes.tracking.files import LinesFile
from recipes.tracking.tracker import last_completions
from recipes.training.session import RunError, Session

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Trainer
else:
    _Trainer = object

BAD_STEPS = "bad_steps.jsonl"
REMEDY = "lower the learning rate, lengthen its warm-up, or clip harder (grpo.max_grad_norm)"
CONDEMNED = "the run diverged from there: no finite step could be taken"
NOTHING_TO_SAMPLE = "probability tensor contains"  # torch.multinomial of NaN, on a CPU


class Diverged(RunError):
    """The numbers have left the finite ones for good; the message says where, and what to do."""


@contextmanager
def says_divergence() -> Iterator[None]:
    """Raises Diverged where an evaluation finds nothing to sample: without it, an error of torch's."""
    try:
        yield
    except RuntimeError as error:
        if NOTHING_TO_SAMPLE not in str(error):
            raise
        raise Diverged(
            f"evaluation: the model has diverged, its logits while it samples are NaN or infinite; {REMEDY}, or go on "
            "from an earlier checkpoint"
        ) from None


def require_finite(session: Session) -> None:
    """Raises RunError, naming it, if the model that a run begins or goes on with is not finite."""
    reason = unusable_for(session)
    if reason is not None:
        name = session.model.name_or_path or "the new model"
        raise RunError(f"{name} cannot be trained: {reason}; choose another model.name or model.revision")


def unusable_for(session: Session) -> str | None:
    """What is not finite about the session's model on some held-out prompts; None: nothing."""
    prompts = session.task.held_out[:4]["prompt"]
    batch = encode(session.tokenizer, prompts, session.config.chat_template_kwargs)
    with session.precision.autocast(session.model.device):
        return why_unusable(session.model, batch)


class BadSteps:
    """Counts bad steps; `limit` in a row raise Diverged."""

    def __init__(self, limit: int, remedy: str) -> None:
        self._limit, self._remedy = limit, remedy
        self.in_a_row = self.total = 0
        self.last_good = 0

    def good(self, step: int) -> None:
        """A step was finite, or was where this session began."""
        self.in_a_row, self.last_good = 0, step

    def bad(self, what: str) -> str:
        """A sentence about the skipped step. what: "step 5: the gradient norm is nan"."""
        self.in_a_row += 1
        self.total += 1
        return f"{what}; the update was skipped ({self.in_a_row} in a row, {self._limit} end the run)"

    def stop_at_limit(self) -> None:
        """Raises Diverged after the last of `limit` bad steps in a row."""
        if self.in_a_row >= self._limit:
            raise Diverged(
                f"{self.in_a_row} steps in a row were not finite: the run has diverged; {self._remedy}"
            )


class FiniteSteps(_Trainer):
    """To be put before the trainer's class."""

    is_deepspeed_enabled: bool  # of transformers

    def __init__(self, *args: Any, max_bad_steps: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bad_steps = BadSteps(max_bad_steps, f"{REMEDY}, or go on from an earlier checkpoint")
        # Of this accumulation window's micro-batches: looked at once a step, for a look waits for the device.
        self._loss_so_far: torch.Tensor | None = None
        self._record = LinesFile(Path(self.args.output_dir).parent / BAD_STEPS)
        self.add_callback(_AfterUpdate(self))

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        reason = first(self._asked(why_no_distribution))  # the weights were looked at after the update
        if reason is None:
            try:
                return super()._generate_and_score_completions(inputs)
            except RuntimeError as error:  # other prompts than those asked about, or later tokens
                if NOTHING_TO_SAMPLE not in str(error):
                    raise
                reason = "its weights are finite, but its logits while it samples are NaN or infinite"
        self.condemn_checkpoints(self.bad_steps.last_good, CONDEMNED)
        raise Diverged(
            f"step {self.state.global_step + 1}, generation: the model has diverged, {reason}; {REMEDY}, or go on "
            "from an earlier checkpoint"
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The trainer's; the loss is kept in mind."""
        loss = super().training_step(*args, **kwargs)
        so_far = 0.0 if self._loss_so_far is None else self._loss_so_far
        self._loss_so_far = so_far + loss.detach()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, self._loss_so_far = self._loss_so_far, None
        assert loss is not None
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of FSDP2
        both = torch.stack([loss.float(), torch.as_tensor(norm, device=loss.device).float()])
        everywhere = self.accelerator.gather(both[None]).tolist()  # one process must not step alone
        losses, norms = zip(*everywhere)
        step = self.state.global_step + 1
        finite = all(map(math.isfinite, norms))
        bad = next((value for value in losses if not math.isfinite(value)), None)
        # deepspeed's engine has left the update out, or not, by the gradient alone.
        taken = finite and self.deepspeed is not None
        if bad is not None and not taken:
            self._skip(model, step, "forward", f"the loss is not finite ({bad})", norm)
        elif not finite and self.accelerator.scaler is None:  # which looks for itself
            self._skip(model, step, "backward", f"the gradient norm is not finite ({float(norm)})", norm)
        else:
            self.bad_steps.good(step)
        self._metrics["train"]["bad_step"].append(float(self.bad_steps.in_a_row > 0))
        return norm

    def _skip(self, model: Any, step: int, phase: str, what: str, norm: Any) -> None:
        """Leaves the optimizer nothing to do: it passes over parameters that have no gradient.

        Where deepspeed's engine updates, right after its backward pass, it has left this update out already.
        """
        if self.deepspeed is None:
            model.zero_grad(set_to_none=True)
        sentence = self.bad_steps.bad(f"step {step}, {phase}: {what}")
        if not self.is_world_process_zero():
            return
        completions = last_completions(self)
        self._record.append(
            {"step": step, "phase": phase, "what": what, "grad_norm": float(norm), "completions": completions}
        )
        print(f"{sentence}; its {len(completions)} completions are in {self._record.path}", flush=True)

    def condemn_checkpoints(self, step: int, reason: str) -> None:
        """For the class that writes them: those of `step` and after are of no use."""

    def why_unusable(self) -> str | None:
        """Why the model as it is now is of no use, by some prompts of the data; None: it may be."""
        return self._asked(why_unusable)

    def _asked(self, question: Callable[[Any, Any], str | None]) -> str | None:
        prompts = self.train_dataset[:4]["prompt"]
        batch = encode(self.processing_class, prompts, self.chat_template_kwargs or {})
        with self.accelerator.autocast():
            return question(self.accelerator.unwrap_model(self.model), batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trainer's. Raises Diverged for a model that is not finite, and writes nothing."""
        reason = None if _internal_call else first(self.why_unusable())  # a checkpoint was looked at before
        if reason is not None:
            raise Diverged(f"{output_dir} was not written: the model has diverged, {reason}; {REMEDY}")
        with self._as_it_is():
            super().save_model(output_dir, _internal_call)

    @contextmanager
    def _as_it_is(self) -> Iterator[None]:
        """transformers asks deepspeed's engine for the weights, also where no step was taken and there is none yet."""
        before = self.is_deepspeed_enabled
        self.is_deepspeed_enabled = before and self.deepspeed is not None
        try:
            yield
        finally:
            self.is_deepspeed_enabled = before


class _AfterUpdate(TrainerCallback):
    """Stops where the weights are lost, or too many steps in a row were."""

    def __init__(self, trainer: FiniteSteps) -> None:
        self._trainer = trainer
        self._trained: list[tuple[str, Tensor]] = []  # to find them takes longer than to look at them

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count from the checkpoint on."""
        self._trainer.bad_steps.good(state.global_step)
        self._trained = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the weights that were trained."""
        if not self._trained:
            named = self._trainer.model.named_parameters()
            self._trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        name = first_not_finite(self._trained)
        if anywhere(name is not None):
            where = f"step {state.global_step + 1}, update: the weight {first(name)}"
            raise Diverged(f"{where} is not finite any more; {REMEDY}, or go on from an earlier checkpoint")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count; the checkpoints from which no finite step was taken are not to be resumed from."""
        try:
            self._trainer.bad_steps.stop_at_limit()
        except Diverged:
            self._trainer.condemn_checkpoints(self._trainer.bad_steps.last_good, CONDEMNED)
            raise
