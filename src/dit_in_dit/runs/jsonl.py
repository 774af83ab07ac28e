"""Files of JSON lines in a run's folder: the log, which is a function of the config, and the times."""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.strict_json import has_form, parse_lines
from dit_in_dit.runs.checkpoint import SaveError

Line = dict[str, Any]
MOST_STEP = 10**12  # as train.steps
NUMBER = (int, float)
ADVICE = "fix it, or start another run"


def is_log_line(line: Line) -> bool:
    """Whether an object can be a line of `log.jsonl`: a step with numbers, held-out errors or a rollback."""
    if not has_form(line, {"step": int}) or not 0 <= line["step"] <= MOST_STEP:
        return False
    if "rollback" in line:
        return has_form(line["rollback"], {"to": int})
    if "held_out" in line:
        times = line["held_out"]
        return isinstance(times, dict) and all(_is_number(t) and _are_errors(kinds) for t, kinds in times.items())
    drawn = [value for name, value in line.items() if name in ("loss", "skipped") or name.startswith("grad_norm")]
    return bool(drawn) and all(isinstance(value, NUMBER) for value in drawn)


def is_clock_line(line: Line) -> bool:
    """Whether an object can be a line of `timing.jsonl`."""
    return has_form(line, {"step": int, "seconds": NUMBER}) and math.isfinite(line["seconds"])


def check_lines(lines: list[Line], good: Callable[[Line], bool], what: str, advice: str) -> None:
    """UserError with the first line that does not belong in its file."""
    if wrong := next((line for line in lines if not good(line)), None):
        raise UserError(f"{what} holds a line that no run writes, {truncate(json.dumps(wrong), 60)}: {advice}")


def _are_errors(kinds: object) -> bool:
    """Whether an object holds errors by kind; a non-finite error is written as a name, such as 'nan'."""
    return isinstance(kinds, dict) and all(
        isinstance(error, NUMBER) or (isinstance(error, str) and _is_number(error)) for error in kinds.values()
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Lines:
    """An append-only file. On opening, an incomplete last line of a killed process is removed.

    A line that cannot be written (a full disk) stays in memory and is tried again with the next line.

    Args:
        path: the file; None (on ranks other than 0): nothing is read or written.
        good: whether an object can be a line of the file.

    Raises:
        UserError: a line is not good.
    """

    def __init__(self, path: Path | None, good: Callable[[Line], bool]) -> None:
        self.path, self.size, self.waiting = path, 0, b""
        self.stored: list[Line] = []
        self.file: io.FileIO | None = None
        if path is None:
            return
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        self.stored = parse_lines(whole.splitlines(), str(path), ADVICE)
        check_lines(self.stored, good, str(path), ADVICE)
        self.size = len(whole)
        self.file = io.FileIO(path, "r+" if path.exists() else "w+")
        self.file.truncate(self.size)

    def close(self) -> None:
        """Close the file."""
        if self.file:
            self.file.close()

    def add(self, line: Line) -> None:
        """Append one line, or keep it until the disk has room."""
        self.waiting += json.dumps(line, allow_nan=False).encode() + b"\n"
        with suppress(SaveError):  # `settle` is called again before anything depends on the line
            self.settle()

    def settle(self) -> None:
        """Write the waiting lines; SaveError when the disk refuses. Bytes that were written are not written again."""
        if not self.file:
            self.waiting = b""
            return
        self.file.seek(self.size)
        with self._refused():
            while self.waiting:
                written = self.file.write(self.waiting)
                self.size, self.waiting = self.size + (written or 0), self.waiting[written or 0 :]

    def sync(self) -> None:
        """Sync the written lines, in any thread, while others are added; SaveError when the disk refuses."""
        if self.file:
            with self._refused():
                os.fsync(self.file.fileno())

    def keep(self) -> None:
        """Write and sync all lines, before anything that depends on them is saved; SaveError when the disk refuses."""
        self.settle()
        self.sync()

    @contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(f"cannot write {self.path}: {error.strerror or error}; make room") from None


class Log:
    """`log.jsonl`. A resumed run does not write existing lines again; a run that was rolled back does."""

    def __init__(self, path: Path | None) -> None:
        self.lines, self.done, rolled = Lines(path, is_log_line), set(), 0
        for line in self.lines.stored:
            self.done.add((rolled, *self._name(line)))
            rolled += "rollback" in line

    @staticmethod
    def _name(line: Line) -> tuple[int | None, str]:
        return line.get("step"), next((kind for kind in ("held_out", "rollback") if kind in line), "step")

    def has(self, rolled: int, line: Line) -> bool:
        """Whether the log has a line of this step and kind after `rolled` rollbacks."""
        return (rolled, *self._name(line)) in self.done

    def write(self, rolled: int, line: Line) -> None:
        """Append a line, unless the log has it."""
        if not self.has(rolled, line):
            self.lines.add(line)


class Clock:
    """`timing.jsonl`: seconds of training over all resumes, images per second, and what `usage` gives for them."""

    def __init__(self, path: Path | None, usage: Callable[[float], dict[str, float]] = lambda _: {}) -> None:
        self.usage = usage
        self.lines = Lines(path, is_clock_line)
        self.seconds = max((line["seconds"] for line in self.lines.stored), default=0.0)
        self.start()

    def start(self) -> None:
        """Start timing."""
        self.began = time.perf_counter()

    def waited(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def write(self, step: int, images: int) -> dict[str, float]:
        """Note the time since the start; returns the line's `images_per_second` and usage."""
        speed = images / self.waited()
        self.seconds += self.waited()
        speeds = {"images_per_second": speed, **self.usage(speed)}
        self.lines.add({"step": step, "seconds": self.seconds, **speeds})
        return speeds
