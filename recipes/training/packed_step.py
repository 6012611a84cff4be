"""TRL's GRPOTrainer, computing only what a step needs. The loss stays TRL's, line for line.

    _prepare_inputs     shuffles groups where TRL shuffles sequences, and joins the micro-batches of an accumulation
                        window into bins under a token budget; a bin is computed with its last micro-batch
    _compute_loss       one packed forward per bin, then TRL's own loss on each of its whole micro-batches, so that
                        no normaliser and no metric has to be corrected
    _get_per_token_logps_and_entropies    the bin's, for TRL's loss; see packed_forward.py for any other caller

A completion whose advantage is zero is left out of the forward where its gradient comes from the advantage alone: TRL's
loss is given a log-probability of 0 for its tokens, new and old, hence a ratio of 1, times 0. It still counts in
normalisers and in clip ratios; `entropy` is the mean over the others' tokens, of all processes.

Log-probabilities of the old policy are the detached ones of the loss pass, as long as no update lies between sampling
and loss: TRL's pass for them is skipped, and vLLM's importance ratio is formed here instead. The micro-batches of later
windows are scored once, right after sampling, in the bins that their loss will use: the same numbers to the bit. So are
those of the reference: where the policy still is the reference, the KL term's gradient is 0 and not rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import identity, use_adapter

from memhead.integrations.handle import Truncated
from recipes.processes import smallest
from recipes.training.generation_batches import ReadOnce, Rows, taken
from recipes.training.importance import Correction, SamplingGap
from recipes.training.packed_forward import PackedForward, Scores
from recipes.training.ratios import RatioMeter, RoundedHead, sampler_dtype
from recipes.training.rollout import SUPPORT, Bin, MicroBatch, Rollout
from recipes.training.step_metrics import EntropyMeter, StepMeter


class PackedStep(PackedForward):
    """To be put before TRL's trainer: :func:`packed`. Its arguments are PackedForward's."""

    vllm_importance_sampling_correction: bool
    train_dataset: Any
    data_collator: Any

    def begin_packing(self, token_budget: int | None) -> None:
        """PackedForward's, and the state of a rollout."""
        super().begin_packing(token_budget)
        self._rollout: Rollout | None = None
        self._even_bins = True  # the worst case has full ones
        self._place = 0  # of the next micro-batch in its accumulation window
        self._scores: Scores | None = None  # for the loss that TRL is about to compute
        self._skip_old_pass = False  # TRL is about to ask for the old log-probabilities
        self._keep_reference = False  # TRL is about to ask for the reference's
        self._reference: Any = None  # the model that it then asked, in training
        self._meter = StepMeter()
        self._entropy = EntropyMeter()
        self._gap = SamplingGap()
        self._ratios = RatioMeter(getattr(self, "mismatch_every", None))  # of MeasuredRatios

    # -- sampling --------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """TRL's method, on rows that are read once a generation."""
        dataset, collator = self.train_dataset, self.data_collator
        # Not where a read has an effect of its own, nor past a script's collator.
        read_once = isinstance(dataset, Dataset) and dataset.format["type"] != "custom"
        if read_once and collator is identity:
            self.train_dataset, self.data_collator = ReadOnce(dataset), Rows
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collator

    def _generate_and_score_completions(self, inputs: Any) -> MicroBatch:
        """TRL's method, without its pass for the old log-probabilities and, in training, the reference's."""
        inputs = taken(inputs)
        every = self.args.steps_per_generation * self.num_iterations
        self._skip_old_pass = self.args.gradient_accumulation_steps % every != 0
        corrected = self.vllm_importance_sampling_correction
        self.vllm_importance_sampling_correction = False
        self._keep_reference = self.model.training and self.beta != 0.0
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self.vllm_importance_sampling_correction = corrected
            self._skip_old_pass = self._keep_reference = False

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
            only = self._only_by_advantage()
            self._rollout = Rollout.shuffled(
                sampled, count, only, self._token_budget, smallest, even=self._even_bins
            )
            # All of them first: a row that any computes has to be scored.
            for run in self._runs_of_rollout(self.num_iterations):
                self._rollout.cut(run)
            self._score_reference(self._rollout)
            self._score_before_updates(self._rollout, end)
        if index == 0 or self._place == 0:
            self._rollout.plan(range(index, end))
        return self._rollout.bin_ending_with(index)

    def _runs_of_rollout(self, iterations: int) -> Iterator[range]:
        """Its micro-batches without an update between them, in each of its first iterations."""
        count, window = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        place = self._place
        for _ in range(iterations):
            index = 0
            while index < count:
                end = min(count, index + window - place)
                yield range(index, end)
                place, index = (place + end - index) % window, end

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
                if not any(part.unscored):
                    continue
                with self._without_gradient():
                    scores = self._score_bin(self.model, part, entropy=False)
                self._remember_old(part, scores)

    def _score_reference(self, rollout: Rollout) -> None:
        """The reference's log-probabilities, where TRL has asked for them, in the bins of the first iteration."""
        model, self._reference = self._reference, None
        if model is None:
            return
        bins = [Bin(rollout, run) for window in self._runs_of_rollout(1) for run in rollout.cut(window)]
        with self._without_gradient(), self._as_reference():
            for part in bins:
                scores = self._score(model, part.batch, part.lengths, part.live, entropy=False)
                for micro_batch, rows in part.parts:
                    micro_batch["ref_per_token_logps"] = scores.logps[rows]

    def _as_reference(self) -> AbstractContextManager[None]:
        """As TRL has it: a model of its own, the copy of an adapter, or the model without adapters."""
        if self.ref_model is not None:
            return nullcontext()
        adapted = self.accelerator.unwrap_model(self.model)
        return use_adapter(adapted, "ref" if "ref" in adapted.peft_config else None)

    @contextmanager
    def _without_gradient(self) -> Iterator[None]:
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            yield

    # -- loss ------------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's method."""
        self.begin_window()
        return super().train(*args, **kwargs)

    def begin_window(self) -> None:
        """Forget what a training that failed may have left: a window half done, and what was measured of it."""
        self._place, self._scores = 0, None
        self._meter, self._entropy, self._gap = StepMeter(), EntropyMeter(), SamplingGap()

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
        ends_window = self.accelerator.sync_gradients
        for part, rows in inputs.parts:
            # A ratio of 1 for rows left out, whoever has found their old log-probabilities.
            left_out, old = inputs.left_out[rows, None], part["old_per_token_logps"]
            own = scores.of_rows(rows)
            self._scores = own._replace(logps=torch.where(left_out, old.to(own.logps.dtype), own.logps))
            # TRL moves its adaptive entropy coefficient where a window ends: not after each part of the last bin.
            self.accelerator.sync_gradients = ends_window and rows.stop == len(scores.logps)
            if self.model.training:
                seen = part["completion_mask"].bool() & ~left_out
                self._ratios.add("policy", (own.logps - old)[seen])
            loss = loss + super()._compute_loss(model, part)
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._add_entropy(inputs, scores)
        # TRL has an entry a generation, of which a window may see several.
        if ends_window or inputs.run.stop == inputs.rollout.count:
            self._append(mode, self._gap.take(self.accelerator))
        if mode == "eval" or ends_window:
            self._append(mode, self._ratios.take(self.accelerator))
        if mode == "train":
            self._meter.add(computed=scores.tokens, **inputs.counts())
        return loss

    def _add_entropy(self, part: Bin, scores: Scores) -> None:
        assert scores.entropies is not None
        mask, left_out, spare = (
            part.rollout.tensors["completion_mask"][part.rows].bool(),
            part.left_out[:, None],
            part.spare[:, None],
        )
        self._entropy.add(
            scores.entropies, mask & ~left_out & ~spare, mask & spare, mask & left_out, len(part.run)
        )
        if self.accelerator.sync_gradients:
            self._entropy.take(self.accelerator, self._metrics["train"]["entropy"])

    def _score_bin(self, model: Any, part: Bin, *, entropy: bool) -> Scores:
        """Scores of all rows of a bin; 0 for those left out."""
        return self._score(
            model,
            part.batch,
            part.lengths,
            part.live,
            entropy=entropy,
            truncated=None if self._truncation is None else Truncated(self._truncation, part.support),
            listener=self._listener(part),
        )

    def _listener(self, part: Bin) -> RoundedHead | None:
        """Where this rollout's difference from vLLM is to be taken apart, and the policy that sampled is scored."""
        wanted = self._ratios.due and self._truncation is None and Correction.of(self) is not None
        return RoundedHead(sampler_dtype(self)) if wanted and any(part.unscored) else None

    def _remember_old(self, part: Bin, scores: Scores) -> None:
        """Keep the log-probabilities of the policy that sampled, and vLLM's importance ratio, with the rollout."""
        for micro_batch, rows in part.unscored:
            own = scores.of_rows(rows)
            micro_batch["old_per_token_logps"] = own.logps.detach()
            if own.support is not None:
                micro_batch[SUPPORT] = own.support
            correction = Correction.of(self)
            if correction is not None:
                self._correct(micro_batch, own, part.left_out[rows, None], correction)

    def _correct(
        self, micro_batch: MicroBatch, scores: Scores, left_out: Tensor, correction: Correction
    ) -> None:
        """The importance ratio of a micro-batch, 1 for rows left out, and what is logged of it."""
        sampled, mask = micro_batch["sampling_per_token_logps"], micro_batch["completion_mask"]
        old, seen = scores.logps.detach(), mask.bool() & ~left_out
        ratio = correction.ratio(old, sampled, mask)
        micro_batch["importance_sampling_ratio"] = ratio.masked_fill(left_out, 1.0)
        difference = (old - sampled)[seen]
        if self.model.training:
            self._ratios.add("sampler", difference)
        if scores.rounded is not None:
            self._ratios.add_mismatch(difference, (old - scores.rounded)[seen])
        self._gap.add(difference.abs(), ratio[~left_out] if correction.by_sequence else ratio[seen])

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """What is known already, where TRL is about to ask for it."""
        if self._scores is not None:
            scores, self._scores = self._scores, None
            return scores.logps, scores.entropies, None
        if self._skip_old_pass:
            self._skip_old_pass = False
            return None, None, None
        if self._keep_reference:
            self._keep_reference = False
            self._reference, input_ids, _, width = args[:4]
            unknown = input_ids.new_zeros(
                len(input_ids), width, dtype=torch.float32
            )  # until _score_reference
            return unknown, None, None
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _append(self, mode: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)


def packed(trainer_class: type) -> type:
    """TRL's trainer class with the packed step mixed in."""
    return type(f"Packed{trainer_class.__name__}", (PackedStep, trainer_class), {})
