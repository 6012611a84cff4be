"""Commands on several processes, by their launchers."""

import os
from pathlib import Path

import ready
from ready import ROOT


def torchrun(world, *command, start=ready.python):
    """Starts `command` on so many processes of this machine, on a port that is free."""
    return launched(
        "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *command, start=start
    )


def launched(*command, start=ready.python):
    """Starts a module of Python with its arguments, one thread a process; by ready.anew as a user does."""
    here = [str(ROOT), str(ROOT / "tests" / "recipes"), str(Path(__file__).parent)]
    here += [path for path in (os.environ.get("PYTHONPATH"),) if path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(here)}
    return start("-m", *command, env=environment, merged=True)
