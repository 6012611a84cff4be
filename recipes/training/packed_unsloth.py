"""The packed step on a model that Unsloth has loaded, in the trainer that it has put in TRL's place.

Unsloth's layers take all groups in one row, each prompt once, and compute its attention by FlexAttention;
``prefix_seg_info``, made by Unsloth's own function, tells them the layout. Sampling stays Unsloth's. The loss is TRL's
``_compute_loss``, which Unsloth's trainer has line for line and never calls: its own computes log-probabilities within.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from recipes.training.packed_forward import Scores, only_states
from recipes.training.packed_step import PackedStep
from recipes.training.packed_support import of_the_model, of_the_run
from recipes.training.packing import Packed, PaddedBatch

# Whose attention Unsloth has written with a place for the layout, and whose layers have nothing that it leaves out.
ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def why_not_unsloths(given: dict[str, Any]) -> str | None:
    """The reason not to pack on Unsloth's model, or None. given: what the trainer is made with."""
    return next(chain(_of_its_layers(given["model"].config), of_the_run(given), of_the_model(given)), None)


def _of_its_layers(config: Any) -> Iterator[str]:
    if config.model_type not in ARCHITECTURES:
        yield f"packed rows have not been tried on Unsloth's layers of {config.model_type}"
    if getattr(config, "sliding_window", None) is not None:
        yield "Unsloth's attention over packed rows has no sliding window"


def reads_vllms_logps_over_a_part(trainer: Any) -> bool:
    """Whether the loss compares its log-probabilities with vLLM's, which are over what truncation leaves."""
    from unsloth_zoo.rl_replacements import grpo_sampling_support

    read = trainer.vllm_importance_sampling_correction or trainer.off_policy_mask_threshold is not None
    return bool(trainer.use_vllm and read and grpo_sampling_support(trainer) is not None)


class PackedUnsloth(PackedStep):
    """To be put before Unsloth's trainer: :func:`packed_unsloth`. Its arguments are PackedForward's."""

    backward_within = True  # its gradient checkpointing calls backward inside a backward

    def begin_attention(self) -> bool:
        """Unsloth's model takes packed rows as it is, all groups in one."""
        return True

    def attention_arguments(self, packed: Packed, causal: Any) -> dict[str, Any]:
        """The layout, for Unsloth's layers."""
        from unsloth.utils.prefix_grouper_kernel import build_seg_info_multigroup

        return {"prefix_seg_info": build_seg_info_multigroup(packed.groups, packed.source.device)[0]}

    def score_nothing(self, model: Any, batch: PaddedBatch, *, entropy: bool) -> Scores:
        """Zeros with a path to every parameter. Under Unsloth there is one process, so no other one waits."""
        trained = [p.sum(dtype=torch.float32) for p in self.model.parameters() if p.requires_grad]
        nothing = 0 * torch.stack(trained).sum()
        zeros = nothing.expand(len(batch.input_ids), batch.completion_width)
        return Scores(zeros, zeros if entropy else None)

    @contextmanager
    def _without_gradient(self) -> Iterator[None]:
        """Gradient checkpointing stays on, as in Unsloth's own scoring: on again, it would be transformers'."""
        with torch.no_grad():
            yield

    @contextmanager
    def as_in_the_loss(self) -> Iterator[None]:
        """For the start-up check: with Unsloth's gradient checkpointing, which waits for this call in a new trainer."""
        # A pass with gradients before training makes Unsloth drop what was compiled, and warn of it.
        warnings.filterwarnings("ignore", message="Unsloth: detected a manual forward")
        kind = getattr(self.model, "_unsloth_gradient_checkpointing", self.args.gradient_checkpointing)
        was_training = self.model.training  # within train(), of a script
        self.model.for_training(use_gradient_checkpointing=kind)
        try:
            yield
        finally:
            if was_training:
                _forget_compiled()
            else:
                self.model.for_inference()

    def padded_logps(self, model: Any, batch: PaddedBatch) -> Tensor:
        """(B, K) by the model's padded forward. Rows with equally long prompts go together, their left padding cut off.

        In training Unsloth's layers ignore a mask of padding: attention is causal, so what is on the right is not seen.
        """
        width, causal = batch.completion_width, self._causal_model(model)
        found = torch.zeros(len(batch.input_ids), width, device=batch.input_ids.device)
        begins = batch.attention_mask.argmax(1)
        for begin in begins.unique().tolist():
            rows = (begins == begin).nonzero()[:, 0]
            ids = batch.input_ids[rows, begin:]
            states = torch.arange(ids.numel(), device=ids.device).view(ids.shape)[:, -width - 1 : -1]
            with only_states(causal.base_model, states.flatten()):
                targets = ids[:, -width:].flatten()[None]
                outputs = model(input_ids=ids, shift_labels=targets, fused_lm_head=True)
            found = found.index_add(0, rows, outputs.log_probs.view(-1, width))
        return found

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's, in place of Unsloth's."""
        loss: Tensor = self._compute_loss(model, inputs)
        return loss


def _forget_compiled() -> None:
    """As Unsloth does when train() begins after a pass with gradients; one within train() it does not see."""
    from unsloth_zoo.gradient_checkpointing import reset_unsloth_gradient_checkpointing_buffers

    torch._dynamo.reset()
    with suppress(NameError):  # there are none where nothing has been offloaded
        reset_unsloth_gradient_checkpointing_buffers()


def packed_unsloth(trainer_class: type) -> type:
    """Unsloth's trainer class with the packed step mixed in."""
    return type(f"Packed{trainer_class.__name__}", (PackedUnsloth, trainer_class), {})
