"""Is a LaTeX answer the same as the known one? math-verify decides, in a process of its own.

math-verify hands text from a model to a computer algebra system, which can take for ever inside one call and
cannot be interrupted there. The process is killed then, and the next question starts a new one.

    verifier = Verifier(seconds=3.0)
    verifier.same(r"\\frac12", r"So it is \\boxed{0.5}.")      True; None where time ran out
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START_SECONDS = 120.0  # importing a computer algebra system, on a busy machine
MAX_CHARACTERS = 4000  # of a completion's end, where the answer stands


class Verifier:
    """Asks one process, one question at a time; `seconds` for each. `timeouts` counts those that took longer."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self.timeouts = 0
        atexit.register(self.close)

    def same(self, gold: str, completion: str) -> bool | None:
        """Whether the completion's final answer equals `gold` (LaTeX, without `$`). None: no verdict in time."""
        process = self._process or self._start()
        self._process = process
        verdict = self._ask(
            process, {"gold": gold, "completion": completion[-MAX_CHARACTERS:]}, self._seconds
        )
        if verdict is None:
            self.timeouts += 1
            self.close()
        return verdict

    def close(self) -> None:
        """End the process. The next question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        """A process that has imported what it needs. Raises RuntimeError if it cannot."""
        process = subprocess.Popen(
            [sys.executable, "-m", "recipes.rewards.math_verifier"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        if self._ask(process, {"gold": "1", "completion": r"\boxed{1}"}, START_SECONDS) is not True:
            process.kill()
            raise RuntimeError("math-verify does not answer; install it: pip install 'math-verify>=0.9'")
        return process

    @staticmethod
    def _ask(process: subprocess.Popen[bytes], question: dict[str, str], seconds: float) -> bool | None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        line, deadline = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(process.stdout.fileno(), 4096) if ready else b""
            if not part:  # the time is up, or the process has ended
                return None
            line += part
        return bool(json.loads(line))


def serve() -> None:
    """Answer questions from standard input until it closes."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # What it prints and logs must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    options: dict[str, Any] = {"parsing_timeout": None}  # its alarms do not end what hangs; our kill does
    anywhere = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    for line in sys.stdin:
        question = json.loads(line)
        try:
            gold = parse(f"${question['gold'].strip('$ ')}$", **options)
            given = parse(question["completion"], extraction_config=anywhere, **options)
            same = bool(gold and given) and verify(gold, given, timeout_seconds=None)
        except Exception:  # what it cannot read is not the answer
            same = False
        print(json.dumps(bool(same)), file=answers, flush=True)


if __name__ == "__main__":
    serve()
