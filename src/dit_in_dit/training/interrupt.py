"""Being asked to stop: between two steps, and at once in whatever changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """A wait was cut short; nothing of the run had changed in it."""


class Stop:
    """Whether somebody asked to stop, and with which signal.

    A step and a save are never cut in two. A wait for data, a held-out evaluation and a picture can take long and
    change nothing: those, marked by `waiting`, end at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._waiting = False

    def ask(self, signal: int, _: object = None) -> None:
        """Ask; a handler of `signal.signal`. The first signal counts, those after it are harmless."""
        self.signal = self.signal or signal
        if self._waiting:
            self._waiting = False
            raise Interrupted

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done in here may be cut short by `Interrupted`, or not begin."""
        if self.signal:
            raise Interrupted
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
