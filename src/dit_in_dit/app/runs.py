"""Runs: training runs in a folder, their curves and sample grids, and processes that train them."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError, one_line, truncate
from dit_in_dit.config.files import override
from dit_in_dit.config.plugins import plugin_arguments
from dit_in_dit.curves.arms import arms, notes
from dit_in_dit.curves.convergence import check_comparable, logged_times
from dit_in_dit.curves.logs import Curve, last_step, read_run
from dit_in_dit.curves.plots import draw_held_out, draw_loss
from dit_in_dit.reporting.plots import figure_png
from dit_in_dit.runs.lock import is_locked

ENDING = 20  # seconds that a stopped process may take to end after its last checkpoint
LINES = 12  # of it that are shown


@dataclass(frozen=True)
class RunState:
    """A run as a row: its folder, steps, and whether it is being trained."""

    run: Path
    step: int
    steps: int
    running: bool
    fault: str = ""

    @property
    def text(self) -> str:
        """running, done, stopped, or why its files cannot be read."""
        if self.fault:
            return f"cannot be read: {self.fault}"
        return "running" if self.running else "done" if self.step >= self.steps else "stopped"


def training_runs(folder: Path) -> dict[str, RunState]:
    """The runs below a folder that have a log, or are being trained, by name."""
    states = {}
    for config in sorted(folder.glob("*/config.yaml")):
        run, log = config.parent, config.with_name("log.jsonl")
        running = is_locked(run / "lock")
        if log.exists() or running:
            files = tuple((each.stat().st_mtime_ns, each.stat().st_size) for each in (config, log) if each.exists())
            states[run.name] = replace(_logged(run, files), running=running)
    return states


@lru_cache(maxsize=1024)
def _logged(run: Path, files: tuple[tuple[int, int], ...]) -> RunState:
    """State of a run by its files, whose times and sizes are `files`: pages ask every few seconds."""
    try:
        curve = read_run(run)
    except UserError as error:
        return RunState(run, 0, 0, False, one_line(str(error)))
    return RunState(run, int(last_step(curve)) if len(curve.step) else 0, curve.config.train.steps, False)


def curve_figures(states: Sequence[RunState]) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Figures (title, PNG) of the runs as arms with bands, and remarks. Raises UserError if they cannot be compared."""
    if not states:
        raise UserError("choose the runs whose curves to draw")
    curves: list[Curve] = [read_run(state.run) for state in states]
    compared = arms(curves)
    pages = [("training loss", draw_loss(compared))]
    if logged_times(compared):
        check_comparable(compared)
        pages.append(("held-out error", draw_held_out(compared)))
    return [(title, figure_png(page, colours=256)) for title, page in pages], notes(curves)


def grids(run: Path) -> list[tuple[int, Path]]:
    """Sample grids of a run, by step."""
    return [(int(path.stem), path) for path in sorted((run / "samples").glob("*.png")) if path.stem.isdecimal()]


class Trainings:
    """Processes that the page started, by run. They end with the page unless they are left running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: dict[Path, subprocess.Popen[bytes]] = {}
        self._stopped: set[int] = set()  # process numbers

    def start(self, name: str, preset: str, sets: str) -> Path:
        """Train a new run. Raises UserError for a wrong name or config, or if the run exists."""
        run = self._folder(name)
        if run.exists():
            raise UserError(f"{run} exists: choose another name, or resume it")
        try:
            words = shlex.split(sets)
        except ValueError as error:
            raise UserError(f"config keys: {error} in {truncate(sets)!r}") from None
        override(presets.get(preset), words)  # refused here, not in the process
        assignments = [word for each in words for word in ("--set", each)]
        self._begin(run, ["train", "--preset", preset, *assignments, "--out", str(run)])
        return run

    def resume(self, name: str) -> None:
        """Continue a run from its last checkpoint. UserError if it is being trained or missing."""
        run = self._folder(name)
        if not (run / "config.yaml").is_file():
            raise UserError(f"no run at {run}")
        self._begin(run, ["train", "--resume", "--out", str(run)])

    def stop(self, name: str) -> None:
        """Ask a run of this page to write a checkpoint and end. UserError if the page did not start it."""
        process = self._processes.get(self._folder(name))
        if process is None or process.poll() is not None:
            raise UserError(f"this page does not train {truncate(name)}: stop it where it was started")
        process.send_signal(signal.SIGINT)
        self._stopped.add(process.pid)

    def output(self, name: str) -> str:
        """The last lines that the run's process printed."""
        path = _output(self._folder(name))
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join(text.replace("\r", "\n").splitlines()[-LINES:])

    def _folder(self, name: str) -> Path:
        if not name.isprintable() or Path(name).name != name or name.startswith(".") or not name:
            raise UserError(f"a run's name must be a folder's name without a path: got {truncate(name)!r}")
        return self.folder / name

    def _begin(self, run: Path, words: list[str]) -> None:
        process = self._processes.get(run)
        if process and process.pid in self._stopped and not is_locked(run / "lock"):
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING)
        if is_locked(run / "lock") or (process and process.poll() is None):  # it takes its lock after some seconds
            raise UserError(f"{run} is being trained")
        run.parent.mkdir(parents=True, exist_ok=True)
        with _output(run).open("ab") as output:
            command = [sys.executable, "-m", "dit_in_dit", *words, *plugin_arguments()]
            self._processes[run] = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


def _output(run: Path) -> Path:
    """The file of what a training process of the page prints. It is beside the run, whose folder must be new."""
    return run.parent / f".{run.name}.log"
