"""Files of JSON lines beside a run: its log, which is a function of its config, and its clock."""

from __future__ import annotations

import io
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dit_in_dit.checkpoint import SaveError
from dit_in_dit.strict_json import parse_lines

Line = dict[str, Any]


class Lines:
    """An append-only file. Half a line of a killed process is cut off when it is opened.

    A line that cannot be written (a full disk) waits in memory and is tried again with the next one.

    Args:
        path: the file; None: nothing is read or written, as in processes that do not lead.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.size, self.waiting = path, 0, b""
        self.found: list[Line] = []
        self.file: io.FileIO | None = None
        if path is None:
            return
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        self.found = parse_lines(whole.splitlines(), str(path), "mend it, or start another run")
        self.size = len(whole)
        self.file = io.FileIO(path, "r+" if path.exists() else "w+")
        self.file.truncate(self.size)

    def close(self) -> None:
        """Close the file."""
        if self.file:
            self.file.close()

    def add(self, line: Line) -> None:
        """Append one line, or keep it until there is room."""
        self.waiting += json.dumps(line, allow_nan=False).encode() + b"\n"
        with suppress(SaveError):  # it waits; `settle` is called again before anything builds on it
            self.settle()

    def settle(self) -> None:
        """Write what waits; SaveError when it cannot be: what was written before stays, and is not written again."""
        if not self.file:
            self.waiting = b""
            return
        self.file.seek(self.size)
        try:
            while self.waiting:
                written = self.file.write(self.waiting)
                self.size, self.waiting = self.size + (written or 0), self.waiting[written or 0 :]
        except OSError as error:
            raise SaveError(f"cannot write {self.path}: {error.strerror or error}; make room") from None

    def keep(self) -> None:
        """Put all of it on the disk: what builds on these lines must not outlive them. SaveError when it cannot be."""
        self.settle()
        if self.file:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                raise SaveError(f"cannot write {self.path}: {error.strerror or error}; make room") from None


class Log:
    """`log.jsonl`. A resumed run does not write again what is there; one that was rolled back does."""

    def __init__(self, path: Path | None) -> None:
        self.lines, self.done, rolled = Lines(path), set(), 0
        for line in self.lines.found:
            self.done.add((rolled, *self._name(line)))
            rolled += "rollback" in line

    @staticmethod
    def _name(line: Line) -> tuple[int | None, str]:
        return line.get("step"), next((kind for kind in ("held_out", "rollback") if kind in line), "step")

    def has(self, rolled: int, line: Line) -> bool:
        """Whether a line of this step and kind is there since the run was rolled back `rolled` times."""
        return (rolled, *self._name(line)) in self.done

    def write(self, rolled: int, line: Line) -> None:
        """Append, unless it is there."""
        if not self.has(rolled, line):
            self.lines.add(line)


class Clock:
    """`timing.jsonl`: seconds spent in steps, over all resumes, and speed."""

    def __init__(self, path: Path | None) -> None:
        self.lines = Lines(path)
        self.seconds = max((line.get("seconds", 0.0) for line in self.lines.found), default=0.0)
        self.start()

    def start(self) -> None:
        """Time from here."""
        self.began = time.perf_counter()

    def waited(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def write(self, step: int, images: int) -> float:
        """Note the time since the start, and return images per second."""
        speed = images / self.waited()
        self.seconds += self.waited()
        self.lines.add({"step": step, "seconds": self.seconds, "images_per_second": speed})
        return speed
