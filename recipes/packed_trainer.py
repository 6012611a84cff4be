"""TRL's GRPOTrainer with the packed step, for a script of your own (docs/trainer.md).

    from recipes.packed_trainer import PackedGRPOTrainer
    trainer = PackedGRPOTrainer(model=…, reward_funcs=…, args=GRPOConfig(…), train_dataset=…)
    trainer.train()

It is TRL's trainer until train() is called: by then the model is as it will be trained, adapters included, and whole,
since accelerate shards it later. There the packed step is put before the script's own class if it is exact, so that
what a subclass overrides stays; else nothing is changed, and a warning says why.

Where Unsloth was imported first, "TRL's trainer" is the one that Unsloth has put in its place, here and below.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import trl
from trl import GRPOTrainer

from memhead.integrations import trl as memhead_trl
from memhead.shortage import is_out_of_memory
from recipes.config.unsloth import is_unsloths, set_for_its_loss
from recipes.processes import first, is_main
from recipes.tracking.ratios import PREFIXES
from recipes.training.generation_batches import taken
from recipes.training.importance import Correction
from recipes.training.packed_forward import PackedForward
from recipes.training.packed_step import PackedStep
from recipes.training.packed_support import ruled_out
from recipes.training.packed_unsloth import PackedUnsloth, reads_vllms_logps_over_a_part, why_not_unsloths
from recipes.training.planned_bins import bins_of
from recipes.training.step_check import PROMPTS, objection, try_step

TESTED = "1.15."  # of TRL, whose methods the packed step goes around
_PACKAGES = [Path(str(package.__file__)).parent for package in (trl, sys.modules.get("unsloth")) if package]
# Of the trainer: TRL's, or the one that Unsloth has written.
_FILE = sys.modules[GRPOTrainer.__module__].__file__
_BY_UNSLOTH = is_unsloths(trl.GRPOConfig)
# What it does in their place, or with other inputs than TRL's.
_REPLACED = ("_prepare_inputs", "_compute_loss", "compute_loss", "_get_per_token_logps_and_entropies")
_SAMPLED = "_generate_and_score_completions"
# What a training_step that takes TRL's apart asks for: the packed step's inputs are not one micro-batch.
_INPUTS = {"_prepare_inputs", "compute_loss", "_compute_loss", "_buffered_inputs"}
# What the packed step keeps on the trainer, or would read from a script's as if a run had set it.
_STATE = frozenset(
    {
        "_token_budget", "_flow", "_truncation", "_varlen", "_rollout", "_even_bins", "_place", "_scores",
        "_skip_old_pass", "_keep_reference", "_reference", "_meter", "_entropy", "_gap", "_ratios", "_script",
        "truncation", "mismatch_every",
    }
)  # fmt: skip
_UNTESTED = {  # of GRPOConfig's fields, that a run refuses or nobody has tried
    "use_liger_kernel": "has not been tested",
    "torch_compile": "has not been tested",
    "parallelism_config": "cuts rows in pieces",
    # transformers asks for a "paged" attention by the name of the one it finds, which is not its own on a GPU.
    "use_transformers_continuous_batching": "has not been tested",
    "use_transformers_paged": "has not been tested",
}

_SMALLER = (
    "memhead planned bins of {} tokens by the memory that was free; PackedGRPOTrainer(…, token_budget={}) takes smaller"
    " ones. Where a bin is one micro-batch already, lower per_device_train_batch_size."
)


class PackedGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, packed from ``train()`` on where that is exact. Its arguments are TRL's, and two more.

    memhead's head is installed for all of TRL's trainers, unless another one is: ``memhead.integrations.trl``.

    Args:
        token_budget: tokens of a bin. None for as many as are of use and fit on the GPU, by the plan, once the first
            completions are sampled; where nothing is planned, as many as TRL's micro-batch has slots when padded.
        require_packed: raise ValueError where TRL's step would be taken.

    Attributes:
        why_not_packed: why TRL's step is taken; None where the packed one is, and before ``train()``.
        step_check: figures of the check before the first step, against TRL's padded way; None without one.
        packed_bins: which bins the packed step takes and why, in words; None before the first completions.
    """

    def __init__(
        self, *args: Any, token_budget: int | None = None, require_packed: bool = False, **kwargs: Any
    ) -> None:
        if token_budget is not None and not (isinstance(token_budget, int) and token_budget > 0):
            raise ValueError(f"token_budget={token_budget!r} is not a number of tokens")
        # Before TRL looks at the adapters: LoRA on the head is then allowed.
        if memhead_trl.installed() is None:
            _install_head()
        super().__init__(*args, **kwargs)
        self.why_not_packed: str | None = None
        self.step_check: dict[str, Any] | None = None
        self.packed_bins: str | None = None
        self._wanted_budget, self._require_packed = token_budget, require_packed
        self._chosen = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's method, after the first call has chosen the step."""
        if not self._chosen:
            self._choose_step()
            self._chosen = True
        elif isinstance(self, PackedStep):
            self.begin_window()  # Unsloth puts this method, as it was found, on the trainer: past PackedStep's own
        return super().train(*args, **kwargs)

    def _choose_step(self) -> None:
        plain = type(self)
        rules = why_not_unsloths if _BY_UNSLOTH else ruled_out
        reason = first(next(_of_the_script(self), None) or rules(_made_with(self)))
        if reason is None:
            _put_before(self, self._wanted_budget)
            reason = "it was not tried to the end"
            try:
                reason = first(self._disagreement())
            finally:
                if reason is not None:
                    self.give_up_packing(plain)  # of PackedForward
                    for name in _STATE:  # else it is taken for the script's at the next try
                        self.__dict__.pop(name, None)
        self.why_not_packed = reason
        if reason is None:
            return
        if self._require_packed:
            raise ValueError(f"the packed step would not be exact: {reason}")
        if is_main():
            whose = "Unsloth's" if _BY_UNSLOTH else "TRL's"
            said = f"the packed step would not be exact, so {whose} step is used: {reason}"
            # Where train() is called, which Unsloth has wrapped.
            warnings.warn(said, stacklevel=4 if _BY_UNSLOTH else 3)

    def _disagreement(self) -> str | None:
        """Why the packed step is not to be trusted with this model, or None, by a few prompts of the data set."""
        prompts = [row["prompt"] for row in islice(self.train_dataset, PROMPTS)]
        self.step_check = try_step(self, self._tokenize_prompts(prompts)[0])
        way = "Unsloth's padded forward" if _BY_UNSLOTH else "TRL's padded way"
        return objection(self.step_check, "trainer.step_check", way)


class _InScript(PackedStep):
    """The packed step before a script's class, and seen by it as little as can be."""

    _script: type
    _wanted_budget: int | None
    packed_bins: str | None

    def get_train_dataloader(self) -> Any:
        """TRL's rows where the script looks at them; else they are read once a generation."""
        seen = any(_is_own(self._script, name) for name in ("training_step", "get_train_dataloader"))
        return super(PackedStep if seen else _InScript, self).get_train_dataloader()

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """A script's own is given all that TRL's finds: old log-probabilities, importance ratios, the reference."""
        if not _is_own(self._script, _SAMPLED):
            sampled = super()._generate_and_score_completions(inputs)
        else:
            sampled = super(PackedStep, self)._generate_and_score_completions(taken(inputs))
        if self.model.training and self.packed_bins is None:
            self._choose_bins(int(sampled["prompt_mask"].sum(1).max()))
        return sampled

    def _choose_bins(self, prompt: int) -> None:
        """Of all losses to come, by the longest prompt of the first generation, in tokens."""
        bins = bins_of(self, self._wanted_budget, prompt)
        self._token_budget, self.packed_bins = bins.tokens, str(bins)
        if is_main():
            print(f"packed step: {bins}", flush=True)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Where planned bins do not fit all the same, the error says how to have smaller ones."""
        try:
            return super().training_step(*args, **kwargs)
        except Exception as error:
            if self._wanted_budget is None and self._token_budget is not None and is_out_of_memory(error):
                error.add_note(_SMALLER.format(self._token_budget, max(1, self._token_budget // 2)))
            raise

    def _generate(self, prompts: Any) -> Any:
        """Without the stand-ins for TRL's passes, which come after it: what a script asks for within is computed."""
        later = self._skip_old_pass, self._keep_reference
        self._skip_old_pass = self._keep_reference = False
        try:
            return super()._generate(prompts)
        finally:
            self._skip_old_pass, self._keep_reference = later

    def _append(self, mode: str, metrics: dict[str, float]) -> None:
        """Without the histograms of ratios, which are for a run's report: a dozen figures more in the script's log."""
        super()._append(mode, {name: x for name, x in metrics.items() if not name.startswith(PREFIXES)})


def _install_head() -> None:
    """For TRL's trainers and, where there are such, Unsloth's. Raises ValueError for a variable that bypasses it."""
    if not _BY_UNSLOTH:
        memhead_trl.install()
        return
    from memhead.integrations import unsloth as memhead_unsloth

    memhead_unsloth.install()


def _put_before(trainer: Any, budget: int | None) -> None:
    """Let the trainer go on with the packed step, under the name that its class has."""
    script = type(trainer)
    parts = (_InScript, PackedUnsloth, script) if _BY_UNSLOTH else (_InScript, script)
    names = {"_script": script, "__module__": script.__module__, "__qualname__": script.__qualname__}
    trainer.__class__ = type(script.__name__, parts, names)
    trainer.begin_packing(budget)


def _made_with(trainer: Any) -> dict[str, Any]:
    """What `ruled_out` looks at; the adapters are on the model by now."""
    return {
        "model": trainer.model,
        "args": trainer.args,
        "train_dataset": trainer.train_dataset,
        "processing_class": trainer.processing_class,
        "tools": trainer.tools,
        "rollout_func": trainer.rollout_func,
        "environment_factory": trainer.environment_factories,
    }


def _of_the_script(trainer: Any) -> Iterator[str]:
    """Reasons against the packed step that a run's configuration does not let arise."""
    kind = type(trainer)
    yield from _of_unsloth(trainer)
    if not trl.__version__.startswith(TESTED):
        yield f"it goes around methods of TRL {TESTED}x, and this is {trl.__version__}"
    for name in _REPLACED:
        if _is_own(kind, name):
            yield f"{kind.__name__} has a {name} of its own, which the packed step would go around"
    step = inspect.unwrap(kind.training_step)
    if _is_own(kind, "training_step") and (asked := _INPUTS.intersection(step.__code__.co_names)):
        yield f"{kind.__name__} has a training_step of its own that calls {' and '.join(sorted(asked))} itself"
    ours = {name for cls in (_InScript, PackedUnsloth, PackedStep, PackedForward) for name in vars(cls)}
    for name in sorted(ours.intersection(dir(GRPOTrainer), vars(trainer))):
        if not name.startswith("__") and not _is_the_trainers(vars(trainer)[name]):
            yield f"{name} has been set on the trainer, which the packed step would go around"
    theirs = set(dir(kind)).union(vars(trainer)).difference(dir(GRPOTrainer))
    for name in sorted(theirs.intersection(ours | _STATE)):
        yield f"{kind.__name__} has a {name} of its own, a name that the packed step uses"
    for name, what in _UNTESTED.items():
        if getattr(trainer.args, name, None):
            yield f"{name} {what}"


def _of_unsloth(trainer: Any) -> Iterator[str]:
    """Reasons where Unsloth's classes are in this process."""
    loaded = hasattr(trainer.model, "for_training")  # by FastLanguageModel
    if loaded and not _BY_UNSLOTH and is_unsloths(trl.GRPOConfig):
        yield "recipes.packed_trainer was imported before Unsloth, so this is not Unsloth's trainer; import it after"
    if not _BY_UNSLOTH:
        return
    if not loaded:
        yield "Unsloth's trainer has a model that Unsloth has not loaded"
    for variable in set_for_its_loss():
        yield f"{variable} changes the loss of Unsloth's own step alone"
    if _is_own(type(trainer), _SAMPLED) and Correction.of(trainer) is not None:
        name = type(trainer).__name__
        yield f"{name} has a {_SAMPLED} of its own, which finds no importance ratio: Unsloth forms it in its own loss"
    if reads_vllms_logps_over_a_part(trainer):
        yield "vLLM's log-probabilities are over what top_k, top_p and min_p leave, the packed step's over all"


def _is_own(kind: Any, method: str) -> bool:
    """Whether a class overrides this method of TRL's trainer, or a script has put its own into TRL's class."""
    found, trls = getattr(kind, method), getattr(GRPOTrainer, method)
    return found is not trls or not _is_the_trainers(trls)


def _is_the_trainers(method: Any) -> bool:
    """Whether it is written in TRL, in Unsloth, which wraps some, or in the file that Unsloth has written."""
    if (code := getattr(method, "__code__", None)) is None:
        return False
    return code.co_filename == _FILE or any(Path(code.co_filename).is_relative_to(at) for at in _PACKAGES)
