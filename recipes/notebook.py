"""A run in its own process, for notebooks: when it ends, all of its memory is free again, the GPU's and vLLM's too.

folder = run_apart(train_grpo.main, "configs/quickstart.yaml", {"grpo.max_steps": 20})
judged(config.make_task())      a problem with its rewards for a right and a wrong answer, before anything is trained
"""

from __future__ import annotations

import codecs
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recipes.config.load import RunConfig, load_config
from recipes.config.source import override
from recipes.rewards.contract import check, choose
from recipes.rewards.final_answer import last_words
from recipes.tasks import Task
from recipes.tracking.run_folder import RunFolder, existing

# What the process does; nothing of the one that starts it is imported there again, a script no more than a notebook.
# When all is said and written, one more Ctrl-C ends nothing sooner.
_CALL = """
import pickle, signal, sys
sys.path[:], call = pickle.load(sys.stdin.buffer)
function, arguments = pickle.loads(call)
sys.argv = [function.__module__]
status = function(*arguments)
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.exit(status)
"""


class RunFailed(RuntimeError):
    """The run failed; its own message has been shown."""


def configure(path: str, settings: Mapping[str, Any]) -> RunConfig:
    """The checked configuration of a file with `settings`, dotted keys and their values, in place of its own."""
    return load_config(path, _overrides(settings))


def run_apart(
    main: Callable[[list[str]], int], path: str, settings: Mapping[str, Any], *, resume: bool = False
) -> RunFolder:
    """Trains by `main`, that of train_grpo, and returns the run's folder; the run's output is shown as it comes.

    resume: go on from the last checkpoint where there is one, as after a session that was lost.
    Raises RunFailed if the run ends with a status other than 0.
    """
    config = configure(path, settings)
    going_on = ["--resume"] if resume and _has_checkpoint(config) else []
    status = apart(main, ["--config", path, *_overrides(settings), *going_on])
    if status:
        raise RunFailed(f"{config.run.name} ended with exit status {status}; its own message is above")
    return RunFolder(existing(Path(config.run.output_root), config.run.name)[-1])


def _has_checkpoint(config: RunConfig) -> bool:
    folders = existing(Path(config.run.output_root), config.run.name)
    return any(RunFolder(folder).checkpoint is not None for folder in folders)


def judged(task: Task) -> tuple[str, list[tuple[str, str, dict[str, float | None]]]]:
    """A problem's prompt; and a right and a wrong answer to it, each with what every reward gives.

    The right one is the task's own example for a warm start, the wrong one the example of another problem, or nothing
    where each of them is right here, too. Raises ConfigError for a task without examples.
    """
    examples = {last_words(prompt): answer for prompt, answer in task.warm_start_examples(64)}
    row = next(row for row in task.train if last_words(row["prompt"]) in examples)
    right = examples[last_words(row["prompt"])]
    wrong = next((answer for answer in examples.values() if not task.is_correct(answer, row)), "")
    functions = choose(task.reward_weights, task.rewards)
    found = []
    for name, answer in (("right", right), ("wrong", wrong)):
        said = answer if isinstance(row["prompt"], str) else [{"role": "assistant", "content": answer}]
        given = check(functions, [row], [said], task.options.reward_seconds)
        found.append((name, answer, {reward: values[0] for reward, values in given.items()}))
    return last_words(row["prompt"]), found


def apart(function: Callable[..., int], *arguments: Any) -> int:
    """`function(*arguments)` in a fresh process whose output is printed here as it comes; its exit status.

    function: importable by name. Ctrl-C is left to that process, which receives it too. Call this from the main
    thread.
    """
    # A notebook sets FORCE_COLOR, which makes rich take the output for a terminal and redraw its bar.
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    environment |= {"COLUMNS": "110", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", _CALL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    before = signal.signal(signal.SIGINT, lambda *_: None)  # a run ends by itself, after the step in hand
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin as call:
            pickle.dump((sys.path, pickle.dumps((function, arguments))), call)
        with process.stdout as said:
            chunks = iter(lambda: os.read(said.fileno(), 1 << 16), b"")
            for text in codecs.iterdecode(chunks, "utf-8", "replace"):
                print(text, end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    return process.wait()


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    """The settings as command-line arguments, each read back to the same value and type."""
    return [override(key, value) for key, value in settings.items()]
