"""Python that has imported torch, transformers and TRL already: a process a test starts, without its ten seconds.

    run = python("-c", "import train_grpo; …", env=…)       as subprocess.Popen([sys.executable, …]), by a fork
    run = python("-m", "torch.distributed.run", …, env=…)   its ranks are forks of it too
    run = anew(…)                                           one that imports by itself, where that is what is tested

A process of its own in all else: output, environment, session, signals, exit.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMPORTED = (
    "train_grpo", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.elastic.multiprocessing.api",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "transformers.trainer",
    "trl.trainer.grpo_trainer", "peft", "datasets", "accelerate", "rich.progress", "recipes.report.page",
    "recipes.training.evaluation", "recipes.training.session", "recipes.training.trainer", "recipes.export",
)  # fmt: skip


class Run:
    """What a test asks of a subprocess.Popen."""

    def __init__(self, pid: int, status: int, stdout: int, stderr: int) -> None:
        self.pid, self.returncode, self._status = pid, None, os.fdopen(status)
        self.stdout, self.stderr = os.fdopen(stdout), os.fdopen(stderr)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self.returncode = int(self._status.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        said = {stream: "" for stream in (self.stdout, self.stderr) if not stream.closed}

        def read(stream: Any) -> None:
            said[stream] = stream.read()

        readers = [threading.Thread(target=read, args=(stream,), daemon=True) for stream in said]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:  # what the process started may hold them open
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(f"output of process {self.pid}", timeout or 0.0)
        return said.get(self.stdout, ""), said.get(self.stderr, "")

    def send_signal(self, number: int) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def python(*command: object, env: dict[str, str], merged: bool = False) -> Run | subprocess.Popen[str]:
    """Starts `python command` in the root and a session of its own. merged: what goes to stderr comes from stdout."""
    if sys.platform != "linux":  # elsewhere a fork of what has imported so much may not work
        return anew(*command, env=env, merged=merged)
    (out, to_out), (err, to_err), (status, to_status) = (os.pipe() for _ in range(3))
    asked = {"command": [str(part) for part in command], "env": env}
    handed = [to_out, to_out if merged else to_err, to_status]
    server = _server()
    socket.send_fds(server, [b"?"], handed)
    with server.makefile("rw") as said:
        said.write(json.dumps(asked) + "\n")
        said.flush()
        pid = int(said.readline())
    for descriptor in (to_out, to_err, to_status):
        os.close(descriptor)
    return Run(pid, status, out, err)


def anew(*command: object, env: dict[str, str], merged: bool = False) -> subprocess.Popen[str]:
    """The same, of a Python that imports by itself."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT if merged else subprocess.PIPE,
    )  # fmt: skip


@functools.cache
def _server() -> socket.socket:
    """Of this process; it ends with it."""
    ours, theirs = socket.socketpair()
    server = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
    )  # fmt: skip
    theirs.close()

    @atexit.register
    def end() -> None:
        ours.close()
        server.wait()

    return ours


def serve(asking: socket.socket) -> None:
    """Forks for whoever asks, and says how each fork has ended."""
    children: dict[int, int] = {}
    while True:
        while select.select([asking], [], [], 0.02 if children else None)[0]:
            word, descriptors, *_ = socket.recv_fds(asking, 1, 3)
            if not word:
                return
            with asking.makefile("rw") as said:
                asked = json.loads(said.readline())
                *outputs, status = descriptors
                pid = fork(asked["command"], asked["env"], outputs, [status, asking.fileno()])
                said.write(f"{pid}\n")
            for descriptor in set(outputs):
                os.close(descriptor)
            children[pid] = status
        for pid in list(children):
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                with os.fdopen(children.pop(pid), "w") as status, suppress(BrokenPipeError):
                    status.write(f"{os.waitstatus_to_exitcode(code)}\n")


def fork(command: list[str], env: dict[str, str], outputs: list[int] = (), closed: list[int] = ()) -> int:
    """The id of a child that is `python command`, with these as stdout and stderr, and without what is closed."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        for number, descriptor in enumerate(outputs, start=1):
            os.dup2(descriptor, number)
        for descriptor in {*outputs, *closed}:
            os.close(descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(env)
        status = run(command)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        _exit(status)


def run(command: list[str]) -> int:
    """What `python command` does after its start."""
    kind, *rest = [part for part in command if part != "-u"]
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.stdout.reconfigure(write_through="-u" in command)
    sys.stderr.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.path[:0] = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, str(Path(kind).resolve().parent))
        runpy.run_path(kind, run_name="__main__")
    return 0


def _exit(status: int) -> None:
    """As Python ends, in the middle of whatever called."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


class Rank:
    """What torch's launcher asks of the subprocess.Popen of a rank."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], **_: object) -> None:
        self.pid, self.returncode = fork(list(args[1:]), env), None

    def poll(self) -> int | None:
        if self.returncode is None:
            done, code = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(code) if done else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.02)
        return self.returncode


def main() -> None:
    asking = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "recipes")]
    for name in IMPORTED:
        importlib.import_module(name)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = Rank
    gc.collect()
    gc.freeze()
    serve(asking)


if __name__ == "__main__":
    main()
