"""A run's memory: what was planned, beside what was measured, and a page of advice where it is not enough.

plan_of(config)                      the plan, or None for a model that it cannot count
write_plan(plan, folder)             plan.json, before a model is loaded
write_measured(folder, summary)      the measured peaks beside it, and a line per phase for the terminal
explain(error, …)                    an allocation that failed -> OutOfMemory, whose text is the page
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from memhead.shortage import is_out_of_memory
from recipes.config.load import RunConfig
from recipes.plan.plan import GIB, Plan, in_bins, measure, plan
from recipes.plan.processes import in_each
from recipes.plan.setting import Setting
from recipes.plan.shapes import model_config
from recipes.plan.work import Work
from recipes.problems import ConfigError, see
from recipes.processes import count, spread
from recipes.tracking.phases import PHASES, PLANNED, phase_of
from recipes.tracking.run_folder import RunFolder
from recipes.training.session import RunError

MIB = 2**20
PLAN_FILE = "plan.json"


class OutOfMemory(RunError):
    """An allocation failed; the message is a page of text."""


def plan_of(config: RunConfig) -> Plan | None:
    """The run's plan; None, and a line that says why, for a model that cannot be built without its weights.

    Fetches the model's config.json where the hub alone has it. Raises ConfigError for adapters that do not fit it, and
    for a model that needs code of its own.
    """
    try:
        model_config(config, network=True)
        return _planned(config)
    except ConfigError:
        raise
    except (
        Exception
    ) as error:  # of a model's own building, on a device where most models have never been built
        print(f"No plan of this model's memory: {type(error).__name__}: {error}", flush=True)
        return None


def _planned(config: RunConfig) -> Plan:
    """For the device that the run takes, a CPU where there is no GPU whatever the configuration was written for, and
    for one of its processes."""
    if not torch.cuda.is_available():
        config = config.model_copy(update={"grpo": {**config.grpo, "use_cpu": True}})
    found = plan(config)
    return in_each(found, config.processes, spread()) if config.processes > 1 else found


def write_plan(planned: Plan | None, folder: RunFolder) -> None:
    """plan.json: bytes by part and by phase, and of the device (null: none was there); the model's matrices."""
    if planned is not None:
        folder.write_json(PLAN_FILE, _recorded(planned))


def _recorded(planned: Plan) -> dict[str, Any]:
    work = Work.of(planned.setting.shape, planned.setting.trained)
    return {
        "device": planned.device_bytes,
        "parts": dict(planned.memory.parts),
        "phases": dict(planned.memory.phases),
        "work": None if work is None else asdict(work),
    }


def write_measured(planned: Plan | None, folder: RunFolder, summary: dict[str, Any]) -> list[str]:
    """plan.json again, with the measured peaks, in bytes by the plan's phases. Returns a line per phase: both in GiB.

    What a vLLM that sleeps takes while it samples is the user's choice (`gpu_memory_utilization`), of which the plan
    counts what one batch needs: where it was seen, it is a part of its own.
    """
    peaks = _measured(summary)
    if planned is None or not peaks:
        return []
    record = _recorded(planned)
    cache = round(max(figures.get("asleep_mib", 0.0) for figures in summary["memory"].values()) * MIB)
    phases = record["phases"]
    if cache:
        phases["generation"] += cache - record["parts"]["KV cache and sampling"]
        record["parts"]["vLLM's cache, as seen"] = cache
    folder.write_json(PLAN_FILE, record | {"measured": peaks, "measured_figure": summary["memory_figure"]})
    return [
        f"memory  {phase}: planned {_gib(phases[phase])}, measured {_gib(peaks[phase])}"
        for phase in phases
        if phase in peaks
    ]


def _measured(summary: dict[str, Any]) -> dict[str, int]:
    """Bytes by the plan's phases; for phases that it counts together, the higher peak."""
    figure, found = summary["memory_figure"], dict[str, int]()
    for phase in PHASES:
        mib = summary["memory"].get(phase, {}).get(figure)
        if phase in PLANNED and mib is not None:
            found[PLANNED[phase]] = max(found.get(PLANNED[phase], 0), round(mib * MIB))
    return found


@contextmanager
def explained(config: RunConfig) -> Iterator[None]:
    """An allocation that fails inside becomes OutOfMemory; everything else passes as it is."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        explain(error, config)
        raise


def explain(
    error: BaseException, config: RunConfig, trainer: Any = None, summary: dict[str, Any] | None = None
) -> None:
    """Raises OutOfMemory if that is what the error means, after saving a checkpoint of the trainer's last whole step.

    summary: of the run so far, for what was measured.
    """
    if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
        return
    phase = phase_of(error) or ("training" if trainer is not None else "loading the model")
    free, asked = _free(), _asked(str(error))
    traceback.clear_frames(error.__traceback__)  # which hold the tensors of the pass that failed
    saved = "" if trainer is None else save_last_step(trainer, phase)
    after = "" if trainer is None else f" after step {trainer.state.global_step}"
    lines = [
        f"out of memory in the phase {phase!r}{after}",
        f"  asked for  {asked}",
        f"  free       {free}",
        *_beside(config, summary),
        "What to change, the most useful first:",
        *(f"  {number}. {line}" for number, line in enumerate(remedies(config, phase), 1)),
    ]
    if saved:
        lines.append(saved)
    raise OutOfMemory("\n".join([*lines, f"More: {see('out-of-memory')}"])) from None


def remedies(config: RunConfig, phase: str) -> list[str]:
    """Settings to change, as on the command line; first those that by the plan save the most in this phase."""
    own = {
        "warm start": (
            "run.warm_start.batch_size",
            config.run.warm_start and config.run.warm_start.batch_size,
        ),
        "evaluation": ("run.evaluation.batch_size", config.run.evaluation.batch_size),
    }
    key, size = own.get(phase, ("", 0))
    first = [f"{key}={size // 2}"] if size and size > 1 else []
    try:
        setting = _planned(config).setting
    except Exception:  # a page without figures is better than none
        return [*first, *(text for text, _ in _changes(config, None))]
    name = PLANNED.get(phase.rpartition(": ")[2], "forward, loss and backward")
    before = measure(setting).phases[name]
    unplanned, saved = [], dict[str, int]()
    for text, other in _changes(config, setting):
        if other is None:
            unplanned.append(text)
        elif (gain := before - measure(other).phases[name]) > 0:
            saved[text] = gain
    ranked = sorted(saved, key=lambda text: -saved[text])
    return [*first, *(f"{text}  saves {_gib(saved[text])} as planned" for text in ranked), *unplanned]


def _changes(config: RunConfig, s: Setting | None) -> Iterator[tuple[str, Setting | None]]:
    """Each change as an override, and the resulting setting; None where that cannot be computed quickly."""
    grpo, model = config.grpo, config.model

    def changed(**values: Any) -> Setting | None:
        return None if s is None else replace(s, **values)

    if config.head.impl == "full":
        yield "head.impl=memhead", changed(head="memhead")
    if not model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", changed(checkpointing=True)
    size, steps = grpo["per_device_train_batch_size"], grpo["gradient_accumulation_steps"]
    if s is not None and s.bin_tokens is not None and s.bin_tokens > s.packed:
        budget = max(s.packed, s.bin_tokens // 2)  # a micro-batch is never divided
        yield f"step.token_budget={budget}", changed(bin_tokens=budget)
    elif size > 1:
        text = f"grpo.per_device_train_batch_size={size // 2} grpo.gradient_accumulation_steps={2 * steps}"
        smaller, told = changed(sequences=size // 2), config.step.token_budget
        if smaller and smaller.bin_tokens and (told is None or told > smaller.packed):
            # Bins would hold both halves again.
            text += f" step.token_budget={smaller.packed}"
        yield text, smaller and in_bins(config, smaller, 1)
    length = config.completion_length
    if length > 1:
        yield f"grpo.max_completion_length={length // 2}", changed(completion=length // 2)
    group = grpo["num_generations"]
    if s is not None and s.sampled > group and s.sampled % (2 * group) == 0:
        yield f"fewer completions sampled at a time ({s.sampled // 2})", changed(sampled=s.sampled // 2)
    if config.lora is None:
        yield "a lora section: adapters in place of every weight, its gradient and its optimizer state", None
    elif torch.cuda.is_available() and not (model.load_in_4bit or model.load_in_8bit):
        yield "model.load_in_4bit=true", None


def _beside(config: RunConfig, summary: dict[str, Any] | None) -> list[str]:
    """The plan beside what was measured, a line per phase."""
    try:
        phases = _planned(config).memory.phases
    except Exception:  # a page without the plan is better than none
        return []
    peaks = {} if summary is None else _measured(summary)
    rows = [
        f"  {name:<28}{_gib(size):>12}{_gib(peaks[name]) if name in peaks else '–':>12}"
        for name, size in phases.items()
    ]
    return [f"  {'phase':<28}{'planned':>12}{'measured':>12}", *rows]


def save_last_step(trainer: Any, phase: str) -> str:
    """Saves the state after the last whole step, and says where. Not within the optimizer, whose update is partial."""
    step, place = trainer.state.global_step, Path(trainer.args.output_dir)
    path = place / f"checkpoint-{step}"
    if path.is_dir():
        return f"Checkpoint: {path}; the same command with --resume and a change goes on from it"
    there = sorted(place.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    last = f"the last checkpoint is {there[-1]}" if there else "there is no checkpoint"
    if phase == "optimizer":
        return f"The weights may be half updated and are not saved; {last}"
    if count() > 1:
        return f"The other processes are inside a step, so nothing is saved; {last}"
    if trainer.optimizer is None:  # nothing was trained yet
        return ""
    trainer.model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        trainer._save_checkpoint(trainer.model, trial=None)
    except (OSError, RuntimeError, MemoryError) as error:
        return f"No checkpoint could be saved: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if not path.is_dir():
        return "No checkpoint could be saved after this step"  # the trainer has said why
    return f"Checkpoint: {path}; the same command with --resume and a change goes on from it"


def _asked(message: str) -> str:
    """The size that an allocator's message names."""
    match = re.search(r"tried to allocate ([\d.]+) ?([KMG]i?B|bytes)", message, re.IGNORECASE)
    if match is None:
        return "not said"
    return _gib(int(match[1])) if match[2] == "bytes" else f"{match[1]} {match[2]}"


def _free() -> str:
    """Of the GPU; without one, of main memory and of what this process may have."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{_gib(free)} of {_gib(total)}"
    import psutil

    memory, free = psutil.virtual_memory(), psutil.virtual_memory().available
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            free = min(free, max(0, limit - psutil.Process().memory_info().vms))
    except ImportError:  # no such limits there
        pass
    return f"{_gib(free)} of {_gib(memory.total)}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.2f} MiB"
