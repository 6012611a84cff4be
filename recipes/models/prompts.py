"""Whether a task's problems fit the run's batch and its chat template, checked before a model is loaded.

check_problems(config, task)      ConfigError: too few for a batch, or prompts that the template cannot render or cuts
trained_on_too(task)              a sentence, where accuracy is measured on problems that are trained on

prompt_lengths(config, task)      tokens of a prompt, for the plan

`--plan` uses only what is on this machine: `check_problems(config, task, network=False)`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from recipes.config.grpo import problems_of_batch
from recipes.config.load import RunConfig
from recipes.data import is_on_the_hub
from recipes.models.foreign import no_foreign_code
from recipes.models.generation import encode, end_tokens, rendered, token_ids
from recipes.models.published import require_blanks, require_known_tokens, require_open_end, unended_turn
from recipes.models.saved import unusable
from recipes.models.tokenizers import character_tokenizer
from recipes.problems import ABSENT, ConfigError, Problem
from recipes.rewards.final_answer import last_words
from recipes.tasks import Task

_LOOKED_AT = 256  # problems, for a mean
_LONGEST = 8  # prompts with the most characters, among which the one with the most tokens is looked for


def check_problems(config: RunConfig, task: Task, *, network: bool = True) -> list[str]:
    """Raises ConfigError for data or prompts that the run would fail on. Reads the data, and the tokenizer's files.

    network: False reads only what is on this machine. Returns a sentence for each thing that was not checked.
    """
    dataset = getattr(task.options, "dataset", None)
    if not network and dataset is not None and is_on_the_hub(dataset):
        return [f"NOT looked at: the problems of {dataset}, which are on the hub"]
    _check_number(config, task)
    return _check_template(config, _forms([*task.train["prompt"], *task.held_out["prompt"]]), network)


def _forms(prompts: list[Any]) -> list[Any]:
    """One prompt of every order of roles: a template may render some of them only. Of texts the first."""
    forms: dict[tuple[str, ...], Any] = {}
    for prompt in prompts:
        forms.setdefault(() if isinstance(prompt, str) else tuple(m["role"] for m in prompt), prompt)
    return list(forms.values())


def trained_on_too(task: Task) -> list[str]:
    """A sentence where held-out problems are also trained on; only splits of one's own can be so. Reads the data."""
    if getattr(task.options, "dataset", None) is None:
        return []
    train = {str(prompt) for prompt in task.train["prompt"]}
    both = sum(str(prompt) in train for prompt in task.held_out["prompt"])
    if not both:
        return []
    return [
        f"{both} of the {len(task.held_out)} held-out problems are among those that are trained on, too: accuracy on "
        "them says little of new ones"
    ]


def widest(prompts: Iterable[Any]) -> list[Any]:
    """Those with the most characters: the one with the most tokens is looked for among them."""
    return heapq.nlargest(_LONGEST, prompts, key=lambda prompt: len(str(prompt)))


class PromptLengths(NamedTuple):
    """Tokens of a prompt: the mean of the first problems, and the longest of all."""

    mean: int
    longest: int


def prompt_lengths(config: RunConfig, task: Task) -> PromptLengths | None:
    """None where their tokenizer is not on this machine."""
    name = config.model.tokenizer or config.model.name
    if name == "bpe":  # trained when the run begins
        return None
    try:
        tokenizer = (
            character_tokenizer(task.characters)
            if name is None
            else tokenizer_here(config, str(name), network=False)
        )
    except Exception:  # the run, which needs it, says what is wrong
        return None
    prompts = task.train["prompt"]
    few, most = (
        [len(ids) for ids in token_ids(tokenizer, some, config.chat_template_kwargs)]
        for some in (prompts[:_LOOKED_AT], widest(prompts))
    )
    return PromptLengths(max(1, round(sum(few) / len(few))), max(1, *few, *most))


def check_longest(config: RunConfig, task: Task, model: Any, tokenizer: Any) -> None:
    """Raises ConfigError if the longest prompt and its completion are more than the positions that the model has."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not known:
        return
    scaled = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    positions = int(known * max(1.0, scaled.get("factor") or 1.0))
    length = config.grpo["max_completion_length"]
    for problems in (task.train, task.held_out):
        longest = widest(problems["prompt"])
        encoded = encode(tokenizer, longest, config.chat_template_kwargs)["attention_mask"].sum(1)
        tokens, prompt = int(encoded.max()), longest[int(encoded.argmax())]
        if tokens + length > positions:
            message = (
                f"a prompt of {tokens:,} tokens and grpo.max_completion_length {length:,} are more than the "
                f"{positions:,} positions of the model"
            )
            remedy = "take it out, or lower grpo.max_completion_length"
            if config.model.loader == "scratch":
                remedy += ", or raise model.scratch.max_positions"
            raise ConfigError([Problem("task", message, last_words(prompt), remedy)])


def check_tokens(config: RunConfig, task: Task, model: Any, tokenizer: Any) -> None:
    """Raises ConfigError for tokens of the run that the model has not, and for prompts that the tokenizer ends."""
    name, key, chat = (
        str(config.model.tokenizer or config.model.name),
        _key(config),
        config.chat_template_kwargs,
    )
    first = task.train[0]["prompt"]
    require_blanks(tokenizer, rendered(tokenizer, [first], chat)[0][0], name, key)
    if isinstance(first, str):
        require_open_end(tokenizer, token_ids(tokenizer, [first], chat)[0], name, key)
    elif said := unended_turn(tokenizer, first, end_tokens(model, tokenizer), chat):
        print(said, flush=True)
    prompts = [*task.train["prompt"], *task.held_out["prompt"]]
    answers = task.warm_start_examples(_LOOKED_AT) if config.run.warm_start is not None else []
    texts = chain(
        (
            ids
            for start in range(0, len(prompts), _LOOKED_AT)
            for ids in token_ids(tokenizer, prompts[start : start + _LOOKED_AT], chat)
        ),
        (tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in answers),
    )
    require_known_tokens(model, tokenizer, texts, name, key)


def _check_number(config: RunConfig, task: Task) -> None:
    """TRL draws whole generation batches of different problems; from fewer it makes no batch, and so no step."""
    found, needed = len(task.train), problems_of_batch(config.grpo, config.model.loader, config.processes)
    held_out = len(task.held_out)  # read in any case, so that what is wrong with it is said now
    if found >= needed:
        return
    options = task.options
    cut = found == getattr(options, "train_size", None)
    key = "task.train_size" if cut else "task.dataset" if hasattr(options, "dataset") else "task"
    place = getattr(options, "dataset", None)
    message = (
        f"{found} problems to train on, beside {held_out} held out, are fewer than the {needed} of a batch"
    )
    remedy = "raise it" if cut else "give it more rows, hold fewer out"
    remedy += ", or set grpo.per_device_train_batch_size lower or grpo.num_generations higher"
    raise ConfigError(
        [Problem(key, message if cut or place is None else f"{place}: {message}", remedy=remedy)]
    )


def _check_template(config: RunConfig, prompts: list[Any], network: bool) -> list[str]:
    """The prompts are rendered as generation will render them."""
    name = config.model.tokenizer or config.model.name
    if isinstance(prompts[0], str) or name in (None, "bpe"):  # whose template is ours
        return []
    try:
        tokenizer = tokenizer_here(config, str(name), network=network)
    except OSError as error:
        if not network:
            return [f"NOT looked at: the chat template of {name}, which is not on this machine"]
        raise ConfigError([_no_tokenizer(config, error)]) from error
    except ConfigError:
        raise
    except Exception as error:  # of files that say nonsense, whatever comes of it
        raise ConfigError([_no_tokenizer(config, error)]) from error
    for prompt in prompts:
        fault = _fault(tokenizer, prompt, config.chat_template_kwargs)
        if fault is not None:
            raise ConfigError([_unrenderable(config, tokenizer, prompt, str(name), fault)])
    try:
        token_ids(tokenizer, prompts[:1], config.chat_template_kwargs)
    except Exception as error:  # the tokenizers library knows no other: of a class that does not fit the file
        raise ConfigError([_no_tokenizer(config, error)]) from error
    return []


def require_template(place: Path, tokenizer: Any, prompt: Any, chat: Any) -> None:
    """Raises ConfigError if the chat template of the checkpoint in `place` cannot render a prompt."""
    fault = None if isinstance(prompt, str) else _fault(tokenizer, prompt, chat)
    if fault is not None:
        remedy = "give it the template that it was trained with, or set task.prompt: plain"
        raise unusable(str(place), f"its chat template cannot render a prompt ({fault})", remedy)


def _fault(tokenizer: Any, prompt: Any, chat: Any) -> str | None:
    """What is wrong with the chat template, seen by one prompt."""
    rendered, fault = _rendered(tokenizer, prompt, chat)
    # Of an assistant's earlier turns a template may leave out what was only thought.
    said = [message for message in prompt if message["role"] != "assistant"]
    if fault is None and (lost := [m["role"] for m in said if m["content"].strip() not in rendered]):
        return f"it leaves out what the {lost[0]} says"
    return fault


def _unrenderable(config: RunConfig, tokenizer: Any, prompt: Any, name: str, fault: str) -> Problem:
    """What to change so that the template renders the prompt: the system message, the form, or the template."""
    options = type(config.task.options).model_fields
    asked = [message for message in prompt if message["role"] != "system"]
    remedies = ["set task.prompt: plain"] if "prompt" in options and len(asked) == 1 else []
    remedies.append("set model.tokenizer to one whose template can")
    if len(asked) == len(prompt) or _rendered(tokenizer, asked, config.chat_template_kwargs)[1] is not None:
        message = f"the chat template of {name} cannot render a prompt ({fault})"
        value = ABSENT if len(asked) == 1 else [message["role"] for message in prompt]
        return Problem("task", message, value, ", or ".join(remedies))
    message = f"the chat template of {name} has no system role ({fault})"
    if getattr(config.task.options, "system_prompt", "") != prompt[0]["content"]:
        return Problem("task", message, remedy=", or ".join(remedies))
    remedies.insert(0, 'set it to ""')
    return Problem("task.system_prompt", message, prompt[0]["content"], ", or ".join(remedies))


def _rendered(tokenizer: Any, prompt: Any, chat: Any) -> tuple[str, str | None]:
    """The prompt as text, and what the template said against it. It runs in transformers' sandbox."""
    try:
        options = {**chat, "tokenize": False, "add_generation_prompt": True}
        return str(tokenizer.apply_chat_template(prompt, **options)), None
    except Exception as error:  # a template may raise anything: jinja's errors, or one of Python's own
        return "", f"{type(error).__name__}: {error}"


def tokenizer_here(config: RunConfig, name: str, *, network: bool) -> Any:
    """The named tokenizer, from this machine alone unless `network`. Raises ConfigError for one with its own code."""
    from transformers import AutoTokenizer

    revision = config.model.revision_of(name)
    with no_foreign_code(_key(config), name):
        return AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=False, local_files_only=not network
        )


def _no_tokenizer(config: RunConfig, error: Exception) -> Problem:
    name = config.model.tokenizer or config.model.name
    reason = str(error).partition("\n")[0]
    return Problem(
        _key(config), f"its tokenizer cannot be loaded ({reason})", name, "name a model with its tokenizer"
    )


def _key(config: RunConfig) -> str:
    """The key that names the tokenizer."""
    return "model.name" if config.model.tokenizer is None else "model.tokenizer"
