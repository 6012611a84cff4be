"""Ask the model of a run, greedily, in the form of its task's prompts.

python -m recipes.ask runs/quickstart "357>26="        one question
python -m recipes.ask runs/quickstart                  a prompt, until an empty line or Ctrl-D
python -m recipes.ask runs/quickstart --base           also what the model answered before GRPO

for name, text in ask(config, RunFolder("runs/quickstart")).items(): ...      both answers, for a notebook
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.config.load import RunConfig, load_config
from recipes.models.checkpoint import WARM_START, load_checkpoint
from recipes.models.generation import Sampling, by_transformers, token_ids
from recipes.models.precision import Precision
from recipes.models.prompts import require_template
from recipes.models.saved import unusable
from recipes.output import lasting_output
from recipes.problems import EXIT_STATUS, ConfigError, visible
from recipes.rewards.final_answer import last_words
from recipes.stops import leave, stopped_in_a_line
from recipes.tasks import Task
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.terminal import silence_bars

BEFORE, AFTER = "before training", "after training"


@dataclass(frozen=True)
class Answerer:
    """A model with which to answer. `within`: what to enter while it does, such as its adapter switched off."""

    model: Any
    tokenizer: Any
    config: RunConfig
    precision: Precision
    within: Any = nullcontext

    def answer(self, prompt: Any, *, stream: bool = False) -> str:
        """The greedy answer, without blanks around it; with `stream` printed as it comes."""
        streamer = _to_terminal(self.tokenizer) if stream else None
        chat = self.config.chat_template_kwargs
        generate = by_transformers(self.model, self.tokenizer, chat, self.precision, streamer)
        with self._entered():
            return generate([prompt], Sampling(self.config.completion_length))[0][0].strip()

    def _entered(self) -> AbstractContextManager[Any]:
        return self.within()

    def knows(self, prompt: Any) -> bool:
        """Whether the tokenizer has a token for everything in the prompt."""
        unknown = self.tokenizer.unk_token_id
        ids = token_ids(self.tokenizer, [prompt], self.config.chat_template_kwargs)[0]
        return unknown is None or unknown not in ids


def _to_terminal(tokenizer: Any) -> Any:
    """Prints tokens as they come, and no character that could control a terminal."""
    from transformers import TextStreamer

    class Visible(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(visible(text), stream_end)

    return Visible(tokenizer, skip_prompt=True, skip_special_tokens=True)


def ask(config: RunConfig, run: RunFolder, question: str = "") -> dict[str, str]:
    """The question as the model sees it, and its answers, under "question", "before training", "after training".

    question: replaces that of a held-out problem; "" asks the first held-out problem itself, and then each answer's
    name says whether it is right. Raises ConfigError if the run has no final model.
    """
    task = config.make_task()
    row = task.held_out[0]
    prompt = task.prompt_of(question, row["prompt"]) if question else row["prompt"]
    answers = {name: answerer.answer(prompt) for name, answerer in answerers(config, run, task, base=True)}
    gc.collect()
    torch.cuda.empty_cache()  # the next run needs the whole device

    def name(moment: str, answer: str) -> str:
        verdict = "" if question else ": right" if task.is_correct(answer, row) else ": wrong"
        return moment + verdict

    said = {name(moment, answers[moment]): answers[moment] for moment in (BEFORE, AFTER)}
    return {"question": last_words(prompt), **said}


def answerers(config: RunConfig, run: RunFolder, task: Task, *, base: bool) -> Iterator[tuple[str, Answerer]]:
    """The trained model and, with `base`, the one that GRPO started from, each with its name.

    Of a whole model the second is loaded only when it is asked for. Raises ConfigError without a final model.
    """
    model, tokenizer = load_checkpoint(run.final, config.model)
    require_template(run.final, tokenizer, task.held_out[0]["prompt"], config.chat_template_kwargs)
    precision = Precision.of(config.grpo_config(run.path))
    yield AFTER, Answerer(model, tokenizer, config, precision)
    if base and hasattr(model, "disable_adapter"):
        yield BEFORE, Answerer(model, tokenizer, config, precision, model.disable_adapter)
    elif base:
        yield BEFORE, Answerer(*_untrained(config, run, task), config, precision)


def _untrained(config: RunConfig, run: RunFolder, task: Task) -> tuple[Any, Any]:
    """The model that GRPO started from, where every weight was trained."""
    from recipes.models import load as models

    warm_start = run.path / WARM_START
    if warm_start.is_dir():
        return load_checkpoint(warm_start, config.model)
    return models.load(config.model, task, config.run.seed, lora=config.lora)


def talk(models: list[tuple[str, Answerer]], task: Task, questions: Iterable[str]) -> None:
    """Prints each question's answers as they come."""
    _, trained = models[0]
    example = task.held_out[0]["prompt"]
    for question in questions:
        prompt = task.prompt_of(question, example)
        if not trained.knows(prompt):
            print(
                f"(the model has no token for some of that; it was trained on: {visible(last_words(example))})"
            )
        for name, answerer in models:
            if len(models) > 1:
                print(f"── {name}")
            if not answerer.answer(prompt, stream=True):
                print("(an empty answer)")


def _typed() -> Iterator[str]:
    """Questions from the keyboard, until an empty line, Ctrl-D or Ctrl-C."""
    try:
        while question := input("> ").strip():
            yield question
    except (EOFError, KeyboardInterrupt):
        print()


@lasting_output()
@stopped_in_a_line
def main(arguments: list[str]) -> int:
    """Run from the command line. Exit status: 0 done, 1 not possible, 2 a mistake in the command or configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.ask",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("question", nargs="?", help="left out: asks for questions until an empty line")
    parser.add_argument("--base", action="store_true", help="the answer before GRPO beside that after it")
    options = parser.parse_args(arguments)
    if options.question is not None and not options.question.strip():
        parser.error("question: is empty; write one, or leave it out to be asked for it")
    try:
        if not (options.run / "config.yaml").is_file():
            raise unusable(str(options.run), "holds no config.yaml", "give the folder of a run")
        config = load_config(options.run / "config.yaml")
        silence_bars()
        task = config.make_task()
        models = list(answerers(config, RunFolder(options.run), task, base=options.base))
        if options.question is None:
            print(
                f"A question as in training: {visible(last_words(task.held_out[0]['prompt']))}",
                "An empty line ends it.",
                sep="\n",
            )
        talk(models, task, _typed() if options.question is None else [options.question])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_STATUS
    except (OSError, ValueError) as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
