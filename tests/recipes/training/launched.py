"""Commands on several processes, by their launchers."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def torchrun(world, *command, **options):
    """Starts `command` on so many processes of this machine, on a port that is free."""
    return launched("torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *command, **options)


def launched(*command, **options):
    """Starts a module of Python with its arguments, one thread a process."""
    here = [str(ROOT), str(ROOT / "tests" / "recipes"), str(Path(__file__).parent)]
    here += [path for path in (os.environ.get("PYTHONPATH"),) if path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(here)}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
