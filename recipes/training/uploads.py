"""Uploads to the hub (`grpo.push_to_hub`) of what is whole, and a word where one fails.

transformers uploads a checkpoint in the background as soon as it is written, and forgets how that ended. Here a
checkpoint is written aside and renamed, so it is uploaded under its name; and no upload that fails ends a run, whose
model is on the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.problems import visible

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Trainer
else:
    _Trainer = object


class Uploads(_Trainer):
    """To be put before the trainer's class. `write_card` and `_aside` are WholeCheckpoints's."""

    _aside: Path | None
    write_card: Callable[[Path], None]
    push_in_progress: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._uploads: list[tuple[int, Future[Any]]] = []  # after which step, and the upload

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """transformers' method, which it calls before the folder has its name."""
        if self._aside is None:
            self.upload(Path(checkpoint_folder))

    def upload(self, checkpoint: Path) -> None:
        """Begin to upload a whole checkpoint, as `grpo.hub_strategy` says."""
        if not self.args.push_to_hub:
            return
        if self.is_world_process_zero():
            self.write_card(Path(self.args.output_dir))
        super()._push_from_checkpoint(str(checkpoint))
        begun, known = getattr(self, "push_in_progress", None), [job for _, job in self._uploads]
        jobs = [] if begun is None else begun.jobs
        self._uploads += [(self.state.global_step, job) for job in jobs if job not in known]

    def _finish_current_push(self) -> None:
        """transformers' method, which waits for the last upload; then what has failed is told."""
        super()._finish_current_push()
        for step, job in self._uploads:
            if job.done() and not job.cancelled() and (error := job.exception()) is not None:
                self._tell(f"step {step}: the upload to the hub failed: {error}")
        self._uploads = [(step, job) for step, job in self._uploads if not job.done()]

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' method. A hub that does not answer is told, and how to upload by hand."""
        from httpx import HTTPError

        try:
            return super().push_to_hub(*args, **kwargs)
        except (HTTPError, OSError, ValueError) as error:
            by_hand = f"hf upload {self.hub_model_id or 'you/name'} RUN/final"
            self._tell(f"the upload to the hub failed: {error}; by hand: {by_hand}")
            return None

    def _tell(self, sentence: str) -> None:
        if self.is_world_process_zero():
            print(visible(sentence), flush=True)
