r"""Is a LaTeX answer the same as the known one? math-verify decides, in its own process.

math-verify hands text from a model to a computer algebra system, which can take forever inside one call and cannot be
interrupted there. The process is then killed, and the next question starts a new one. It runs in its own session, where
a terminal's Ctrl-C does not reach it, and is restarted if it dies in any other way.

    verifier = Verifier(seconds=3.0)
    verifier.same(r"\frac12", r"So it is \boxed{0.5}.")      True; None where time ran out
    verifier.same_answer(r"\frac12", "0.5")                  the same for what stands in the box
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes.rewards.final_answer import boxed
from recipes.rewards.latex import MAX_ANSWER, parts, plain

START_SECONDS = 120.0  # importing a computer algebra system, on a busy machine
MAX_CHARACTERS = 4000  # of an unboxed completion's end, where the answer stands
MAX_MEMORY = 4 * 2**30  # bytes of address space; a tower of powers would take all there is
_FULL_STOP = re.compile(r"(?<=[0-9])\.(?=\s|$)")  # 24/5. would be read as 24 over the decimal 5.
_known_parts = lru_cache(maxsize=4096)(parts)


class Verifier:
    """Asks one process, one question at a time; `seconds` for each. `timeouts` counts those that took longer."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()
        self.timeouts = 0
        atexit.register(self.close)

    def same(self, gold: str, completion: str) -> bool | None:
        """Whether the completion's final answer, boxed or not, equals `gold`. None: no verdict in time."""
        found = boxed(completion)
        if found is not None:
            return self.same_answer(gold, found)
        text = _FULL_STOP.sub("", plain(completion[-MAX_CHARACTERS:]))
        return self._verdict({"gold": _known_parts(gold), "text": text})

    def same_answer(self, gold: str, answer: str) -> bool | None:
        """Whether `answer`, which is nothing but LaTeX, equals `gold`. None: no verdict in time."""
        if len(answer) > MAX_ANSWER and answer.strip() != gold.strip():
            return False
        known, given = _known_parts(gold), parts(answer)
        if not known or not given:
            return False
        return known == given or self._verdict({"gold": known, "given": given})

    def close(self) -> None:
        """End the process. The next question starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _verdict(self, question: dict[str, Any]) -> bool | None:
        """The answer of the process; a second process is asked if the first was already dead."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        process = self._process or self._start()
        verdict = self._ask(process, question, self._seconds)
        if verdict is None:
            self.timeouts += 1
        return verdict

    def _start(self) -> subprocess.Popen[bytes]:
        """A process that has imported what it needs. Raises RuntimeError if it cannot."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "recipes.rewards.math_verifier", str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
            start_new_session=True,
        )
        if self._ask(self._process, {"gold": ["1"], "given": ["1.0"]}, START_SECONDS) is not True:
            raise RuntimeError("math-verify does not answer; install it: pip install 'math-verify>=0.9'")
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], question: dict[str, Any], seconds: float) -> bool | None:
        """The verdict, None if there is none in time. A process that still owes an answer is never asked again.

        Whatever ends the wait, be it a time limit or Ctrl-C, ends the process: its late answer would be read as that
        of the next question.
        """
        number, answered = next(self._numbers), False
        try:
            reply = self._exchange(process, json.dumps({**question, "number": number}), seconds)
            answered = reply is not None and reply["number"] == number
            return bool(reply["same"]) if answered and reply is not None else None
        finally:
            if not answered:
                self.close()

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], question: str, seconds: float) -> dict[str, Any] | None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(question.encode() + b"\n")
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
        reply: dict[str, Any] = json.loads(line)
        return reply


def serve(seconds: float) -> None:
    """Answer questions from standard input until it closes; each may take `seconds`, and this process ends with it."""
    from recipes.rewards.latex_equality import same_in_text, same_parts

    # What it prints and logs must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    for line in sys.stdin:
        question = json.loads(line)
        # The asking process kills this one when the time is up. If it has died itself, the alarm does.
        signal.alarm(int(seconds) + 5)
        try:
            if "text" in question:
                same = same_in_text(question["gold"], question["text"])
            else:
                same = same_parts(question["gold"], question["given"])
        except Exception:  # what cannot be read is not the answer
            same = False
        signal.alarm(0)
        print(json.dumps({"number": question["number"], "same": bool(same)}), file=answers, flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
