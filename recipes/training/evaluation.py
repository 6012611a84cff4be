"""Accuracy on problems that training never sees: greedy, strict and lenient, with intervals; pass@k and maj@k.

    measure = evaluator(config, task, generate)
    measure()     {"accuracy": 0.43, "accuracy_interval": [0.39, 0.47], …}, a record for metrics.jsonl

    python train_grpo.py --config configs/quickstart.yaml --evaluate runs/quickstart/final

greedy      one completion a problem
pass@k      the chance that one of k sampled completions is right, unbiased over n >= k samples
maj@k       whether the answer given most often among the first k is right
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recipes import processes
from recipes.models.checkpoint import load_checkpoint
from recipes.models.finite import why_unusable
from recipes.models.generation import Generate, Sampling, by_transformers, encode, token_ids
from recipes.models.precision import Precision
from recipes.models.prompts import require_template
from recipes.models.published import require_known_tokens
from recipes.problems import EXIT_STATUS, ConfigError, visible
from recipes.rewards.verdicts import judge_all
from recipes.stops import STOPPED
from recipes.tracking.phases import in_phase
from recipes.tracking.terminal import silence_bars
from recipes.training.callbacks import last_words, sigterm_as_ctrl_c
from recipes.training.finite import says_divergence
from recipes.training.memory import explained
from recipes.training.session import RunError

if TYPE_CHECKING:
    from recipes.config.load import RunConfig
    from recipes.tasks import Row, Task

Z_95 = 1.959963984540054  # a normal variable lies within this many deviations with probability 0.95


def evaluator(config: RunConfig, task: Task, generate: Generate) -> Callable[..., dict[str, Any]]:
    """A function that measures the held-out problems: the figures are a record for metrics.jsonl.

    Of several processes each completes a share, and the main one judges; all call it, and all get the figures.
    They are the greedy accuracy and, with `run.evaluation.samples`, pass@k and maj@k, which `sampled=False` leaves out.
    The random state is left as it was, and every call draws from the same seed.
    """
    settings = config.run.evaluation
    rows: list[Row] = list(task.held_out)[: settings.size]
    length = config.completion_length

    @in_phase("evaluation")
    def measure(*, sampled: bool = True) -> dict[str, Any]:
        started = time.perf_counter()
        share = processes.mine(rows)
        greedy = processes.whole(complete(generate, share, Sampling(length), settings.batch_size), len(rows))
        found = processes.by_main(lambda: greedy_figures(task, [texts[0] for texts in greedy], rows))
        if sampled and settings.samples:
            drawn = Sampling(length, settings.samples, config.grpo["temperature"])
            batch_size = max(1, settings.batch_size // settings.samples)
            with torch.random.fork_rng():
                torch.manual_seed(config.run.seed + processes.rank())
                with says_divergence():
                    mine = complete(generate, share, drawn, batch_size)
            samples = processes.whole(mine, len(rows))
            found |= processes.by_main(lambda: sampled_figures(task, samples, rows))
        seconds = time.perf_counter() - started
        return {**found, "accuracy_problems": len(rows), "evaluation_seconds": seconds}

    return measure


def complete(
    generate: Generate, rows: Sequence[Row], sampling: Sampling, batch_size: int = 256
) -> list[list[str]]:
    """`sampling.samples` completions for the "prompt" of each row, `batch_size` rows at a time.

    Raises ValueError if there are no rows.
    """
    if not rows:
        raise ValueError("rows: none given; evaluation needs at least one problem")
    completions: list[list[str]] = []
    for start in range(0, len(rows), batch_size):
        completions += generate([row["prompt"] for row in rows[start : start + batch_size]], sampling)
    return completions


def greedy_figures(task: Task, completions: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    """`accuracy` and its 95 % interval, `completions[i]` answering `rows[i]`; both lenient if the task has that.

    Each completion is judged once by each of the task's verdicts, in the time that training allows.
    """
    found = _shares("accuracy", task.verdicts(completions, rows))
    lenient = judge_all(task.is_correct_lenient, completions, rows, task.options)
    second = [verdict for verdict in lenient if verdict is not None]
    return found | (_shares("accuracy_lenient", second) if second else {})


def _shares(name: str, verdicts: list[bool]) -> dict[str, Any]:
    """The share of right ones with its interval."""
    right, total = sum(verdicts), len(verdicts)
    return {name: right / total, f"{name}_interval": list(wilson(right, total))}


def sampled_figures(task: Task, samples: Sequence[Sequence[str]], rows: Sequence[Row]) -> dict[str, float]:
    """pass@k and maj@k of `samples[i]`, k completions for `rows[i]`, each judged once."""
    k = len(samples[0])
    texts = [text for drawn in samples for text in drawn]
    judged = task.verdicts(texts, [row for row in rows for _ in range(k)])
    verdicts = [judged[start : start + k] for start in range(0, len(judged), k)]
    places = [majority([task.answer_of(text) for text in texts]) for texts in samples]
    votes = [place is not None and right[place] for place, right in zip(places, verdicts, strict=True)]
    return {
        "pass@1": sum(pass_at_k(sum(right), k, 1) for right in verdicts) / len(rows),
        f"pass@{k}": sum(pass_at_k(sum(right), k, k) for right in verdicts) / len(rows),
        f"maj@{k}": sum(votes) / len(rows),
    }


def wilson(right: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's interval for a share: holds near 0 and 1 and for few problems. Raises ValueError for none.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"right, total: {right} of {total}; give 0 <= right <= total and at least one")
    share, unit = right / total, z * z / total
    middle = (share + unit / 2) / (1 + unit)
    half = z / (1 + unit) * math.sqrt(share * (1 - share) / total + unit / (4 * total))
    # At the ends the interval touches 0 or 1 exactly; rounding would leave a hair.
    return 0.0 if right == 0 else middle - half, 1.0 if right == total else middle + half


def pass_at_k(right: int, samples: int, k: int) -> float:
    """1 - C(samples - right, k) / C(samples, k). Raises ValueError unless 1 <= k <= samples.

    M. Chen et al., Evaluating large language models trained on code, 2021.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k: {k} of {samples} samples; give 1 <= k <= samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[Hashable | None]) -> int | None:
    """The place of the first of the answers given most often, None if none was given. Ties go to the earlier one."""
    given = [answer for answer in answers if answer is not None]
    return answers.index(max(given, key=given.count)) if given else None


def evaluate_checkpoint(config: RunConfig, place: Path) -> dict[str, Any]:
    """Figures of a checkpoint on the config's held-out problems, as `evaluator` gives them."""
    task = config.make_task()
    # As it was trained; and processes know of each other from here.
    precision = Precision.of(config.grpo_config(place))
    # What is wrong with the data, or with a judge of the user's own, is said before a model is loaded.
    first = task.held_out[0]
    processes.by_main(lambda: task.verdicts([""], [first]))
    model, tokenizer = load_checkpoint(place, config.model)
    require_template(place, tokenizer, first["prompt"], config.chat_template_kwargs)
    prompts = token_ids(
        tokenizer, task.held_out[: config.run.evaluation.size]["prompt"], config.chat_template_kwargs
    )
    require_known_tokens(model, tokenizer, prompts, str(place))
    generate = by_transformers(model, tokenizer, config.chat_template_kwargs, precision)
    batch = encode(tokenizer, task.held_out[:4]["prompt"], config.chat_template_kwargs)
    with in_phase("evaluation"), precision.autocast(model.device):
        reason = why_unusable(model, batch)
    if reason is not None:
        raise RunError(f"{place} cannot be evaluated: {reason}; it was damaged, or its training diverged")
    measure = evaluator(config, task, generate)
    return {"checkpoint": str(place), **measure()}


def show(config: RunConfig, place: str) -> int:
    """The command line's `--evaluate`: prints the figures as JSON. Returns the exit status.

    It ends by SIGTERM as by Ctrl-C, with a sentence, and with its launcher.
    """
    silence_bars()
    processes.end_with_launcher()
    try:
        with last_words():
            status = _show(config, Path(place))
    except processes.MainFailed:
        processes.let_the_first_speak()
        return 1
    if status == 0:  # else the others may be anywhere
        processes.end()
    return status


def _show(config: RunConfig, place: Path) -> int:
    try:
        with explained(config), sigterm_as_ctrl_c():
            found = evaluate_checkpoint(config, place)
        if processes.is_main():
            print(json.dumps(found, indent=2))
    except KeyboardInterrupt:
        processes.complain(f"\nStopped{processes.or_lost()}; the same command begins again.")
        return STOPPED
    except ConfigError as error:
        processes.complain(error)
        return EXIT_STATUS
    except processes.MainFailed:
        raise
    except (ImportError, OSError, RunError, ValueError) as error:
        processes.complain(f"error: {visible(str(error))}")
        return 1
    except Exception as error:
        processes.blame(error, "run the same command again")
        return 1
    return 0
