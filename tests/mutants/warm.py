"""Tests in a process that has imported torch, transformers and TRL already: a fork for each run, not ten seconds.

    python warm.py serve SOCKET                 run in the copy of the tree whose tests are asked for
    python warm.py ask SOCKET SECONDS TEST …    exits as pytest does; 124 where the time ran out

Nothing of memhead, recipes or tests is imported here, so that each fork reads them as they lie on the disk then.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Client, Listener

SLOW_TO_IMPORT = (
    "torch._dynamo", "torch.utils._python_dispatch", "torch.distributed.tensor", "transformers.models.llama",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "transformers.trainer",
    "trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer", "trl.trainer.kto_trainer", "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer", "peft", "datasets", "accelerate", "pydantic", "rich.console", "psutil", "hypothesis",
    "jinja2", "matplotlib.figure", "pytest",
)  # fmt: skip
OUT_OF_TIME = 124


def serve(socket: str) -> None:
    """Answer one question at a time, (seconds, tests), with (exit status, last output)."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.dont_write_bytecode = True  # a mutant differs in a character, not always in its size or its second
    for name in SLOW_TO_IMPORT:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with Listener(socket) as listener:
        while True:
            with listener.accept() as asked:
                seconds, tests = asked.recv()
                with suppress(OSError):  # whoever asked is gone
                    asked.send(in_fork(tests, seconds))


def in_fork(tests: list[str], seconds: float) -> tuple[int, str]:
    """pytest's exit status and the end of what it printed."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.setsid()  # what a test starts ends with it
            for number in (1, 2):
                os.dup2(output.fileno(), number)
            os._exit(pytest_of(tests))
        status = wait(child, seconds)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        output.seek(max(0, output.seek(0, os.SEEK_END) - 12_000))
        return status, output.read().decode(errors="replace")


def pytest_of(tests: list[str]) -> int:
    import pytest

    try:
        return int(
            pytest.main(["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
        )
    except BaseException:
        return 70


def wait(child: int, seconds: float) -> int:
    """The child's exit status, of at most so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) % 256
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return OUT_OF_TIME


def ask(socket: str, seconds: float, tests: list[str]) -> tuple[int, str]:
    """What `serve` answers; it may still be importing."""
    for _ in range(4000):
        try:
            with Client(socket) as server:
                server.send((seconds, tests))
                return server.recv()
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.1)
    raise TimeoutError(f"nobody listens at {socket}")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    code, text = ask(sys.argv[2], float(sys.argv[3]), sys.argv[4:])
    print(text)
    sys.exit(code)
