"""Requests to stop: a run stops between two steps, or immediately during a wait that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """A stop request ended a wait, during which nothing of the run had changed."""


class StopRequest:
    """A request to stop; `signal` is its signal number, 0 without a request.

    A step and a save are never interrupted. Waits for data, held-out evaluations and pictures can take long and
    change nothing: `waiting` marks them, and a request ends them immediately.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._waiting = False

    def ask(self, signal: int, _: object = None) -> None:
        """Request a stop; a handler for `signal.signal`. The first signal counts; later signals do nothing."""
        self.signal = self.signal or signal
        if self._waiting:
            self._waiting = False
            raise Interrupted

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Raise `Interrupted` before or in the body as soon as a stop is requested."""
        if self.signal:
            raise Interrupted
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
