"""What a run records while it trains: rewards, time and memory by phase, a sample of completions.

    folder = RunFolder.create("runs", "quickstart", config)
    tracker = track(trainer, folder, config.tracking)
    tracker.evaluated(0, {"accuracy": 0.44})
    trainer.train()
    tracker.evaluated(trainer.state.global_step, {"accuracy": 0.59})
    tracker.close()
    print_summary(tracker.summary(), folder)

metrics.jsonl gets one object a logged step, written through at once; completions.jsonl the sample.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from recipes.config.schema import TrackingConfig
from recipes.processes import gathered
from recipes.tracking import reporters as trackers
from recipes.tracking.asleep import sleeping_engine
from recipes.tracking.meters import HEADLINE, CudaMeter, make_meter
from recipes.tracking.phases import PhaseClock, attach, attach_optimizer
from recipes.tracking.ratios import PREFIXES, from_logs
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.speed import Speed
from recipes.tracking.summary import summarize
from recipes.tracking.terminal import Progress, print_summary

__all__ = ["RunFolder", "Tracker", "print_summary", "track"]

_NAMES = {  # TRL's name of a metric -> ours
    "reward": "reward",
    "reward_std": "reward_std",
    "entropy": "entropy",
    "kl": "kl",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "clipped_share",
    "frac_reward_zero_std": "zero_std_share",
    "step_time": "step_time",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "epoch": "epoch",
    "bad_step": "bad_step",
}
_TOKENS = {  # the packed step's name of a metric -> ours, below "tokens"
    "step/tokens_computed": "computed",
    "step/tokens_real": "real",
    "step/left_out": "left_out_share",
}


def track(
    trainer: Any,
    folder: RunFolder,
    tracking: TrackingConfig | None = None,
    *,
    console: Console | None = None,
    progress: bool = True,
) -> Tracker:
    """Records the trainer's run into the folder; call it once, before `trainer.train()`.

    trainer: a GRPOTrainer of TRL or the one that Unsloth generates; its methods are wrapped, on this object
    only. tracking: the section of the configuration, None for its defaults. progress: show the run in the
    terminal.
    """
    tracker = Tracker(trainer, folder, tracking or TrackingConfig(), console or Console(), progress)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)  # the terminal is ours
    trackers.keep_in_folder(trainer, folder)
    trainer.add_callback(_Events(tracker))
    return tracker


class Tracker:
    """Turns what a trainer logs into the run folder's lines. Made by `track`."""

    def __init__(
        self, trainer: Any, folder: RunFolder, tracking: TrackingConfig, console: Console, progress: bool
    ) -> None:
        self.folder = folder
        self._trainer = trainer
        self._tracking = tracking
        self._device = trainer.accelerator.device
        self._headline = HEADLINE.get(self._device.type, HEADLINE["cpu"])
        meter = make_meter(self._device, tracking.memory_every) if tracking.memory else None
        engine = sleeping_engine(trainer)
        if isinstance(meter, CudaMeter) and engine is not None:
            meter.asleep.watch(engine)
        self._clock = PhaseClock(self._device, meter)
        self._progress = Progress(console) if progress and trainer.is_world_process_zero() else None
        self._session_steps = 0
        self._logged_step = -1
        self._speed = Speed(trainer, folder)
        attach(trainer, self._clock, self._speed.counter)
        self._trl_log = trainer.log
        trainer.log = self._log

    def evaluated(self, step: int, figures: dict[str, Any]) -> None:
        """Records an evaluation after `step` optimizer steps: `accuracy` (0 to 1) and what belongs to it."""
        if not self._trainer.is_world_process_zero():
            return
        self.folder.metrics.write({"step": step, **figures})
        trackers.evaluated(self._trainer, figures)
        if self._progress is not None and figures.get("accuracy") is not None:
            self._progress.accuracy(step, figures["accuracy"], figures.get("accuracy_problems"))

    def drop_after(self, step: int) -> None:
        """Removes what was recorded of later steps, which a checkpoint after `step` knows nothing of."""
        self.folder.metrics.drop_after(step)
        self.folder.completions.drop_after(step)

    def summary(self) -> dict[str, Any]:
        """The run so far, a resumed run's earlier sessions included; see `recipes.tracking.summary.summarize`."""
        return summarize(self.folder.metrics.read())

    def summary_of_now(self) -> dict[str, Any]:
        """The same with this process's peaks since the last line, those of a step that was not ended included."""
        found = self.summary()
        found["memory"] = highest([found["memory"], self._clock.peaks()])
        return found | {"memory_figure": self._headline}

    def close(self) -> None:
        """Ends the progress bar and writes summary.json. Safe to call twice, and after Ctrl-C."""
        if self._progress is not None:
            self._progress.stop()
        if self._trainer.is_world_process_zero():
            self.folder.write_json("summary.json", self.summary())

    # What the trainer's events do, in the order in which they come.

    def begin_training(self, step: int, total_steps: int, optimizer: Any) -> None:
        """Training begins, or goes on from a checkpoint after `step` steps: later lines are done again."""
        attach_optimizer(optimizer, self._clock)
        if self._trainer.is_world_process_zero():
            if step > 0:
                self.drop_after(step)
            if self._progress is not None:
                self._progress.start(step, total_steps, self._last_accuracy())

    def _last_accuracy(self) -> float | None:
        """The last that is recorded: a resumed run's, until it measures again."""
        found = [
            record["accuracy"] for record in self.folder.metrics.read() if record.get("accuracy") is not None
        ]
        return found[-1] if found else None

    def begin_step(self) -> None:
        """An optimizer step begins."""
        if self._session_steps == 0:
            self._speed.begin()
        self._clock.begin_step(self._session_steps, self._trainer.model, self._trainer.optimizer)

    def end_step(self, step: int) -> None:
        """An optimizer step is done; `step` counts it."""
        self._clock.end_step()
        self._session_steps += 1
        if self._progress is not None:
            self._progress.advance(step)

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """In the place of `trainer.log`. Peaks are added before TRL's own log, which would average them."""
        step = self._trainer.state.global_step
        if "loss" not in logs or step == self._logged_step:  # an evaluation's log, or the closing one
            self._log_without_completions(logs, *args, **kwargs)
            return
        self._logged_step = step
        seconds, own_peaks, steps = self._clock.take()
        all_peaks = gathered(own_peaks)
        peaks = highest(all_peaks)
        mean_seconds = {phase: value / max(steps, 1) for phase, value in seconds.items()}
        sample = self._sample()  # read before TRL's log, in case it clears what it printed
        logs.update({f"time/{phase}": value for phase, value in mean_seconds.items()})
        logs.update(
            {
                f"memory/{p}/{figure}": value
                for p, figures in peaks.items()
                for figure, value in figures.items()
            }
        )
        self._trl_log(logs, *args, **kwargs)
        if not self._trainer.is_world_process_zero():
            return
        record = _record(step, self._trainer.state.log_history[-1])
        if speed := self._speed.take(mean_seconds, steps):
            record["speed"] = speed
        record.update(
            steps=steps, time=mean_seconds, memory=peaks, device=self._device.type, at=round(time.time(), 1)
        )
        if len(all_peaks) > 1:
            record["memory_by_process"] = all_peaks
        self.folder.metrics.write(record)
        for completion in sample:
            self.folder.completions.append({"step": step, **completion})
        if self._progress is not None:
            self._progress.logged(step, record, [figures.get(self._headline) for figures in peaks.values()])

    def _log_without_completions(self, *args: Any, **kwargs: Any) -> None:
        """TRL's log, which would print the last step's completions a second time."""
        asked, self._trainer.log_completions = self._trainer.log_completions, False
        try:
            self._trl_log(*args, **kwargs)
        finally:
            self._trainer.log_completions = asked

    def _sample(self) -> list[dict[str, Any]]:
        """Some of the last batch's completions, spread over the batch."""
        completions, count = last_completions(self._trainer), self._tracking.completions_sample
        if not completions:
            return []
        chosen = sorted({index * len(completions) // count for index in range(count)})
        return [completions[index] for index in chosen]


def highest(peaks: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of MiB by phase and figure, from several processes, the largest of each."""
    found: dict[str, dict[str, float]] = {}
    for own in peaks:
        for phase, figures in own.items():
            kept = found.setdefault(phase, {})
            for figure, value in figures.items():
                kept[figure] = max(kept.get(figure, 0.0), value)
    return found


def last_completions(trainer: Any) -> list[dict[str, Any]]:
    """The completions of the trainer's last batch, each with its prompt, rewards, advantage and what rewards logged."""
    kept = getattr(trainer, "_logs", None)
    if not kept:
        return []
    logged = {
        name: values for name, values in kept.get("extra", {}).items() if len(values) == len(kept["prompt"])
    }
    return [
        {
            "prompt": prompt,
            "completion": completion,
            "rewards": {name: values[i] for name, values in kept["rewards"].items()},
            "advantage": kept["advantages"][i],
            **({"extra": {name: values[i] for name, values in logged.items()}} if logged else {}),
        }
        for i, (prompt, completion) in enumerate(zip(kept["prompt"], kept["completion"], strict=False))
    ]


def _record(step: int, logs: dict[str, Any]) -> dict[str, Any]:
    """One line of metrics.jsonl from what TRL logged: our names, each reward function, the rest as TRL's."""
    record: dict[str, Any] = {"step": step}
    rest: dict[str, Any] = {}
    record.update({ours: logs[name] for name, ours in _NAMES.items() if name in logs})
    if tokens := {ours: logs[name] for name, ours in _TOKENS.items() if name in logs}:
        record["tokens"] = tokens
    rewards = {}
    for name, value in logs.items():
        if name.startswith("rewards/") and name.endswith("/mean"):
            rewards[name.removeprefix("rewards/").removesuffix("/mean")] = value
        elif name not in {*_NAMES, *_TOKENS, "step"} and not name.startswith(("time/", "memory/", *PREFIXES)):
            rest[name] = value
    return {**record, **from_logs(logs), "rewards": rewards, "trl": rest}


class _Events(TrainerCallback):
    """Passes the trainer's events on to the tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tracker.begin_training(state.global_step, state.max_steps, kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tracker.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tracker.end_step(state.global_step)
        if state.global_step == state.max_steps:  # steps since the last log would be in no figure
            control.should_log = True
