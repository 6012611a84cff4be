"""GSM8K: grade-school word problems whose answer is one number.

    prompt      the format asked for, and the question: as chat messages, or as plain text
    completion  <reasoning> … </reasoning> <answer> 18 </answer>, a tag a line
    right       the one number in the answer tag equals the number after `####` in the data

The rewards return shares of 1; their weights stand in the YAML under `task.rewards`. The defaults are those of
Unsloth's Llama3.1_(8B)-GRPO notebook, but reasoning of several lines counts as well-formed here.
"""

from __future__ import annotations

import random
import re
from fractions import Fraction
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from recipes.data import Rows, hold_out, is_one_file, read_rows
from recipes.rewards.contract import RewardOptions
from recipes.rewards.final_answer import lenient_answer, numbers, strict_answer, text_of

SYSTEM_PROMPT = """\
Write your reply in exactly this form:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""
WEIGHTS = {
    "tag_count": 0.5,  # 4 × 0.125, less 0.001 for each character after the last tag
    "soft_format": 0.5,
    "strict_format": 0.5,
    "integer": 0.5,
    "correctness": 2.0,
}


class Options(RewardOptions):
    """The keys beside `task.name` in the YAML."""

    dataset: str = Field(
        "openai/gsm8k",
        min_length=1,
        description="hub id; or a folder with train.jsonl and test.jsonl, or one .jsonl file",
    )
    prompt: Literal["chat", "plain"] = Field("chat", description="chat messages, or plain text")
    system_prompt: str = Field(SYSTEM_PROMPT, description="what is said before the question")
    train_size: int | None = Field(None, ge=1, description="training problems at most; null: all")
    held_out: int = Field(
        512, ge=1, description="problems kept for evaluation where the dataset is one file, with no test set"
    )


def train_dataset(options: Options, seed: int) -> Dataset:
    """The train problems, shuffled by the seed."""
    rows = _read(options, seed, "train")
    random.Random(f"gsm8k train {seed}").shuffle(rows)
    return _dataset(rows[: options.train_size], options)


def eval_dataset(options: Options, seed: int) -> Dataset:
    """The test problems in their own order, so that the first n are the same in every run."""
    return _dataset(_read(options, seed, "test"), options)


def warm_start_examples(options: Options, seed: int, count: int) -> list[tuple[Any, str]]:
    """`count` pairs of prompt and right completion, the data's own solution as the reasoning; passes in drawn order."""
    rows = _read(options, seed, "train")[: options.train_size]
    rng = random.Random(f"gsm8k warm start {seed}")
    order: list[dict[str, str]] = []
    while len(order) < count:
        order += rng.sample(rows, len(rows))
    return [(_prompt(row["question"], options), solution_text(row["answer"])) for row in order[:count]]


def corpus(options: Options, seed: int) -> list[str]:
    """What a tokenizer is trained on: the system prompt, and the train questions with their solutions as wanted."""
    rows = _read(options, seed, "train")[: options.train_size]
    texts = [text for row in rows for text in (row["question"], solution_text(row["answer"]))]
    return [options.system_prompt, *texts]


def solution_text(answer: str) -> str:
    """A solution of the data in the form that is asked for, without its `<<…>>` calculator notes."""
    reasoning, _, number = answer.partition("####")
    reasoning = re.sub(r"<<.*?>>", "", reasoning).strip()
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{number.strip()}\n</answer>\n"


def _read(options: Options, seed: int, split: str) -> Rows:
    """The rows of "train" or "test". Raises FileNotFoundError or ValueError, with what to do about it."""
    rows = read_rows(options.dataset, split, "main")
    for column in ("question", "answer"):
        if rows and column not in rows[0]:
            raise ValueError(
                f"task.dataset: {options.dataset} has columns {sorted(rows[0])} and lacks {column!r}; rename one"
            )
    if is_one_file(options.dataset):
        train, held_out = hold_out(rows, options.held_out, f"gsm8k split {seed}")
        return train if split == "train" else held_out
    return rows


def _dataset(rows: list[dict[str, str]], options: Options) -> Dataset:
    """Prompts with the column `answer`: the number after `####`, as the data writes it."""
    return Dataset.from_dict(
        {
            "prompt": [_prompt(row["question"], options) for row in rows],
            "answer": [row["answer"].rpartition("####")[2].strip() for row in rows],
        }
    )


def _prompt(question: str, options: Options) -> Any:
    if options.prompt == "plain":
        return f"{options.system_prompt}\n{question.strip()}\n"
    said = [{"role": "system", "content": options.system_prompt}] if options.system_prompt else []
    return [*said, {"role": "user", "content": question}]


def _gold(answer: str) -> Fraction:
    """The data's answer as a number. Raises ValueError if it is none."""
    found = numbers(answer)
    if len(found) != 1:
        raise ValueError(f"answer: {answer!r} is not one number; correct the data")
    return found[0]


def is_correct(completion: str, row: dict[str, Any]) -> bool:
    """Whether the answer tag holds the right number, and only that."""
    return strict_answer(completion) == _gold(row["answer"])


def is_correct_lenient(completion: str, row: dict[str, Any]) -> bool:
    """Whether the number that a reader would take for the answer is right, whatever the form."""
    return lenient_answer(completion) == _gold(row["answer"])


def answer_of(completion: str) -> Fraction | None:
    """The answer that maj@k counts votes for."""
    return strict_answer(completion)


def correctness(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 for the right number in the answer tag."""
    pairs = zip(completions, answer, strict=True)
    return [float(is_correct(text_of(completion), {"answer": gold})) for completion, gold in pairs]


def integer(completions: list[Any], **_: Any) -> list[float]:
    """1 for a whole number in the answer tag."""
    found = (strict_answer(text_of(completion)) for completion in completions)
    return [float(number is not None and number.denominator == 1) for number in found]


_INSIDE = r"(?:(?!</?(?:reasoning|answer)>).)*"  # no tag again inside a part
_STRICT = re.compile(rf"<reasoning>\n{_INSIDE}\n</reasoning>\n<answer>\n{_INSIDE}\n</answer>\n?", re.DOTALL)
_SOFT = re.compile(rf"\s*<reasoning>{_INSIDE}</reasoning>\s*<answer>{_INSIDE}</answer>", re.DOTALL)


def strict_format(completions: list[Any], **_: Any) -> list[float]:
    """1 if the completion is the form asked for to the letter: each tag on a line of its own, nothing after."""
    return [float(_STRICT.fullmatch(text_of(completion)) is not None) for completion in completions]


def soft_format(completions: list[Any], **_: Any) -> list[float]:
    """1 if it begins with both parts, each with its tags, whatever the line breaks and whatever follows."""
    return [float(_SOFT.match(text_of(completion)) is not None) for completion in completions]


def tag_count(completions: list[Any], **_: Any) -> list[float]:
    """A quarter for each tag that stands there once, on its line; less 0.002 per character after the last."""
    return [_tags(text_of(completion)) for completion in completions]


def _tags(text: str) -> float:
    lines = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    _, closed, after = text.rpartition("</answer>")
    trailing = len(after.removeprefix("\n")) if closed else 0
    return 0.25 * sum(text.count(line) == 1 for line in lines) - 0.002 * trailing


rewards = {
    "tag_count": tag_count,
    "soft_format": soft_format,
    "strict_format": strict_format,
    "integer": integer,
    "correctness": correctness,
}
