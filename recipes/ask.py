"""One question to the model before and after a run, answered greedily.

for name, text in ask(config, RunFolder("runs/quickstart")).items():
    print(name, text, sep="\\n")
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from recipes.config.load import RunConfig
from recipes.models.checkpoint import load_checkpoint
from recipes.models.generation import Sampling, by_transformers
from recipes.models.precision import Precision
from recipes.tasks import Task
from recipes.tracking.run_folder import RunFolder


def ask(config: RunConfig, run: RunFolder, question: str = "") -> dict[str, str]:
    """The question as the model sees it, and its answers, under "question", "before training", "after training".

    question: replaces that of a held-out problem; "" asks the first held-out problem itself, and then each answer's
    name says whether it is right. Raises FileNotFoundError if the run has no final model.
    """
    task = config.make_task()
    row = task.held_out[0]
    prompt = _instead(row["prompt"], question) if question else row["prompt"]
    before, after = _answers(config, run, task, prompt)
    gc.collect()
    torch.cuda.empty_cache()  # the next run needs the whole device

    def name(moment: str, answer: str) -> str:
        verdict = "" if question else ": right" if task.is_correct(answer, row) else ": wrong"
        return f"{moment} training{verdict}"

    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return {"question": asked, name("before", before): before, name("after", after): after}


def _answers(config: RunConfig, run: RunFolder, task: Task, prompt: Any) -> tuple[str, str]:
    """The model's answers without the training and with it."""
    length = config.completion_length
    precision = Precision.of(config.grpo_config(run.path))

    def answer(model: Any, tokenizer: Any) -> str:
        generate = by_transformers(model, tokenizer, config.chat_template_kwargs, precision)
        return generate([prompt], Sampling(length))[0][0].strip()

    model, tokenizer = load_checkpoint(run.final, config.model)
    after = answer(model, tokenizer)
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            return answer(model, tokenizer), after
    return answer(*_untrained(config, run, task)), after


def _untrained(config: RunConfig, run: RunFolder, task: Task) -> tuple[Any, Any]:
    """The model that GRPO started from, where every weight was trained."""
    from recipes.models import load as models

    warm_start = run.path / "warm_start"
    if warm_start.is_dir():
        return load_checkpoint(warm_start, config.model)
    return models.load(config.model, task, config.run.seed, lora=config.lora)


def _instead(prompt: Any, question: str) -> Any:
    """The prompt with another question: the last message of a chat, or the whole of a plain prompt."""
    return question if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": question}]
