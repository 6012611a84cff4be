"""Runs in processes of their own, for faults that a test could not survive."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def start(arguments, before="", **options):
    """`train_grpo.py arguments` in a process and a session of its own, after the Python statements `before`."""
    script = f"{before}\nimport sys, train_grpo\nsys.exit(train_grpo.main({list(arguments)!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def wait_for(process, words, seconds=120):
    """The process's output until a line has `words`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError(f"{words!r} never came: {lines} {process.stderr.read()}")
