"""Which step a run takes: the packed one where it is exact, else TRL's, with the reason. The choice is recorded."""

from __future__ import annotations

from typing import Any

import torch

from recipes.config.load import RunConfig
from recipes.config.unsloth import is_unsloths
from recipes.models.compiled import is_compiled, make_plain, plain_layers
from recipes.models.generation import token_ids
from recipes.plan.plan import RESERVE, Plan, token_budget
from recipes.problems import ConfigError, Problem
from recipes.processes import first, smallest
from recipes.training.ahead import ahead
from recipes.training.checkpoints import guarded
from recipes.training.planned_bins import AS_TOLD, Bins
from recipes.training.ratios import measured
from recipes.training.session import Session
from recipes.training.truncation import supported, truncation_of


def trainer_with_step(session: Session, given: dict[str, Any]) -> Any:
    """A trainer by ``step.impl``.

    Args:
        given: what a guarded GRPOTrainer of TRL takes.

    Raises ConfigError where packing was asked for by name and the start-up check finds it off or, under Unsloth, the
    model rules it out.
    """
    import trl

    config = session.config
    if config.unsloths_step:
        _keep(session, {"impl": "unsloth"})
        return guarded(trl.GRPOTrainer)(**given)
    if config.model.loader == "unsloth" and is_unsloths(trl.GRPOConfig):  # not on its CPU backend
        return _on_unsloths_model(session, given)
    trainer_class = measured(
        supported(trl.GRPOTrainer, truncation_of(config)), config.tracking.mismatch_every
    )
    if config.step.ahead:
        trainer_class = ahead(trainer_class)
    if config.step.impl == "trl":
        trainer = _with_right_layers(session, guarded(trainer_class)(**given))
        _keep(session, {"impl": "trl"})
        return trainer
    from recipes.training.packed_step import packed
    from recipes.training.packed_support import ruled_out

    reason = ruled_out(given)
    if reason is not None:
        trainer = _with_right_layers(session, guarded(trainer_class)(**given))
        _fall_back(session, reason)
        return trainer
    budget = planned_budget(config, session.planned, given["args"].device)
    trainer = guarded(packed(trainer_class))(**given, token_budget=budget)
    reason = first(_check(session, trainer))
    if reason is not None and is_compiled(session.model):
        with plain_layers(trainer.model):
            without = first(_check(session, trainer))
        if without is None:
            _compile_no_more(session, trainer, reason)
            reason = None
    if reason is not None:
        trainer.give_up_packing(guarded(trainer_class))
        if "impl" in config.step.model_fields_set:
            raise ConfigError([Problem("step.impl", reason, "packed", "set it to trl")])
        trainer = _with_right_layers(session, trainer)
        _fall_back(session, reason)
        return trainer
    _say_packed(session, budget)
    return trainer


def _on_unsloths_model(session: Session, given: dict[str, Any]) -> Any:
    """The packed step, asked for by name, in the trainer that Unsloth has written. Raises ConfigError."""
    import trl

    from recipes.training.packed_unsloth import packed_unsloth, why_not_unsloths

    budget = planned_budget(session.config, session.planned, given["args"].device)
    reason = why_not_unsloths(given)
    if reason is None:
        trainer = guarded(packed_unsloth(trl.GRPOTrainer))(**given, token_budget=budget)
        reason = _check(session, trainer, "Unsloth's padded forward")
    if reason is not None:
        raise ConfigError(
            [Problem("step.impl", reason, "packed", "remove it: Unsloth has a step of its own")]
        )
    _say_packed(session, budget)
    return trainer


def _say_packed(session: Session, budget: int | None) -> None:
    if budget is None:
        bins = "bins of as many tokens as a padded micro-batch has slots"
    else:
        bins = str(Bins(budget, AS_TOLD if session.config.step.token_budget else "planned"))
    layers = "; layers compiled" if is_compiled(session.model) else ""
    print(f"step: packed, in {bins}{layers}", flush=True)
    _keep(session, {"impl": "packed", "token_budget": budget})


def _with_right_layers(session: Session, trainer: Any) -> Any:
    """TRL's trainer, if its layers are not compiled or compute what plain ones do. Raises ConfigError."""
    if is_compiled(session.model) and (reason := first(_check(session, trainer))) is not None:
        _compile_no_more(session, trainer, reason)
    return trainer


def _compile_no_more(session: Session, trainer: Any, reason: str) -> None:
    """Go on with plain layers. Raises ConfigError where compiled ones were asked for by name."""
    if session.config.model.compile_layers:
        raise ConfigError([Problem("model.compile_layers", reason, True, "set it to false")])
    make_plain(trainer.model)
    print(f"layers: compiled ones would not be exact, so they are as they came: {reason}", flush=True)


def planned_budget(config: RunConfig, planned: Plan | None, device: torch.device) -> int | None:
    """Tokens of a bin, by `recipes.plan.plan.token_budget`, from the memory that is available to this run."""
    if config.step.token_budget is not None or planned is None or device.type != "cuda":
        return config.step.token_budget
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device) + int(RESERVE)  # the plan counts CUDA's context itself
    return token_budget(config, planned.setting, smallest(min(total, free + ours)))


def _check(session: Session, trainer: Any, way: str = "TRL's padded way") -> str | None:
    """Why the packed step is not to be trusted with this model, or None; the figures go to head_check.json.

    way: what it is compared with, in words.
    """
    from recipes.training.step_check import PROMPTS, objection, try_step

    prompts = token_ids(
        session.tokenizer,
        session.task.held_out[:PROMPTS]["prompt"],  # or as many as there are
        session.config.chat_template_kwargs,
    )
    found, name = try_step(trainer, prompts), "head_check.json"
    path = session.folder.write_json(name, (session.folder.read_json(name) or {}) | {"step": found})
    return objection(found, path, way)


def _fall_back(session: Session, reason: str) -> None:
    print(f"step.impl: packed would not be exact, so TRL's step is used: {reason}", flush=True)
    _keep(session, {"impl": "trl", "why": reason})


def _keep(session: Session, step: dict[str, Any]) -> None:
    """The session's step, and whether its layers are compiled, in its environment.json."""
    name, found = "environment.json", {"step": step, "compiled_layers": is_compiled(session.model)}
    session.folder.write_json(name, (session.folder.read_json(name) or {}) | found)
