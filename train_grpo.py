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
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["HF_HUB_DISABLE_TELEMETRY"] = (
    "1"  # before TRL and transformers are imported: they phone home otherwise
)

from recipes.config.load import RunConfig, load_config
from recipes.problems import EXIT_STATUS, ConfigError, visible


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


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
    """The run, top to bottom. Returns the exit status."""
    from recipes.training import preflight  # the heavy imports wait until the configuration is right

    try:
        preflight.check(config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_STATUS

    from recipes.models import load as models
    from recipes.models.generation import by_trainer, by_transformers
    from recipes.models.precision import Precision
    from recipes.report.page import write_report
    from recipes.tracking.tracker import RunFolder, print_summary, track
    from recipes.training.callbacks import AccuracyEvery, BypassGuard, HeadBypassed, Interruption, SaySigns
    from recipes.training.evaluation import evaluator
    from recipes.training.resume import (
        FINISHED,
        is_finished,
        is_trained,
        model_to_load,
        require_same,
        restore,
    )
    from recipes.training.rewards import prepare
    from recipes.training.trainer import install_head, make_trainer

    try:
        task = config.make_task()
        begun = RunFolder.to_resume(config.run.output_root, config.run.name) if resume else None
        if begun is not None:
            require_same(config, begun)
            if is_finished(config, begun):
                print(f"{begun.path} is finished; a larger grpo.max_steps would go on.")
                return 0
            print(f"Resuming from {begun.checkpoint}", flush=True)
        rewards = prepare(task)  # before a folder is written to: a reward may break the contract
        if begun is not None:
            folder = begun
            folder.begin_session(config)
        else:
            folder = RunFolder.create(config.run.output_root, config.run.name, config)
        checkpoint = folder.checkpoint
        arguments = config.grpo_config(folder.path / "checkpoints")
        start = model_to_load(config, folder)
        model, tokenizer = models.load(start, task, config.run.seed, lora=config.lora)
        if config.run.warm_start is not None and checkpoint is None:
            probe = evaluator(config, task, by_transformers(model, tokenizer, config.chat_template_kwargs))
            precision = Precision.of(arguments)
            _warm_start(config, config.run.warm_start, task, model, tokenizer, precision, probe, folder)
        _check_head(config, task, model, tokenizer, folder)

        with install_head(config, arguments) as handle, Interruption() as interruption:
            trainer = make_trainer(config, arguments, rewards, task, model, tokenizer)
            trainer.add_callback(BypassGuard(handle))
            trainer.add_callback(interruption)
            trainer.add_callback(SaySigns())
            tracker = track(trainer, folder, config.tracking)
            evaluate = evaluator(config, task, by_trainer(trainer))
            if config.run.evaluation.every is not None:
                trainer.add_callback(AccuracyEvery(config.run.evaluation.every, evaluate, tracker.evaluated))
            finished = False
            try:
                if checkpoint is None:
                    tracker.evaluated(0, evaluate())
                    trainer.train()
                elif is_trained(config, folder):
                    restore(trainer, checkpoint)
                    tracker.drop_after(trainer.state.global_step)
                else:
                    trainer.train(resume_from_checkpoint=str(checkpoint))
                if _took_every_step(trainer):
                    _save(trainer, tokenizer, folder.final)  # first: the evaluation may be cut off
                    if not interruption.asked:
                        tracker.evaluated(trainer.state.global_step, evaluate())
                        finished = True
            except KeyboardInterrupt:
                pass  # a second Ctrl-C
            finally:
                tracker.close()
                earlier = folder.read_json("head.json") or {"calls": 0, "rows": 0}  # of the sessions before
                calls, rows = earlier["calls"] + handle.calls, earlier["rows"] + handle.rows
                folder.write_json("head.json", {"impl": config.head.impl, "calls": calls, "rows": rows})
    except KeyboardInterrupt:
        print("\nStopped before training began; run the same command again.", file=sys.stderr)
        return 130
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_STATUS
    except (RunError, HeadBypassed, OSError, ValueError) as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return 1

    if not _took_every_step(trainer):
        _save(trainer, tokenizer, folder.path / "interrupted")
    if trainer.state.log_history:
        write_report(folder)
    print_summary(tracker.summary(), folder)
    if finished:
        folder.write_json(FINISHED, {"step": trainer.state.global_step})
        return 0
    print(f"Stopped at step {trainer.state.global_step}. {_how_to_go_on(folder, command)}")
    return 130


def _warm_start(
    config: RunConfig,
    settings: Any,
    task: Any,
    model: Any,
    tokenizer: Any,
    precision: Any,
    evaluate: Any,
    folder: Any,
) -> None:
    """Supervised training until the model knows the task well enough for GRPO to find something to reward."""
    from recipes.training.resume import WARM_START
    from recipes.training.trainer import head_of_warm_start
    from recipes.training.warm_start import WarmStartStep, warm_start

    examples = task.warm_start_examples(settings.steps * settings.batch_size)
    started = time.perf_counter()

    def report(taken: WarmStartStep) -> None:
        folder.metrics.append({"warm_start": asdict(taken)})
        if taken.step % settings.check_every == 0:
            seconds = time.perf_counter() - started
            print(
                f"warm start  step {taken.step}  loss {taken.loss:.3f}  accuracy {taken.accuracy:.3f}  "
                f"{seconds:.0f} s",
                flush=True,
            )

    with head_of_warm_start(config, model):
        result = warm_start(
            model,
            tokenizer,
            examples,
            settings,
            precision=precision,
            probe=lambda: evaluate(sampled=False)["accuracy"],
            on_step=report,
            chat=config.chat_template_kwargs,
        )
    folder.write_json("warm_start.json", asdict(result) | {"seconds": time.perf_counter() - started})
    place = folder.path / WARM_START  # where adapters begin, and the comparison with more supervision
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    model.name_or_path = model.config._name_or_path = str(
        place.resolve()
    )  # an adapter remembers its base by it


def _check_head(config: RunConfig, task: Any, model: Any, tokenizer: Any, folder: Any) -> None:
    """The head against full logits in float64 on real rows, kept as head_check.json."""
    from recipes.training.head_check import check_head

    prompts = task.held_out[:4]["prompt"]  # or as many as there are
    found = check_head(
        model,
        tokenizer,
        prompts,
        temperature=config.grpo["temperature"],
        chunk=config.head.chunk,
        backend=config.head.backend,
        chat=config.chat_template_kwargs,
    )
    path = folder.write_json("head_check.json", found)
    if not found["passed"]:
        raise RunError(f"memhead disagrees with full logits in float64 on this model; {path} has the figures")


def _took_every_step(trainer: Any) -> bool:
    return 0 < trainer.state.max_steps <= trainer.state.global_step


def _how_to_go_on(folder: Any, command: str) -> str:
    if folder.checkpoint is None:  # stopped at once, or after the last step, without run.save_every
        return f"There is no checkpoint to go on from; to begin again: {command}"
    return f"To go on: {command} --resume"


def _save(trainer: Any, tokenizer: Any, place: Path) -> None:
    """The model as safetensors with its tokenizer."""
    trainer.save_model(str(place))
    tokenizer.save_pretrained(str(place))


def _command(options: argparse.Namespace) -> str:
    """The command line that began this run, without --resume."""
    return shlex.join(["python", "train_grpo.py", "--config", options.config, *options.overrides])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
