"""Runs in processes of their own, for faults that a test could not survive."""

import os

import ready


def start(arguments, before="", start=ready.python):
    """`train_grpo.py arguments` in a process and a session of its own, after the Python statements `before`."""
    script = f"{before}\nimport sys, train_grpo\nsys.exit(train_grpo.main({list(arguments)!r}))"
    return start("-c", script, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(process, words):
    """The process's output until a line has `words`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError(f"{words!r} never came: {lines} {process.stderr and process.stderr.read()}")
