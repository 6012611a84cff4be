"""Train a model by GRPO with memhead as its language-model head.

    python train_grpo.py --config configs/quickstart.yaml [section.key=value …] [--resume]
    torchrun --nproc-per-node 8 train_grpo.py --config …           the same on eight GPUs (docs/scaling.md)
    python train_grpo.py --config … --plan [--device "24 GiB"]     what it will need, without training
    python train_grpo.py --config … --pilot                        what 64 prompts say of group size and length
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
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

# Before TRL and transformers are imported: they phone home otherwise.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from recipes.config.load import RunConfig, load_config
from recipes.output import lasting_output
from recipes.problems import EXIT_STATUS, ConfigError, visible
from recipes.processes import complain, is_first_here, let_the_first_speak, spread
from recipes.stops import leave, stopped_in_a_line

if TYPE_CHECKING:
    from recipes.tracking.run_folder import RunFolder
    from recipes.training.session import Session, Trained


class _Parser(argparse.ArgumentParser):
    """Speaks once, whatever launcher has started how many of it."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if is_first_here():
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        if not is_first_here():
            let_the_first_speak()
        super().error(message)


@lasting_output()
@stopped_in_a_line
def main(arguments: list[str]) -> int:
    """Run from the command line. Exit status: 0 done, 1 failed, 2 a mistake in the configuration, 130 stopped."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML file")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--resume", action="store_true", help="go on from the last checkpoint of this run")
    one.add_argument("--plan", action="store_true", help="print what memory and time it needs; train nothing")
    parser.add_argument("--device", metavar="SIZE", help="with --plan: what to fit, '24 GiB' or L4")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="with --plan: as if a launcher started so many"
    )
    parser.add_argument("--lengths", metavar="P+C", help="with --plan: mean tokens, prompt + completion")
    one.add_argument("--pilot", action="store_true", help="sample from 64 prompts; train nothing")
    one.add_argument("--evaluate", metavar="CHECKPOINT", help="measure a checkpoint; train nothing")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a key of the file"
    )
    options = parser.parse_intermixed_args(arguments)
    for name in ("device", "processes", "lengths"):
        if (value := getattr(options, name)) is not None and not options.plan:
            parser.error(f"--{name} {value!r}: means nothing without --plan; add it, or leave this out")
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes {options.processes}: is no number of processes; give 1 or more")
    if options.plan and not is_first_here():
        return 0
    if not options.plan and options.evaluate is None and is_first_here():
        print(f"Reading {options.config}", flush=True)  # at once: what checks it takes seconds to be imported
    try:
        config = load_config(options.config, options.overrides, processes=options.processes)
    except ConfigError as error:
        complain(error)
        return EXIT_STATUS
    if options.plan:
        from recipes.plan.show import show

        return show(config, options.device, options.lengths)
    if options.evaluate is not None:
        from recipes.training import evaluation

        return evaluation.show(config, options.evaluate)
    if options.pilot:
        if config.processes > 1:
            parser.error(
                f"--pilot: is for one process, and a launcher started {config.processes}; start it with python alone"
            )
        with TemporaryDirectory() as place:  # a pilot leaves no run behind
            run = config.run.model_copy(update={"output_root": place})
            return train(config.model_copy(update={"run": run}), pilot=True)
    return train(config, resume=options.resume, command=_command(options))


def train(config: RunConfig, *, resume: bool = False, command: str = "", pilot: bool = False) -> int:
    """The run, top to bottom: begin, optimise, finish; or begin and sample a few prompts. Returns the exit status."""
    from recipes.tracking.environment import device_name
    from recipes.tracking.terminal import opening, silence_bars
    from recipes.training.preflight import check  # the heavy imports wait until the configuration is right

    if is_first_here():
        print(opening(config, device_name()), flush=True)
    try:
        check(config)
    except ConfigError as error:
        complain(error)
        return EXIT_STATUS
    silence_bars()

    from recipes import processes
    from recipes.training.callbacks import last_words

    processes.end_with_launcher()
    with processes.only_main_speaks():
        try:
            with last_words():
                status = _run(config, resume=resume, command=command, pilot=pilot)
        except processes.MainFailed:
            let_the_first_speak()
            return 1
    if status != 1:  # else the others may be anywhere
        processes.end()
    return status


def _run(config: RunConfig, *, resume: bool, command: str, pilot: bool) -> int:
    from memhead.integrations.handle import HeadBypassed
    from recipes.processes import MainFailed, blame, or_lost
    from recipes.training.callbacks import sigterm_as_ctrl_c
    from recipes.training.memory import explained
    from recipes.training.pilot import show
    from recipes.training.session import RunError

    session = None
    try:
        with explained(config), sigterm_as_ctrl_c():
            session = begin(config, resume=resume, pilot=pilot)
        if session is None:
            return 0
        with explained(config):
            if pilot:
                with sigterm_as_ctrl_c():
                    return show(session)
            trained = optimise(session)
        return finish(session, trained, command)
    except KeyboardInterrupt:
        if session is None:
            complain(f"\nStopped before training began{or_lost()}; run the same command again.")
        elif pilot:
            complain("\nStopped.")
        else:
            complain(f"\nStopped at once. {_how_to_go_on(session.folder)}")
            _report_so_far(session.folder)
        return 130
    except ConfigError as error:
        complain(error)
        return EXIT_STATUS
    except MainFailed:
        raise
    except (RunError, HeadBypassed, OSError, ValueError) as error:
        complain(f"error: {visible(str(error))}")
        if session is not None and not pilot:
            _report_so_far(session.folder)
        return 1
    except Exception as error:
        blame(error, "run the same command again" if session is None else _how_to_go_on(session.folder))
        if session is not None and not pilot:
            _report_so_far(session.folder)
        return 1


def begin(config: RunConfig, *, resume: bool, pilot: bool = False) -> Session | None:
    """Task, rewards, run folder and model, warm-started and checked; None for a run that is finished already.

    pilot: nothing is said of the folder, which does not outlast it.
    """
    from recipes.models import load
    from recipes.models.precision import rounded_away
    from recipes.models.prompts import (
        check_longest,
        check_problems,
        check_tokens,
        prompt_lengths,
        trained_on_too,
    )
    from recipes.models.saved import require_savable
    from recipes.processes import by_main
    from recipes.tracking.run_folder import RunFolder
    from recipes.training.finite import require_finite
    from recipes.training.head_check import require_exact_head
    from recipes.training.inputs import commit_of, inputs_of, keep, keep_commit, what_changed_in
    from recipes.training.memory import plan_of, write_plan
    from recipes.training.resume import (
        is_finished,
        model_to_load,
        require_as_sealed,
        require_same,
        require_same_spread,
        require_whole_warm_start,
        what_changed,
    )
    from recipes.training.rewards import prepare
    from recipes.training.session import Session
    from recipes.training.warm_start import begin_supervised

    task = config.make_task()
    root, name = config.run.output_root, config.run.name
    begun = by_main(lambda: RunFolder.to_resume(root, name)) if resume else None
    if begun is not None:
        require_same(config, begun)
        if is_finished(config, begun):
            print(f"{begun.path} is finished; a larger grpo.max_steps would go on.")
            return None
        require_same_spread(begun)
        by_main(partial(require_whole_warm_start, config, begun))
        print(f"Resuming from {begun.checkpoint}", *what_changed(config, begun), sep="\n", flush=True)
    by_main(partial(require_as_sealed, config, begun))
    rewards = prepare(task)  # before a folder is written to: a reward may break the contract
    check_problems(config, task)
    read = inputs_of(task)
    if begun is not None:
        print("".join(f"{line}\n" for line in what_changed_in(read, task, begun)), end="", flush=True)
    print("".join(f"{line}\n" for line in trained_on_too(task)), end="", flush=True)
    if (seen := prompt_lengths(config, task)) is not None:
        config = config.model_copy(update={"longest_prompt": seen.longest})
    planned, commit = plan_of(config), commit_of(begun)
    folder = by_main(lambda: begun.with_session(config) if begun else RunFolder.create(root, name, config))
    by_main(partial(keep, read, folder))
    if not pilot:
        print(f"Everything is kept in {folder.path}", flush=True)
    write_plan(planned, folder)
    arguments = config.grpo_config(folder.path / "checkpoints")
    model, tokenizer = load.load(model_to_load(config, folder), task, config.run.seed, lora=config.lora)
    print(by_main(lambda: keep_commit(model, folder, commit)), end="", flush=True)
    session = Session(config, task, rewards, folder, arguments, model, tokenizer, planned)
    if config.model.name is not None or config.model.tokenizer is not None:
        check_tokens(config, task, model, tokenizer)
    check_longest(config, task, model, tokenizer)
    if (given := config.model.name) is not None:
        by_main(lambda: require_savable(model, tokenizer, given, "model.name"))
    require_finite(session)
    if told := rounded_away(config, model):
        print(told, flush=True)
    if config.run.warm_start is not None and folder.checkpoint is None:
        session = begin_supervised(session, config.run.warm_start)
    require_exact_head(session)
    return session


def optimise(session: Session) -> Trained:
    """GRPO from the first step, or the last checkpoint, to the last step or whatever ends it before."""
    from recipes.models.foreign import no_foreign_code
    from recipes.models.generation import by_trainer
    from recipes.processes import anywhere, count
    from recipes.report.model_card import model_card
    from recipes.tracking.tracker import track
    from recipes.training.callbacks import AccuracyEvery, BypassGuard, Interruption, SaySigns
    from recipes.training.evaluation import evaluator
    from recipes.training.memory import explain, save_last_step
    from recipes.training.resume import is_trained, restore
    from recipes.training.session import Trained
    from recipes.training.trainer import count_calls, install_head, make_trainer
    from recipes.training.worst_case import require_room

    config, folder, checkpoint = session.config, session.folder, session.folder.checkpoint
    with install_head(config, session.arguments) as handle, Interruption() as interruption:
        trainer = make_trainer(session)
        trainer.card = partial(model_card, folder.path)
        tracker = track(trainer, folder, config.tracking)
        evaluate = evaluator(config, session.task, by_trainer(trainer))
        for callback in (BypassGuard(handle), interruption, SaySigns()):
            trainer.add_callback(callback)
        for reward in session.rewards.functions:
            reward.keep = partial(save_last_step, trainer, "rewards")
        if config.run.evaluation.every is not None:
            trainer.add_callback(AccuracyEvery(config.run.evaluation.every, evaluate, tracker.evaluated))
        saved = finished = False
        try:
            require_room(session, trainer)
            if checkpoint is None:
                tracker.evaluated(0, evaluate())
                trainer.train()
            elif is_trained(trainer, folder):
                restore(trainer, checkpoint)
                tracker.drop_after(trainer.state.global_step)
            else:
                with no_foreign_code("", str(checkpoint)):
                    trainer.train(resume_from_checkpoint=str(checkpoint))
            if _took_every_step(trainer):
                _save(trainer, folder.final)  # first: the evaluation may be cut off
                saved = True
                if not anywhere(interruption.asked):
                    tracker.evaluated(trainer.state.global_step, evaluate())
                    finished = True
        except KeyboardInterrupt:  # a second Ctrl-C
            if count() > 1:  # the others may be anywhere, so nothing can be done together any more
                raise
        except (RuntimeError, MemoryError) as error:
            explain(error, config, trainer, tracker.summary_of_now())
            raise
        finally:
            tracker.close()
            count_calls(handle, folder)
    return Trained(trainer, tracker, saved, finished)


def finish(session: Session, trained: Trained, command: str) -> int:
    """The report, the closing table, and how to go on where something is left to do. Returns the exit status."""
    from recipes.processes import by_main

    if not trained.saved:  # stopped before that, or in the middle of it
        folder, whole = session.folder, _took_every_step(trained.trainer)
        _save(trained.trainer, folder.final if whole else folder.path / "interrupted")
    # The other processes wait: a launcher ends all as soon as one has ended otherwise than well.
    return by_main(lambda: _report(session, trained, command))


def _report(session: Session, trained: Trained, command: str) -> int:
    from recipes.report.advice import advice
    from recipes.report.page import write_report
    from recipes.report.verdict import verdict
    from recipes.tracking.terminal import print_summary
    from recipes.training.memory import write_measured
    from recipes.training.resume import FINISHED

    folder, trainer = session.folder, trained.trainer
    records = folder.metrics.read()
    folder.say_unreadable()
    if records and trainer.state.log_history:
        lines = write_measured(session.planned, folder, trained.tracker.summary())
        print("".join(f"{line}\n" for line in lines), end="")
        write_report(folder)
    if _took_every_step(trainer):  # else what lies there is of a session before, and so is its card
        trainer.write_card(folder.final)
    print_summary(trained.tracker.summary(), folder)
    outcome = verdict(records)
    print(
        outcome.sentence,
        *([] if outcome.kind == "better" else advice(records, session.task.reward_weights)),
        sep="\n",
    )
    if trained.finished:
        folder.write_json(FINISHED, {"step": trainer.state.global_step})
        return 0
    print(f"Stopped at step {trainer.state.global_step}. {_how_to_go_on(folder, command)}")
    return 130


def _report_so_far(folder: RunFolder) -> None:
    """Of a run that failed: where people look for what went before. If it cannot be written, nothing is said of it."""
    from recipes.processes import is_main
    from recipes.report.page import write_report
    from recipes.tracking.summary import logged_steps

    if is_main() and logged_steps(folder.metrics.read()):
        with suppress(OSError, ValueError):
            print(f"report of the steps before: {write_report(folder)}")


def _took_every_step(trainer: Any) -> bool:
    return 0 < trainer.state.max_steps <= trainer.state.global_step


def _how_to_go_on(folder: RunFolder, command: str = "the same command") -> str:
    if folder.checkpoint is None:  # stopped at once, or after the last step, without run.save_every
        return f"There is no checkpoint to go on from; to begin again: {command}"
    return f"To go on: {command} --resume"


def _save(trainer: Any, place: Path) -> None:
    """The model as safetensors with its tokenizer, sealed. Raises CannotWrite."""
    from recipes.processes import by_main
    from recipes.tracking.files import naming_what_failed

    with naming_what_failed(place):
        trainer.save_model(str(place))
        trainer.accelerator.wait_for_everyone()  # each may have written its part
    by_main(partial(_complete, trainer, place))


def _complete(trainer: Any, place: Path) -> None:
    from recipes.models.manifest import seal
    from recipes.tracking.files import naming_what_failed

    with naming_what_failed(place):
        trainer.processing_class.save_pretrained(str(place))
        seal(place)


def _command(options: argparse.Namespace) -> str:
    """The command line that began this run, without --resume."""
    if spread():
        # accelerate's launcher does not say with which configuration it was started.
        return "the same command"
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = ["python"] if here == "1" else ["torchrun", "--nproc-per-node", here]
    return shlex.join([*launcher, "train_grpo.py", "--config", options.config, *options.overrides])


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
