"""Where TRL's GRPOTrainer gets log-probabilities and entropies from: packed forwards in place of padded ones.

Attention sees the layout through transformers' registry (packed_attention.py). The head sees the states that score a
target, a prompt's last one once for each of its completions, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from memhead.integrations.handle import Truncated
from memhead.ragged_support import Support, Truncation
from recipes.models.adapters import without_adapters
from recipes.plan.work import Flow
from recipes.processes import smallest
from recipes.training import packed_attention
from recipes.training.packed_support import half_precision
from recipes.training.packing import Lengths, Packed, PaddedBatch, even_bins, in_short_rows, measure, pack
from recipes.training.ratios import RoundedHead, listening
from recipes.training.truncation import over_supports

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Trainer
else:
    _Trainer = object


class Scores(NamedTuple):
    """Results per completion token, (B, K); 0 where there is no token, or the row was not computed."""

    logps: Tensor
    entropies: Tensor | None
    tokens: int = 0  # computed for them
    support: Support | None = None  # of B × K slots, where the sampler truncates
    rounded: Tensor | None = None  # logps by a head of the sampler's dtype, where they are asked for

    def of_rows(self, rows: slice) -> Scores:
        """A part of them; `tokens` are counted with the whole."""
        width = self.logps.shape[1]
        slots = slice(rows.start * width, rows.stop * width)
        return Scores(
            logps=self.logps[rows],
            entropies=None if self.entropies is None else self.entropies[rows],
            support=None if self.support is None else self.support.rows(slots),
            rounded=None if self.rounded is None else self.rounded[rows],
        )


class PackedForward(_Trainer):
    """To be put before TRL's trainer.

    Args:
        token_budget: tokens of a bin. None for as many as a micro-batch has slots when padded.
    """

    def __init__(self, *args: Any, token_budget: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begin_packing(token_budget)

    def begin_packing(self, token_budget: int | None) -> None:
        """What packing needs beside TRL's trainer, once that is made."""
        self._token_budget = token_budget
        self._flow = Flow()
        self._truncation: Truncation | None = getattr(self, "truncation", None)  # of SupportedRatios
        self._varlen = self.begin_attention()

    def begin_attention(self) -> bool:
        """Let the models take packed rows; whether all groups lie in one."""
        half = half_precision(self.model, self.args)
        varlen = packed_attention.varlen_available(self.accelerator.device, half=half)
        if varlen:
            for model in self._causal_models():
                packed_attention.use_varlen(model)
        return varlen

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,  # (B, P + K)
        attention_mask: Tensor,  # (B, P + K)
        logits_to_keep: int,  # K
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **modalities: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """TRL's signature and result. Rows are cut by the token budget, not by ``batch_size``."""
        batch = PaddedBatch(input_ids, attention_mask, logits_to_keep)
        lengths = measure(batch)
        slots = [
            [r] if lengths.completion[r] > 0 else [] for r in lengths.group.argsort(stable=True).tolist()
        ]
        budget = self._token_budget or (batch_size or len(slots)) * input_ids.shape[1]
        # As many in every process: a sharded model and a split head wait for each other.
        bins = even_bins(lengths, slots, budget, smallest)
        found = [
            self._score(model, batch, lengths, [r for i in run for r in slots[i]], entropy=compute_entropy)
            for run in bins
        ]
        # Each row is computed once, and 0 elsewhere.
        logps = torch.stack([scores.logps for scores in found]).sum(0)
        entropies = [scores.entropies for scores in found if scores.entropies is not None]
        return logps, torch.stack(entropies).sum(0) if entropies else None, None

    def _score(
        self,
        model: Any,
        batch: PaddedBatch,
        lengths: Lengths,
        rows: Sequence[int],
        *,
        entropy: bool,
        truncated: Truncated | None = None,
        listener: RoundedHead | None = None,
    ) -> Scores:
        """One packed forward of ``rows``, through the module that was wrapped for training.

        truncated: over the supports of B × K slots, or to find them; None: over the whole vocabulary.
        """
        shape = len(batch.input_ids), batch.completion_width
        if not rows:
            return self.score_nothing(model, batch, entropy=entropy)
        if not self._varlen:
            hidden_size = self._causal_model(model).config.get_text_config().hidden_size
            lengths = in_short_rows(lengths, rows, hidden_size)
        self._flow += Flow.packed(*(x[rows].tolist() for x in lengths))
        packed = pack(batch, lengths, rows, one_row=self._varlen).to(batch.input_ids.device)
        if truncated is not None and truncated.support is not None:
            truncated = replace(truncated, support=truncated.support.rows(packed.scores))
        tokens, causal = batch.input_ids.flatten(), self._causal_model(model)
        attention = self.attention_arguments(packed, causal)
        with (
            over_supports(truncated),
            listening(listener),
            only_states(causal.base_model, packed.states),
            self.accelerator.autocast(),
        ):
            outputs = model(
                input_ids=tokens[packed.source],
                position_ids=packed.positions,
                shift_labels=tokens[packed.targets][None],
                fused_lm_head=True,
                **attention,
            )

        def unpacked(values: Tensor) -> Tensor:  # (1, M) -> (B, K)
            return values.new_zeros(shape[0] * shape[1]).index_copy(0, packed.scores, values[0]).view(shape)

        supports, heard = truncated and truncated.found, listener and listener.found
        return Scores(
            logps=unpacked(outputs.log_probs),
            entropies=unpacked(outputs.entropy) if entropy else None,
            tokens=packed.tokens,
            support=Support.joined(supports).scattered(packed.scores, shape[0] * shape[1])
            if supports
            else None,
            rounded=unpacked(torch.cat(heard)[None]) if heard else None,
        )

    def score_nothing(self, model: Any, batch: PaddedBatch, *, entropy: bool) -> Scores:
        """Zeros with a gradient path, by TRL's forward of one row: other processes may have some to compute."""
        shape = len(batch.input_ids), batch.completion_width
        logps, entropies, _ = super()._get_per_token_logps_and_entropies(
            model, batch.input_ids[:1], batch.attention_mask[:1], shape[1], compute_entropy=entropy
        )
        return Scores((0 * logps).expand(shape), (0 * entropies).expand(shape) if entropy else None)

    def attention_arguments(self, packed: Packed, causal: Any) -> dict[str, Any]:
        """The layout, as the attention of a causal language model takes it."""
        if packed.varlen is None:
            return {"attention_mask": packed_attention.masks(packed, causal.config, causal.dtype)}
        return {
            "attention_mask": packed_attention.no_mask(packed.source.device),
            packed_attention.PACKED_ARGUMENT: packed.varlen,
        }

    def take_flow(self) -> Flow:
        """What packed forwards have computed since the last call."""
        flow, self._flow = self._flow, Flow()
        return flow

    def packed_logps(self, model: Any, batch: PaddedBatch) -> Tensor:
        """(B, K) by one packed forward of all rows; 0 where there is no token."""
        lengths = measure(batch)
        rows = lengths.completion.nonzero()[:, 0].tolist()
        return self._score(model, batch, lengths, rows, entropy=False).logps

    def padded_logps(self, model: Any, batch: PaddedBatch) -> Tensor:
        """(B, K) by TRL's forward; anything where there is no token."""
        return super()._get_per_token_logps_and_entropies(
            model, batch.input_ids, batch.attention_mask, batch.completion_width
        )[0]

    def give_up_packing(self, otherwise: type) -> None:
        """Go on as a trainer of that class, this one's without packing: the same object, its attention as it was."""
        for model in self._causal_models():
            packed_attention.leave_varlen(model)
        self.__class__ = otherwise

    def _causal_model(self, model: Any) -> Any:
        """The causal language model inside its wrappers."""
        return without_adapters(self.accelerator.unwrap_model(model))

    def _causal_models(self) -> list[Any]:
        """Of the policy, and of the reference if there is one."""
        return [self._causal_model(model) for model in (self.model, self.ref_model) if model is not None]


@contextmanager
def only_states(backbone: torch.nn.Module, states: Tensor) -> Iterator[None]:
    """Let a model's head see these states (M,) of its backbone's grid as one row; a state may occur more than once."""

    def select(module: Any, arguments: Any, output: Any) -> Any:
        hidden = output.last_hidden_state  # (R, L, H)
        output.last_hidden_state = hidden.flatten(0, 1).index_select(0, states.to(hidden.device))[None]
        return output

    handle = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()
