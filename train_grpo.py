"""Train a model by GRPO with memhead as its language-model head.

    python train_grpo.py --config configs/quickstart.yaml [section.key=value …] [--resume]
    python train_grpo.py --config … --plan [--device "24 GiB"]     what it will need, without training
    python train_grpo.py --config … --evaluate runs/quickstart/final

One YAML file describes the run; docs/configuration.md lists every key. The run leaves a folder (`runs/<name>/`) with
its configuration, metrics, memory by phase, a sample of completions, a report and the final model. Ctrl-C or
SIGTERM ends the run after the step in hand; `--resume` goes on from the last checkpoint, in the latest folder of its
name that has one.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before TRL and transformers are imported: they phone home otherwise.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from recipes.config.load import RunConfig, load_config
from recipes.problems import EXIT_STATUS, ConfigError, visible

if TYPE_CHECKING:
    from recipes.tracking.run_folder import RunFolder
    from recipes.training.session import Session, Trained


def main(arguments: list[str]) -> int:
    """Run from the command line. Exit status: 0 done, 1 failed, 2 a mistake in the configuration, 130 stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML file")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of this run")
    parser.add_argument("--plan", action="store_true", help="print what memory the run needs; train nothing")
    parser.add_argument("--device", metavar="SIZE", help="with --plan: what to fit, '24 GiB' or L4")
    parser.add_argument("--evaluate", metavar="CHECKPOINT", help="measure a checkpoint; train nothing")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a key of the file"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.device is not None and not options.plan:
        parser.error(f"--device {options.device!r}: means nothing without --plan; add it, or leave this out")
    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_STATUS
    if options.plan:
        from recipes.plan import plan

        return plan.show(config, options.device)
    if options.evaluate is not None:
        from recipes.training import evaluation

        return evaluation.show(config, options.evaluate)
    return train(config, resume=options.resume, command=_command(options))


def train(config: RunConfig, *, resume: bool = False, command: str = "") -> int:
    """The run, top to bottom: begin, optimise, finish. Returns the exit status."""
    from recipes.training.preflight import check  # the heavy imports wait until the configuration is right

    try:
        check(config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_STATUS

    from memhead.integrations.handle import HeadBypassed
    from recipes.training.callbacks import sigterm_as_ctrl_c
    from recipes.training.memory import explained
    from recipes.training.session import RunError

    session = None
    try:
        with explained(config), sigterm_as_ctrl_c():
            session = begin(config, resume=resume)
        if session is None:
            return 0
        with explained(config):
            trained = optimise(session)
        return finish(session, trained, command)
    except KeyboardInterrupt:
        when = " before training began; run the same command again" if session is None else ""
        print(f"\nStopped{when}.", file=sys.stderr)
        return 130
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_STATUS
    except (RunError, HeadBypassed, OSError, ValueError) as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return 1


def begin(config: RunConfig, *, resume: bool) -> Session | None:
    """Task, rewards, run folder and model, warm-started and checked; None for a run that is finished already."""
    from recipes.models import load
    from recipes.models.prompts import check_problems
    from recipes.tracking.run_folder import RunFolder
    from recipes.training.finite import require_finite
    from recipes.training.head_check import require_exact_head
    from recipes.training.memory import plan_of, write_plan
    from recipes.training.resume import is_finished, model_to_load, require_same, what_changed
    from recipes.training.rewards import prepare
    from recipes.training.session import Session
    from recipes.training.warm_start import begin_supervised

    task = config.make_task()
    begun = RunFolder.to_resume(config.run.output_root, config.run.name) if resume else None
    if begun is not None:
        require_same(config, begun)
        if is_finished(config, begun):
            print(f"{begun.path} is finished; a larger grpo.max_steps would go on.")
            return None
        print(f"Resuming from {begun.checkpoint}", *what_changed(config, begun), sep="\n", flush=True)
    rewards = prepare(task)  # before a folder is written to: a reward may break the contract
    check_problems(config, task)
    planned = plan_of(config)
    if begun is not None:
        begun.begin_session(config)
    folder = begun or RunFolder.create(config.run.output_root, config.run.name, config)
    write_plan(planned, folder)
    arguments = config.grpo_config(folder.path / "checkpoints")
    model, tokenizer = load.load(model_to_load(config, folder), task, config.run.seed, lora=config.lora)
    session = Session(config, task, rewards, folder, arguments, model, tokenizer)
    require_finite(session)
    if config.run.warm_start is not None and folder.checkpoint is None:
        begin_supervised(session, config.run.warm_start)
    require_exact_head(session)
    return session


def optimise(session: Session) -> Trained:
    """GRPO from the first step, or the last checkpoint, to the last step or whatever ends it before."""
    from recipes.models.foreign import no_foreign_code
    from recipes.models.generation import by_trainer
    from recipes.tracking.tracker import track
    from recipes.training.callbacks import AccuracyEvery, BypassGuard, Interruption, SaySigns
    from recipes.training.evaluation import evaluator
    from recipes.training.memory import explain
    from recipes.training.resume import is_trained, restore
    from recipes.training.session import Trained
    from recipes.training.trainer import count_calls, install_head, make_trainer
    from recipes.training.worst_case import require_room

    config, folder, checkpoint = session.config, session.folder, session.folder.checkpoint
    with install_head(config, session.arguments) as handle, Interruption() as interruption:
        trainer = make_trainer(session)
        tracker = track(trainer, folder, config.tracking)
        evaluate = evaluator(config, session.task, by_trainer(trainer))
        for callback in (BypassGuard(handle), interruption, SaySigns()):
            trainer.add_callback(callback)
        if config.run.evaluation.every is not None:
            trainer.add_callback(AccuracyEvery(config.run.evaluation.every, evaluate, tracker.evaluated))
        finished = False
        try:
            require_room(session, trainer)
            if checkpoint is None:
                tracker.evaluated(0, evaluate())
                trainer.train()
            elif is_trained(config, folder):
                restore(trainer, checkpoint)
                tracker.drop_after(trainer.state.global_step)
            else:
                with no_foreign_code("", str(checkpoint)):
                    trainer.train(resume_from_checkpoint=str(checkpoint))
            if _took_every_step(trainer):
                _save(trainer, folder.final)  # first: the evaluation may be cut off
                if not interruption.asked:
                    tracker.evaluated(trainer.state.global_step, evaluate())
                    finished = True
        except KeyboardInterrupt:
            pass  # a second Ctrl-C
        except (RuntimeError, MemoryError) as error:
            explain(error, config, trainer, tracker.summary())
            raise
        finally:
            tracker.close()
            count_calls(handle, folder)
    return Trained(trainer, tracker, finished)


def finish(session: Session, trained: Trained, command: str) -> int:
    """The report, the closing table, and how to go on where something is left to do. Returns the exit status."""
    from recipes.report.page import write_report
    from recipes.tracking.terminal import print_summary
    from recipes.training.memory import write_measured
    from recipes.training.resume import FINISHED

    folder, trainer = session.folder, trained.trainer
    if not _took_every_step(trainer):
        _save(trainer, folder.path / "interrupted")
    if trainer.state.log_history:
        print("".join(f"{line}\n" for line in write_measured(folder, trained.tracker.summary())), end="")
        write_report(folder)
    print_summary(trained.tracker.summary(), folder)
    if trained.finished:
        folder.write_json(FINISHED, {"step": trainer.state.global_step})
        return 0
    print(f"Stopped at step {trainer.state.global_step}. {_how_to_go_on(folder, command)}")
    return 130


def _took_every_step(trainer: Any) -> bool:
    return 0 < trainer.state.max_steps <= trainer.state.global_step


def _how_to_go_on(folder: RunFolder, command: str) -> str:
    if folder.checkpoint is None:  # stopped at once, or after the last step, without run.save_every
        return f"There is no checkpoint to go on from; to begin again: {command}"
    return f"To go on: {command} --resume"


def _save(trainer: Any, place: Path) -> None:
    """The model as safetensors with its tokenizer."""
    trainer.save_model(str(place))
    trainer.processing_class.save_pretrained(str(place))


def _command(options: argparse.Namespace) -> str:
    """The command line that began this run, without --resume."""
    return shlex.join(["python", "train_grpo.py", "--config", options.config, *options.overrides])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
