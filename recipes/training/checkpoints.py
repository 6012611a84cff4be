"""Checkpoints that are whole: written aside, summed, renamed; none inside a generation, none of a model that diverged.

transformers writes a checkpoint's files where they will be found, one after the other: what a kill leaves looks like a
checkpoint, and is resumed from with a traceback, or without its optimizer in silence. Here a checkpoint's folder is
there once all of it is.

A generation that serves several optimizer steps (grpo.num_iterations, grpo.steps_per_generation) is not kept, so a
checkpoint inside it would go on with other completions: it is put off to where the generation ends.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_model, save_model
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from recipes.models.finite import first_not_finite
from recipes.models.manifest import MANIFEST, REFERENCE, condemn, note_base, seal
from recipes.problems import ConfigError
from recipes.processes import first, is_first_with, spread
from recipes.tracking.files import naming_what_failed, write_whole
from recipes.training.resume import apply_settings
from recipes.training.uploads import Uploads

if TYPE_CHECKING:
    from recipes.training.finite import FiniteSteps as _Trainer
else:
    _Trainer = object

ASIDE = "_unfinished"  # what is in this folder of checkpoints/ was cut off; uploads leave out what begins so


def steps_of_generation(arguments: Any) -> int:
    """Optimizer steps from one border to the next: a border is where no completion is left that was sampled before."""
    window = arguments.gradient_accumulation_steps
    return math.lcm(arguments.steps_per_generation * arguments.num_iterations, window) // window


class WholeCheckpoints(_Trainer):
    """To be put before `Uploads` and `FiniteSteps`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._aside: Path | None = None
        self._put_off = False
        self._settings: list[dict[str, Any]] = []  # the optimizer's groups, as the configuration says
        self.card: Callable[[], str] | None = (
            None  # the run's model card, for each checkpoint and for the hub
        )
        self._reference_moved = self.args.sync_ref_model
        self.add_callback(_AtTheBorder(self))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, every = self.state.global_step, steps_of_generation(self.args)
        if step % every != 0:
            if not self._put_off:
                self._say(
                    f"step {step}: no checkpoint inside a generation; the next is after step {_up(step, every)}"
                )
            self._put_off = True
            return
        self._put_off = False
        reason = first(self._why_not())
        if reason is not None:
            self._say(f"step {step}: no checkpoint is written: {reason}")
            return
        place = Path(self._get_output_dir(trial))
        name = f"checkpoint-{step}"
        with naming_what_failed(place / name):
            with self._written_aside(place / ASIDE):
                super()._save_checkpoint(model, trial)
                self._save_reference(place / ASIDE / name / REFERENCE)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.write_card(place / ASIDE / name)
                _publish(place / ASIDE / name, place / name)
                self.upload(place / name)
                rotate_checkpoints(str(place), self.args.save_total_limit, use_mtime=True)
            self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trainer's. With adapters it also notes which sealed model they belong to."""
        super().save_model(output_dir, _internal_call)
        adapters = getattr(self.accelerator.unwrap_model(self.model), "peft_config", {})
        for base in {one.base_model_name_or_path for one in adapters.values()} - {None, ""}:
            if self.args.should_save and (Path(base) / MANIFEST).is_file():
                note_base(Path(output_dir or self.args.output_dir), Path(base))

    def _save_reference(self, file: Path) -> None:
        """Where it moves, it is neither the model that the run began with nor the one that is trained."""
        if self._reference_moved and self.args.should_save and not spread():
            file.parent.mkdir()
            save_model(self.accelerator.unwrap_model(self.ref_model), str(file))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / REFERENCE
        if self.ref_model is not None and file.is_file():
            load_model(self.accelerator.unwrap_model(self.ref_model), str(file))
            self._reference_moved = True  # also where this session leaves it where it is

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Ours in the place of TRL's, which knows neither the run's data nor its figures; this one goes to the hub."""
        if self.is_world_process_zero():
            self.write_card(Path(self.args.output_dir))

    def write_card(self, place: Path) -> None:
        """The run's model card, as README.md of this folder. Raises CannotWrite."""
        if self.card is None:
            return
        try:
            card = self.card()
        except ConfigError as error:  # somebody changed the run's files; its weights do not depend on them
            print(f"{place} is left without a model card: {error}", file=sys.stderr, flush=True)
            return
        place.mkdir(parents=True, exist_ok=True)
        write_whole(place / "README.md", card)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's. It is made before a checkpoint is read, of which deepspeed reads the optimizer by itself."""
        scheduler = super().create_scheduler(*args, **kwargs)
        groups = self.optimizer.param_groups
        self._settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _plain_cpu(self.args):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            apply_settings(self.optimizer, self.lr_scheduler, self._settings)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The trainer's, where each process finds its own: after another number of them only some would."""
        kept = (
            self.args.world_size if checkpoint is None else len(list(Path(checkpoint).glob("rng_state*.pth")))
        )
        if kept != self.args.world_size:
            self._say(f"{checkpoint} has random states of {kept} process(es): sampling goes on from the seed")
            return
        super()._load_rng_state(checkpoint)

    @contextmanager
    def _written_aside(self, aside: Path) -> Iterator[None]:
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            yield
        finally:
            self._aside = None

    def _why_not(self) -> str | None:
        """What keeps this state from being saved."""
        if self.bad_steps.in_a_row:
            return "its last step was not finite"
        optimizer = self.optimizer
        while hasattr(optimizer, "optimizer"):  # in the wrappers of accelerate and deepspeed
            optimizer = optimizer.optimizer
        tensors = [
            (f"{key} of parameter {number}", value)
            for number, values in enumerate(optimizer.state.values())
            if isinstance(values, dict)
            for key, value in values.items()
            if hasattr(value, "is_floating_point")
        ]
        name = first(first_not_finite(tensors))  # of a part, one process alone may know
        return self.why_unusable() if name is None else f"the optimizer's {name} is not finite"

    def condemn_checkpoints(self, step: int, reason: str) -> None:
        """Have those of `step` and after passed over: from their weights no finite step was taken.

        By the process that finds it first: sampling may fail in one alone, which need not be the main one.
        """
        if not is_first_with("condemned"):
            return
        for place in Path(self.args.output_dir).glob("checkpoint-*"):
            number = place.name.rpartition("-")[2]  # beside them may lie a copy: checkpoint-4-old
            if number.isdecimal() and int(number) >= step:
                condemn(place, reason)

    def _say(self, sentence: str) -> None:
        if self.is_world_process_zero():
            print(sentence, flush=True)


def guarded(trainer_class: type) -> type:
    """The class of a trainer with what makes its run trustworthy before it: finite steps, whole checkpoints, rewards
    that fail seldom."""
    from recipes.training.finite import FiniteSteps
    from recipes.training.rewards import FailuresOfAll

    parts = (WholeCheckpoints, Uploads, FiniteSteps, FailuresOfAll, trainer_class)
    return type(f"Guarded{trainer_class.__name__}", parts, {})


class _AtTheBorder(TrainerCallback):
    """Makes up for a checkpoint that was put off; and the checkpoint's intervals give way to the configuration's."""

    def __init__(self, trainer: WholeCheckpoints) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Steps between two logs and checkpoints, as asked for now."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for it where the generation ends."""
        if self._trainer._put_off and state.global_step % steps_of_generation(args) == 0:
            control.should_save = True


@contextmanager
def _plain_cpu(arguments: Any) -> Iterator[None]:
    """accelerate calls the CPU of several processes cpu:0, and torch reads no file to a device of that name."""
    named = arguments.device
    if named.type == "cpu":
        vars(arguments)["_setup_devices"] = torch.device("cpu")
    try:
        yield
    finally:
        vars(arguments)["_setup_devices"] = named


def _publish(written: Path, place: Path) -> None:
    """The finished folder under its name, in one go."""
    seal(written)
    if place.exists():  # of a session before, damaged or overtaken
        os.rename(place, written.parent / "replaced")
    os.rename(written, place)
    directory = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    shutil.rmtree(written.parent, ignore_errors=True)


def _up(step: int, every: int) -> int:
    return -(-step // every) * every
