"""What test_notebook.py has other processes do. They import this file, so it imports next to nothing."""

import atexit
import os
import signal
import sys
import time
from pathlib import Path


def speak(status):
    print("out ×")
    print("err", file=sys.stderr)
    os.system("echo from below")
    return status


def work_until_interrupted(begun):
    try:
        written = Path(f"{begun}.part")
        written.write_text(str(os.getpid()))
        written.rename(begun)
        time.sleep(60)
    except KeyboardInterrupt:
        print("finishing the step")
    return 130


def say(arguments):
    print(*arguments)
    return 0


def fail(arguments):
    print(f"command line: {arguments[-1]} is refused", file=sys.stderr)
    return 2


def interrupted_as_it_ends(status):
    """Says its last word; Ctrl-C comes when Python lets go of everything."""
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
    print("stopped", flush=True)
    return status
