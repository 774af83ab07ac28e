"""Runs the parts of the device check in processes of their own: none can end the check, hang it or lose results."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dit_in_dit.benchmark.device.cases import NO_GPU, append_line
from dit_in_dit.benchmark.device.plan import CaseLine, Part
from dit_in_dit.benchmark.device.table import table_lines
from dit_in_dit.config.errors import UserError
from dit_in_dit.runs import atomic

OVER = 1.5  # a part is killed after its planned seconds times this
LEAST = 0.3  # share of its planned seconds for which a part starts
RESERVE = 4.0  # seconds that are kept for killing and for the table
LOG = 4000  # characters of a process's output in the log
Command = Callable[[Part, int, float, float], list[str]]  # part, process, seconds, limit -> a command line


class DeviceCheck:
    """A device check in the folder `out`: `parts.jsonl`, `cases.jsonl`, `log.txt` and `table.txt`.

    Args:
        seconds: the whole check ends within this time.
        processes: number of processes of a part.

    Raises:
        UserError: the folder has a check, or cannot be written.
    """

    def __init__(self, out: Path, seconds: float, command: Command, processes: Callable[[Part], int]) -> None:
        self.out, self.end = out, time.monotonic() + seconds - RESERVE
        self.command, self.processes = command, processes
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.cases, self.parts = out / "cases.jsonl", out / "parts.jsonl"
            if self.parts.exists():
                raise UserError(f"--out: {out} has a device check: give another folder")
            self.parts.touch()
            self.cases.touch()
        except OSError as error:
            raise UserError(f"--out: {out} cannot be written ({error.strerror}): give another folder") from None

    def run(self, parts: Sequence[Part]) -> bool:
        """Run the parts; the table is written whatever happens. Returns whether a case ended well and none failed.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM, after the table.
        """
        with _terminated_as_interrupted():
            try:
                for part in parts:
                    self._part(part)
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not stop the table
                atomic.write_atomic(self.out / "table.txt", "\n".join(self.table()) + "\n")
        ended = [line["state"] for line in self._read(self.cases) if line["state"] != "begun"]
        bad = [line for line in self._read(self.parts) if line["state"] not in ("done", "skipped")]
        return "done" in ended and not bad and not {"failed", "crashed"} & set(ended)

    def table(self) -> list[str]:
        """The lines of the table."""
        return table_lines(self._read(self.parts), self._read(self.cases))

    def _part(self, part: Part) -> None:
        began = time.monotonic()
        left, line = self.end - began, {"part": part.name, "planned": part.seconds}
        if any(case.get("why", "").startswith(NO_GPU) for case in self._read(self.cases)):
            line |= {"state": "skipped", "seconds": 0.0, "why": NO_GPU}
        elif left < LEAST * part.seconds:
            line |= {"state": "skipped", "seconds": 0.0, "why": f"no time left ({max(left, 0):.0f} s)"}
        else:
            line["state"] = "interrupted"
            try:
                line |= self._processes(part, min(OVER * part.seconds, left))
            finally:
                append_line(self.parts, line | {"seconds": round(time.monotonic() - began, 1)})
            return
        append_line(self.parts, line)

    def _processes(self, part: Part, limit: float) -> CaseLine:
        """Run all processes of a part; those that do not end within `limit` seconds are killed."""
        until, planned = time.monotonic() + limit, min(part.seconds, limit)
        outputs: list[IO[str]] = []
        running: list[subprocess.Popen[Any]] = []
        try:
            for number in range(self.processes(part)):
                outputs.append(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115  # closed below
                command = self.command(part, number, planned, limit)
                how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
                environment = {**os.environ, **part.environment}
                running.append(
                    subprocess.Popen(command, stdout=outputs[-1], env=environment, start_new_session=True, **how)
                )
            while any(process.poll() is None for process in running) and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            late = [number for number, process in enumerate(running) if process.poll() is None]
            for process in running:
                _kill_group(process)
            late += self._note_ends(part, running, late, [_tail(output) for output in outputs])
        if late:
            return {"state": "killed", "why": f"after {limit:.0f} s", "processes": late}
        codes = [process.returncode for process in running]
        bad = [f"process {number} ended with {code}" for number, code in enumerate(codes) if code]
        if bad:
            return {"state": "failed", "why": "; ".join(bad)[:200]}
        return {"state": "done" if self._of(part, "done", "failed") else "skipped"}

    def _note_ends(
        self, part: Part, running: Sequence[subprocess.Popen[Any]], late: Sequence[int], texts: Sequence[str]
    ) -> list[int]:
        """Record the processes' output and what their ends broke off; returns those that ended because they hung."""
        hung = []
        for number, (process, text) in enumerate(zip(running, texts, strict=True)):
            if text.strip():
                with (self.out / "log.txt").open("a") as log:
                    log.write(f"--- {part.name}, process {number}\n{text.strip()}\n")
            last = (text.strip().splitlines() or [""])[-1]
            why = "killed: out of time" if number in late else f"the process ended with {process.returncode}: {last}"
            if where := re.findall(r"(?s)Timeout \(.*recent call first\):\n\s+([^\n]+)", text):
                hung.append(number)
                why = f"killed: out of time in {where[0]}"
            cut = [line for line in self._of(part, "begun") if line["process"] == number]
            bad = process.returncode and number not in (*late, *hung) and not self._of(part, "failed", "crashed")
            if bad and not cut:
                cut = [{"part": part.name, "process": number, "row": "process", "case": f"process {number}"}]
            for line in cut:
                append_line(self.cases, {**line, "state": "crashed", "why": why[:200]})
        return hung

    def _of(self, part: Part, *states: str) -> list[CaseLine]:
        """The cases of a part whose last line has one of these states; `begun`: those that did not end."""
        own = [line for line in self._read(self.cases) if line["part"] == part.name]
        last = {(line["process"], line["row"], line["case"]): line for line in own}
        return [line for line in last.values() if line["state"] in states]

    @staticmethod
    def _read(path: Path) -> list[CaseLine]:
        """The lines of a file; a line that was cut short is left out."""
        lines = []
        for text in path.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(text))
        return lines


def _tail(output: IO[str]) -> str:
    with output:
        output.seek(0)
        return output.read()[-LOG:]


def _kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process and what it started. A process that the driver holds cannot end: it is left alone."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(2)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does, while the context is open."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
