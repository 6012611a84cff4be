"""The processes of one run, as torchrun or accelerate launch starts them: what one does for all, what all agree on.

    folder = by_main(lambda: RunFolder.create(…))    the main process alone makes it, and every process has it
    texts = whole(generate(mine(rows)), len(rows))   each a share, in the end all of them
    complain("error: …")                             what all find is said by one

The group of processes is accelerate's, which makes it with TRL's GRPOConfig. Before that, without a launcher, and
inside `by_main` a process is alone, and nothing here talks to another.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from datetime import timedelta
from math import ceil
from typing import Any, TypeVar

T = TypeVar("T")
_PATIENCE = 20.0  # seconds
_MOMENT = 0.1
_A_WHILE = 2.0
_alone = ContextVar("alone", default=False)  # inside by_main
_parted = False  # this process has said why it ends, which it may do without the others

# What torch says where a peer is gone: NCCL raises dist.DistError, gloo a RuntimeError with one of these.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")

_NEVER_CAME = (
    "Stopped before all processes of this run were there, by a signal or since one of them has ended; run the same "
    "command again."
)


class MainFailed(RuntimeError):
    """The main process has failed, and it says why."""


def count() -> int:
    """How many there are."""
    return _group().get_world_size() if _together() else 1


def rank() -> int:
    """The number of this one, from 0: the main process."""
    return _group().get_rank() if _together() else 0


def is_main() -> bool:
    """Whether this is the one that writes and speaks."""
    return rank() == 0


def is_first_here() -> bool:
    """Whether this is the first on its machine, by what launchers say before there is a group."""
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")


def end_with_launcher() -> None:
    """SIGTERM where the launcher dies without a word, by kill -9 or out of memory: its processes would train on unseen.

    On Linux; elsewhere nothing is told of a parent's end.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

    _prctl_pr_set_pdeathsig(signal.SIGTERM)


def spread() -> str:
    """What keeps the model in parts, FSDP or DeepSpeed, by what accelerate's launcher says; "" where it is whole."""
    for name in ("FSDP", "DeepSpeed"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true":
            return name
    return ""


def by_main(action: Callable[[], T]) -> T:
    """What `action` returns in the main process, which alone calls it; the others get a copy.

    What it raises is raised there; the others raise MainFailed.
    """
    if not _together():
        return action()
    found: list[Any] = [None]
    error: Exception | None = None
    if is_main():
        token = _alone.set(True)
        try:
            found = [(action(),)]
        except Exception as failed:
            error = failed
        finally:
            _alone.reset(token)
    result = found[0]
    _group().broadcast_object_list(found)
    if error is not None:
        raise error
    if found[0] is None:
        raise MainFailed("the main process has failed")
    return (result if is_main() else found[0])[0]


def gathered(value: T) -> list[T]:
    """The value of every process, by rank."""
    if not _together():
        return [value]
    found: list[Any] = [None] * count()
    _group().all_gather_object(found, value)
    return found


def smallest(value: int) -> int:
    """The smallest of all processes' values; a single small message."""
    if not _together():
        return value
    import torch
    from accelerate import PartialState

    found = torch.tensor(value, device=PartialState().device)
    _group().all_reduce(found, _group().ReduceOp.MIN)
    return int(found)


def anywhere(flag: bool) -> bool:
    """Whether it is so in any process."""
    return not smallest(not flag)


def first(value: T | None) -> T | None:
    """The value of the first process that has one."""
    return next((found for found in gathered(value) if found is not None), None)


def mine(items: Sequence[T]) -> list[T]:
    """This process's share, as large as every other's: where they do not divide, the last item comes more than once."""
    first, step = rank(), count()
    return [items[min(first + step * i, len(items) - 1)] for i in range(ceil(len(items) / step))]


def whole(share: list[T], total: int) -> list[T]:
    """What every process made of its share of `total` items, in the items' order."""
    shares = gathered(share)
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]


@contextmanager
def only_main_speaks() -> Iterator[None]:
    """Standard output is the main process's; errors are everybody's."""
    if is_main():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def complain(text: object) -> None:
    """Why the run ends, on standard error, in the words of the process that comes first: one reason, said once.

    Call it last. Before there is a group the first of this machine speaks, and the others give it time.
    """
    global _parted
    _parted = _together()
    if is_first_with("complaint"):
        print(text, file=sys.stderr, flush=True)
    elif not _together():
        let_the_first_speak()


def is_first_with(what: str) -> bool:
    """Whether no other process of this run has asked this before; before there is a group, of this machine.

    The one that is may ask again: a second Ctrl-C may come before it has spoken.
    """
    if not _together():
        return is_first_here()
    try:  # the store by which they have found each other: the launcher's, which outlives them
        store = _group().distributed_c10d._get_default_store()
        return int(store.compare_set(f"memhead/{what}", "", str(rank()))) == rank()
    except Exception:  # the launcher is gone: twice is better than not at all
        return True


def let_the_first_speak() -> None:
    """For a process that has nothing to say and is about to fail.

    As soon as one has, the launcher ends all, and might end the first in the middle of its sentence. So this one waits
    for the launcher, which ends it.
    """
    if count() > 1 or not is_first_here():
        time.sleep(_PATIENCE)


def lost_another(error: BaseException) -> bool:
    """Whether the error means that another process has ended."""
    if not _together():
        return False
    return isinstance(error, _group().DistError) or any(words in str(error) for words in _LOST)


def or_lost() -> str:
    """After "Stopped": of several processes one that dies has the launcher send the others the SIGTERM of somebody who
    stops the run."""
    return "" if count() == 1 else ", by a signal or since another process of this run has ended"


def blame(error: Exception, goes_on: str) -> None:
    """For an error that nobody expected: that another process has ended is a sentence, with `goes_on` as its remedy.

    Raises the error, a fault of our own, in the first process that has one.
    """
    if lost_another(error):
        complain(f"error: another process of this run has ended; {goes_on}")
    elif is_first_with("traceback"):
        raise error


@contextmanager
def ends_though_it_waits() -> Iterator[None]:
    """Around the making of the group: a signal ends a process that waits there for one that never comes.

    torch waits in C, where Python comes to none of its handlers; a thread hears of the signal, and gives them a moment.
    """
    if "LOCAL_RANK" not in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    made = threading.Event()
    threading.Thread(target=_listen, args=(heard, made), daemon=True).start()
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    try:
        yield
    finally:
        made.set()
        signal.set_wakeup_fd(before)
        os.close(told)


def _listen(heard: int, made: threading.Event) -> None:
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU")
    ending = [getattr(signal, name) for name in names if hasattr(signal, name)]
    with open(heard, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] in ending and not made.wait(_A_WHILE):
                if is_first_here():
                    print(f"\n{_NEVER_CAME}", file=sys.stderr, flush=True)
                os._exit(128 + number[0])


def wait_at_most(seconds: float) -> None:
    """How long one waits for another, `grpo.ddp_timeout`: on a CPU transformers leaves gloo its own half an hour."""
    if _together() and _group().get_backend() == "gloo":
        _group().distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def end() -> None:
    """Leaves the group, at the end of a run that every process has come to; after a complaint it does nothing.

    A thread of gloo's that lets go of its last tensor when Python has begun to end aborts the process ("terminate
    called without an active exception"). The threads end with the last reference to the group, of which DDP keeps some
    in cycles. Such a thread needs the interpreter to let go of a tensor and has the group's lock meanwhile; to drop the
    group takes that lock and keeps the interpreter: so each has its moment first, or they wait for each other.
    """
    if _together() and not _parted:
        _group().destroy_process_group()
        time.sleep(_MOMENT)
        gc.collect()


def leave_the_others(status: int) -> None:
    """Ends the process, as Python does but for taking the group apart; does nothing where `end` has left it.

    What is in flight in a group, such as DDP's gradients of a backward pass that was cut off, is waited for by whoever
    takes it apart, with the interpreter held: for ever, where the others are elsewhere, which wait for this one.
    """
    if not _together():
        return
    threading._shutdown()  # type: ignore[attr-defined]  # an upload goes to its end
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _together() -> bool:
    if not {"torch", "torch.distributed"} <= sys.modules.keys():
        return False  # nor imported here: where that was cut off, it cannot be again
    group = _group()
    return group.is_available() and group.is_initialized() and not _alone.get() and group.get_world_size() > 1


def _group() -> Any:
    import torch.distributed

    return torch.distributed
