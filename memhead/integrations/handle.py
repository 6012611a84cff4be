"""What every integration's ``install`` returns."""

from __future__ import annotations

from collections.abc import Callable


class Handle:
    """An installed head: how often it was called, and the way back.

    Attributes:
        calls: calls so far; one that stays where it was while a step was trained means a bypass.
        rows: tokens scored so far.
    """

    def __init__(self, impl: str, restore: Callable[[], None]) -> None:
        self.impl = impl
        self.calls = 0
        self.rows = 0
        self._calls_seen = 0
        self._restore: Callable[[], None] | None = restore

    def count(self, rows: int) -> None:
        """Note one call that scored ``rows`` tokens."""
        self.calls += 1
        self.rows += rows

    def expect_calls(self, since: str) -> None:
        """Call it after every training step, or whatever ``since`` names.

        Raises:
            RuntimeError: not one call arrived since the last time this was asked.
        """
        if self.calls == self._calls_seen:
            raise RuntimeError(
                f"{since} never reached memhead: something computed its log-probabilities another way, "
                "in silence. Run with head.impl=trl to do without memhead, or find what replaced the head"
            )
        self._calls_seen = self.calls

    def uninstall(self) -> None:
        """Put back what was there before; a second call does nothing."""
        if self._restore is not None:
            self._restore()
            self._restore = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.uninstall()
