r"""Mathematics with a LaTeX answer: any dataset that has a column of problems and a column of answers.

    prompt      the problem, and the wish for a final `\boxed{…}`
    right       math-verify finds the boxed answer equal to the known one: 1/2, 0.5 and \frac{1}{2} are one

Each comparison has a time limit and its own process (recipes/rewards/math_verifier.py); one that runs out is no answer.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from recipes.data import Rows, hold_out, is_one_file, read_rows
from recipes.rewards.contract import RewardOptions
from recipes.rewards.final_answer import boxed, text_of
from recipes.rewards.math_verifier import Verifier

SYSTEM_PROMPT = r"Reason step by step and put the final answer, and nothing else, into \boxed{}."
WEIGHTS = {"correctness": 1.0, "boxed_once": 0.1}
VERIFY_SECONDS = 3.0  # for one comparison; ordinary ones take milliseconds


class Options(RewardOptions):
    """The keys beside `task.name` in the YAML."""

    reward_seconds: float = Field(300.0, gt=0, description="time limit of one call of a reward function")
    dataset: str = Field(
        min_length=1, description="hub id; a folder with train.jsonl and test.jsonl; or one .jsonl file"
    )
    config: str | None = Field(None, description="the dataset's configuration on the hub; null: its only one")
    train_split: str = Field("train", description="split to train on; of a folder, the file's name")
    eval_split: str | None = Field(
        "test", description="split to evaluate on; null: held out of the train split"
    )
    problem_column: str = Field("problem", description="column with the problem")
    answer_column: str = Field(
        "answer", description=r"column with the final answer in LaTeX, or a text with it boxed"
    )
    prompt: Literal["chat", "plain"] = Field("chat", description="chat messages, or plain text")
    system_prompt: str = Field(SYSTEM_PROMPT, description="what is said before the problem")
    train_size: int | None = Field(None, ge=1, description="training problems at most; null: all")
    held_out: int = Field(
        500, ge=1, description="problems kept for evaluation where there is no evaluation split"
    )


def train_dataset(options: Options, seed: int) -> Dataset:
    """The train problems, shuffled by the seed."""
    rows = _split(options, seed)[0]
    random.Random(f"math train {seed}").shuffle(rows)
    return _dataset(rows[: options.train_size], options)


def eval_dataset(options: Options, seed: int) -> Dataset:
    """The evaluation split in its own order; without one, what is held out of the train split."""
    return _dataset(_split(options, seed)[1], options)


def _split(options: Options, seed: int) -> tuple[Rows, Rows]:
    train = _read(options, options.train_split)
    if options.eval_split is None or is_one_file(options.dataset):
        return hold_out(train, options.held_out, f"math split {seed}")
    return train, _read(options, options.eval_split)


def _read(options: Options, split: str) -> Rows:
    """The rows of a split. Raises FileNotFoundError or ValueError, with what to do about it."""
    rows = read_rows(options.dataset, split, options.config)
    for key in ("problem_column", "answer_column"):
        column = getattr(options, key)
        if rows and column not in rows[0]:
            raise ValueError(f"task.{key}: no column {column!r}; the data has {', '.join(sorted(rows[0]))}")
    return rows


def _dataset(rows: list[dict[str, Any]], options: Options) -> Dataset:
    answers = [str(row[options.answer_column]) for row in rows]
    return Dataset.from_dict(
        {
            "prompt": [_prompt(row[options.problem_column], options) for row in rows],
            "answer": [boxed(answer) or answer for answer in answers],
        }
    )


def _prompt(problem: str, options: Options) -> Any:
    if options.prompt == "plain":
        return f"{options.system_prompt}\n\n{problem.strip()}\n"
    said = [{"role": "system", "content": options.system_prompt}] if options.system_prompt else []
    return [*said, {"role": "user", "content": problem}]


@lru_cache(maxsize=1)
def _verifier() -> Verifier:
    return Verifier(VERIFY_SECONDS)


def is_correct(completion: str, row: dict[str, Any]) -> bool:
    r"""Whether the last `\boxed{…}` equals the answer. No verdict in time counts as wrong."""
    found = boxed(completion)
    return found is not None and _verifier().same(row["answer"], rf"\boxed{{{found}}}") is True


def is_correct_lenient(completion: str, row: dict[str, Any]) -> bool:
    """Whether whatever math-verify takes for the final answer equals the answer, boxed or not."""
    return _verifier().same(row["answer"], completion) is True


def correctness(completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
    """1 for a boxed answer equal to the known one; None where the comparison ran out of time."""
    verdicts = []
    for completion, gold in zip(completions, answer, strict=True):
        found = boxed(text_of(completion))
        same = _verifier().same(gold, rf"\boxed{{{found}}}") if found is not None else False
        verdicts.append(None if same is None else float(same))
    return verdicts


def boxed_once(completions: list[Any], **_: Any) -> list[float]:
    r"""1 for exactly one `\boxed{…}`."""
    texts = [text_of(completion) for completion in completions]
    return [float(text.count(r"\boxed{") == 1 and boxed(text) is not None) for text in texts]


rewards = {"correctness": correctness, "boxed_once": boxed_once}
