"""A run's memory: what was planned, beside what was measured, and a page of advice where it is not enough.

plan_of(config)                      the plan, or None for a model that it cannot count
write_plan(plan, folder)             plan.json, before a model is loaded
write_measured(folder, summary)      the measured peaks beside it, and a line per phase for the terminal
explain(error, …)                    an allocation that failed -> OutOfMemory, whose text is the page
explained(config)                    the same of all inside, and of a vLLM that did not start
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memhead.shortage import is_out_of_memory
from recipes.config.load import RunConfig
from recipes.plan.plan import MIB, Plan, plan
from recipes.plan.processes import in_each
from recipes.plan.setting import Setting
from recipes.plan.shapes import model_config
from recipes.plan.work import Work
from recipes.problems import ConfigError, see, shortened
from recipes.processes import count, spread
from recipes.tracking.phases import PHASES, PLANNED, phase_of
from recipes.tracking.run_folder import RunFolder
from recipes.training.remedies import LOADING, gib, remedies
from recipes.training.session import RunError
from recipes.training.vllm_faults import explain_start

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
        f"memory  {phase}: planned {gib(phases[phase])}, measured {gib(peaks[phase])}"
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
    """An allocation that fails inside becomes OutOfMemory, a vLLM that does not start VllmStart; all else passes."""
    try:
        yield
    except (RuntimeError, MemoryError, ValueError, AssertionError) as error:
        explain_start(error, config)
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
    phase = phase_of(error) or ("training" if trainer is not None else LOADING)
    free, asked = _free(), _asked(str(error))
    traceback.clear_frames(error.__traceback__)  # which hold the tensors of the pass that failed
    saved = "" if trainer is None else save_last_step(trainer, phase)
    after = "" if trainer is None else f" after step {trainer.state.global_step}"
    lines = [
        f"out of memory in the phase {phase!r}{after}",
        f"  asked for  {asked}" if asked else f"  it says    {shortened(' '.join(str(error).split()), 600)}",
        f"  free       {free}",
        *_beside(config, summary),
        "What to change, the most useful first:",
        *(f"  {number}. {line}" for number, line in enumerate(remedies(config, phase, _setting(config)), 1)),
    ]
    if saved:
        lines.append(saved)
    raise OutOfMemory("\n".join([*lines, f"More: {see('out-of-memory')}"])) from None


def _setting(config: RunConfig) -> Setting | None:
    try:
        return _planned(config).setting
    except Exception:  # a page without figures is better than none
        return None


def _beside(config: RunConfig, summary: dict[str, Any] | None) -> list[str]:
    """The plan beside what was measured, a line per phase."""
    try:
        phases = _planned(config).memory.phases
    except Exception:  # a page without the plan is better than none
        return []
    peaks = {} if summary is None else _measured(summary)
    rows = [
        f"  {name:<28}{gib(size):>12}{gib(peaks[name]) if name in peaks else '–':>12}"
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
    """The size that an allocator's message names; "" for one that names none."""
    match = re.search(r"tried to allocate ([\d.]+) ?([KMG]i?B|bytes)", message, re.IGNORECASE)
    if match is None:
        return ""
    return gib(int(match[1])) if match[2] == "bytes" else f"{match[1]} {match[2]}"


def _free() -> str:
    """Of the GPU; without one, of main memory and of what this process may have."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{gib(free)} of {gib(total)}"
    import psutil

    memory, free = psutil.virtual_memory(), psutil.virtual_memory().available
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            free = min(free, max(0, limit - psutil.Process().memory_info().vms))
    except ImportError:  # no such limits there
        pass
    return f"{gib(free)} of {gib(memory.total)}"
