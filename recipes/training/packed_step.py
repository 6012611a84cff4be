"""TRL's GRPOTrainer, computing only what a step needs. The loss stays TRL's, line for line.

    _prepare_inputs     shuffles groups where TRL shuffles sequences, and joins the micro-batches of an accumulation
                        window into bins under a token budget; a bin is computed with its last micro-batch
    _compute_loss       one packed forward per bin, then TRL's own loss on each of its whole micro-batches, so that
                        no normaliser and no metric has to be corrected
    _get_per_token_logps_and_entropies    the bin's, for TRL's loss; by a packed forward, for any other caller

A completion whose advantage is zero is left out of the forward where its gradient comes from the advantage alone: TRL's
loss is given a log-probability of 0 for its tokens, new and old, hence a ratio of 1, times 0. It still counts in
normalisers and in clip ratios; `entropy` is the mean of what was computed.

Log-probabilities of the old policy are the detached ones of the loss pass, as long as no update lies between sampling
and loss: TRL's pass for them is skipped, and vLLM's importance ratio is formed here instead. The micro-batches of later
windows are scored once, right after sampling, in the bins that their loss will use: the same numbers to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from memhead.integrations.handle import Truncated
from memhead.ragged_support import Support, Truncation
from recipes.models.adapters import without_adapters
from recipes.plan.work import Flow
from recipes.processes import smallest
from recipes.training import packed_attention
from recipes.training.generation_batches import ReadOnce, Rows
from recipes.training.packed_support import half_precision
from recipes.training.packing import Lengths, PaddedBatch, measure, pack, plan_bins
from recipes.training.ratios import RatioMeter, RoundedHead, listening, sampler_dtype
from recipes.training.rollout import SUPPORT, Bin, MicroBatch, Rollout
from recipes.training.step_metrics import SamplingGap, StepMeter, importance_ratio
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


class PackedStep(_Trainer):
    """To be put before TRL's trainer: :func:`packed`.

    Args:
        token_budget: tokens of a bin, whatever it takes. None for ``planned_tokens``, or as many as a micro-batch has
            slots when padded if that is more.
    """

    vllm_importance_sampling_correction: bool
    train_dataset: Any
    data_collator: Any

    def __init__(
        self, *args: Any, token_budget: int | None = None, planned_tokens: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._token_budget = token_budget
        self._planned_tokens = planned_tokens
        self._rollout: Rollout | None = None
        self._place = 0  # of the next micro-batch in its accumulation window
        self._scores: Scores | None = None  # for the loss that TRL is about to compute
        self._skip_old_pass = False  # TRL is about to ask for the old log-probabilities
        self._meter = StepMeter()
        self._gap = SamplingGap()
        self._ratios = RatioMeter(getattr(self, "mismatch_every", None))  # of MeasuredRatios
        self._flow = Flow()
        self._truncation: Truncation | None = getattr(self, "truncation", None)  # of SupportedRatios
        half = half_precision(self.model, self.args)
        self._varlen = packed_attention.varlen_available(self.accelerator.device, half=half)
        if self._varlen:
            for model in (self.model, self.ref_model):
                if model is not None:
                    packed_attention.use_varlen(self._causal_model(model))

    # -- sampling --------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """TRL's method, on rows that are read once a generation."""
        dataset, collator = self.train_dataset, self.data_collator
        if isinstance(dataset, Dataset):
            self.train_dataset, self.data_collator = ReadOnce(dataset), Rows
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collator

    def _generate_and_score_completions(self, inputs: Any) -> MicroBatch:
        """TRL's method, without its pass for the old log-probabilities."""
        inputs = inputs.rows if isinstance(inputs, Rows) else inputs
        every = self.args.steps_per_generation * self.num_iterations
        self._skip_old_pass = self.args.gradient_accumulation_steps % every != 0
        corrected = self.vllm_importance_sampling_correction
        self.vllm_importance_sampling_correction = False
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self.vllm_importance_sampling_correction = corrected
            self._skip_old_pass = False

    def _prepare_inputs(self, generation_batch: Any) -> MicroBatch | Bin:
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        count = self.args.steps_per_generation
        index = self._step % count
        # The end of the window, or of the rollout.
        end = min(count, index + self.current_gradient_accumulation_steps - self._place)
        if self._rollout is None or self._step % (count * self.num_iterations) == 0:
            sampled = self._generate_and_score_completions(generation_batch)
            self._ratios.begin_rollout(self.state.global_step)
            self._rollout = Rollout.shuffled(
                sampled, count, self._only_by_advantage(), self._token_budget, self._planned_tokens, smallest
            )
            self._score_before_updates(self._rollout, end)
        if index == 0 or self._place == 0:
            self._rollout.plan(range(index, end))
        return self._rollout.bin_ending_with(index)

    def _only_by_advantage(self) -> bool:
        """Whether a completion affects loss and metrics only through its advantage, the entropy metric aside."""
        return (
            self.beta == 0.0
            and not self._entropy_bonus_enabled
            and self.top_entropy_quantile == 1.0
            and self.loss_type != "vespo"  # whose metric is a mean over all completions
        )

    def _score_before_updates(self, rollout: Rollout, begin: int) -> None:
        """Old log-probabilities of the micro-batches from ``begin`` on, before the model changes."""
        window = self.args.gradient_accumulation_steps
        for start in range(begin, rollout.count, window):
            for run in rollout.cut(range(start, min(start + window, rollout.count))):
                part = Bin(rollout, run)
                with (
                    torch.no_grad(),
                    disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
                ):
                    scores = self._score_bin(self.model, part, entropy=False)
                self._remember_old(part, scores)

    # -- loss ------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's method, which also keeps track of where an accumulation window begins and ends."""
        if self._place == 0:
            self._meter.begin()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._place += 1
        if self.accelerator.sync_gradients:
            self._place = 0
            self._append("train", self._meter.metrics())
        return loss

    def _compute_loss(self, model: Any, inputs: MicroBatch | Bin) -> Tensor:
        if not isinstance(inputs, Bin):  # evaluation
            inputs = Bin(Rollout.whole(inputs), range(1))
        if not inputs.run:  # computed with a later one
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        scores = self._score_bin(model, inputs, entropy=True)
        self._remember_old(inputs, scores)
        loss = torch.zeros((), device=scores.logps.device)
        for part, rows in inputs.parts:
            self._scores = Scores(
                scores.logps[rows], None if scores.entropies is None else scores.entropies[rows]
            )
            if self.model.training:
                seen = part["completion_mask"].bool() & ~inputs.left_out[rows, None]
                self._ratios.add("policy", (scores.logps[rows] - part["old_per_token_logps"])[seen])
            loss = loss + super()._compute_loss(model, part)
        mode = "train" if self.model.training else "eval"
        if mode == "eval" or self.accelerator.sync_gradients:
            self._append(mode, self._gap.take(self.accelerator) | self._ratios.take(self.accelerator))
        if mode == "train":
            self._meter.add(computed=scores.tokens, **inputs.counts())
        return loss

    def _score_bin(self, model: Any, part: Bin, *, entropy: bool) -> Scores:
        """Scores of all rows of a bin; those left out have the mean entropy of the others."""
        truncated = None if self._truncation is None else Truncated(self._truncation, part.support)
        scores = self._score(
            model,
            part.batch,
            part.lengths,
            part.live,
            entropy=entropy,
            truncated=truncated,
            listener=self._listener(part),
        )
        if scores.entropies is None or part.complete:
            return scores
        with torch.no_grad():
            computed = part.computed_mask
            mean = (scores.entropies * computed).sum() / computed.sum().clamp(min=1)
        return scores._replace(entropies=torch.where(part.left_out[:, None], mean, scores.entropies))

    def _remember_old(self, part: Bin, scores: Scores) -> None:
        """Keep the log-probabilities of the policy that sampled, and vLLM's importance ratio, with the rollout."""
        for micro_batch, rows in part.parts:
            if "old_per_token_logps" in micro_batch:
                continue
            old = micro_batch["old_per_token_logps"] = scores.logps[rows].detach()
            if scores.support is not None:
                width = old.shape[1]
                micro_batch[SUPPORT] = scores.support.rows(slice(rows.start * width, rows.stop * width))
            if not (self.use_vllm and self.vllm_importance_sampling_correction):
                continue
            sampled, left_out = micro_batch["sampling_per_token_logps"], part.left_out[rows, None]
            ratio = importance_ratio(
                old,
                sampled,
                micro_batch["completion_mask"],
                self.vllm_importance_sampling_mode,
                self.vllm_importance_sampling_clip_min,
                self.vllm_importance_sampling_clip_max,
            )
            micro_batch["importance_sampling_ratio"] = ratio.masked_fill(left_out, 1.0)
            seen = micro_batch["completion_mask"].bool() & ~left_out
            if self.model.training:
                self._ratios.add("sampler", (old - sampled)[seen])
            if scores.rounded is not None:
                self._ratios.add_mismatch((old - sampled)[seen], (old - scores.rounded[rows])[seen])
            self._gap.add(
                (old - sampled).abs()[seen], ratio[~left_out] if ratio.shape[1] == 1 else ratio[seen]
            )

    # -- forward ---------------------------------------------------------------------------------------------------

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
        if self._scores is not None:
            scores, self._scores = self._scores, None
            return scores.logps, scores.entropies, None
        if self._skip_old_pass:
            self._skip_old_pass = False
            return None, None, None
        batch = PaddedBatch(input_ids, attention_mask, logits_to_keep)
        lengths = measure(batch)
        order = lengths.group.argsort(stable=True)
        rows = order[lengths.completion[order] > 0].tolist()
        slots = (batch_size or len(rows)) * input_ids.shape[1]
        budget = self._token_budget or max(self._planned_tokens, slots)
        bins = plan_bins(lengths, [[r] for r in rows], budget) or [range(0)]
        found = [
            self._score(model, batch, lengths, [rows[i] for i in run], entropy=compute_entropy)
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
        if not rows:  # every completion masked: zeros with a gradient path, by TRL's forward of one row
            logps, entropies, _ = super()._get_per_token_logps_and_entropies(
                model,
                batch.input_ids[:1],
                batch.attention_mask[:1],
                batch.completion_width,
                compute_entropy=entropy,
            )
            shape = len(batch.input_ids), batch.completion_width
            return Scores(logps.expand(shape), None if entropies is None else entropies.expand(shape))
        packed = pack(batch, lengths, rows, one_row=self._varlen).to(batch.input_ids.device)
        self._flow += Flow.of_lengths(*(x[rows].tolist() for x in lengths))
        tokens = batch.input_ids.flatten()
        causal = self._causal_model(model)
        if packed.varlen is None:
            layout = {"attention_mask": packed_attention.masks(packed, causal.config, causal.dtype)}
        else:
            layout = {
                "attention_mask": packed_attention.no_mask(tokens.device),
                packed_attention.PACKED_ARGUMENT: packed.varlen,
            }
        if truncated is not None and truncated.support is not None:
            truncated = replace(truncated, support=truncated.support.rows(packed.scores))
        with (
            over_supports(truncated),
            listening(listener),
            _only_states(causal.base_model, packed.states),
            self.accelerator.autocast(),
        ):
            outputs = model(
                input_ids=tokens[packed.source],
                position_ids=packed.positions,
                shift_labels=tokens[packed.targets][None],
                fused_lm_head=True,
                **layout,
            )

        def unpack(values: Tensor) -> Tensor:  # (1, M) -> (B, K)
            shape = len(batch.input_ids), batch.completion_width
            flat = values.new_zeros(shape[0] * shape[1]).index_copy(0, packed.scores, values[0])
            return flat.view(shape)

        found = None
        if truncated is not None and truncated.found:
            found = Support.joined(truncated.found).scattered(
                packed.scores, batch.input_ids.shape[0] * batch.completion_width
            )
        entropies = unpack(outputs.entropy) if entropy else None
        heard = [] if listener is None else listener.found
        rounded = unpack(torch.cat(heard)[None]) if heard else None
        return Scores(unpack(outputs.log_probs), entropies, packed.tokens, found, rounded)

    def _listener(self, part: Bin) -> RoundedHead | None:
        """Where this rollout's difference from vLLM is to be taken apart, and the policy that sampled is scored."""
        wanted = self._ratios.due and self.use_vllm and self.vllm_importance_sampling_correction
        first = any("old_per_token_logps" not in micro_batch for micro_batch, _ in part.parts)
        return RoundedHead(sampler_dtype(self)) if wanted and first and self._truncation is None else None

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

    def give_up_packing(self) -> None:
        """Go on as TRL's trainer: the same object, its attention as it was."""
        for model in (self.model, self.ref_model):
            if model is not None:
                packed_attention.leave_varlen(self._causal_model(model))
        order = type(self).__mro__
        self.__class__ = order[order.index(PackedStep) + 1]

    def _causal_model(self, model: Any) -> Any:
        """The causal language model inside its wrappers."""
        return without_adapters(self.accelerator.unwrap_model(model))

    def _append(self, mode: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)


@contextmanager
def _only_states(backbone: torch.nn.Module, states: Tensor) -> Iterator[None]:
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


def packed(trainer_class: type) -> type:
    """TRL's trainer class with the packed step mixed in."""
    return type(f"Packed{trainer_class.__name__}", (PackedStep, trainer_class), {})
