"""`study work` and `study status`: join a study as an additional worker, and see the study's progress."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_in_dit.cli.options import Commands, add_device, number_where, print_table
from dit_in_dit.config.errors import UserError

if TYPE_CHECKING:
    import torch

    from dit_in_dit.study.plan import Plan
    from dit_in_dit.study.queue import Queue


STORAGE = "DIT_IN_DIT_STORAGE"  # environment variable of the URL: `ps` would show a password in an argument


def add(study: Commands) -> None:
    """Add both subcommands."""
    work = study.add("work", _work, "join a started study as an additional worker, from any machine")
    status = study.add("status", _status, "print the progress of a study")
    for command in (work, status):
        command.add_argument("out", type=Path, metavar="DIR", help="the study's folder")
        add_storage(command)
    add_device(work)


def add_storage(command: argparse.ArgumentParser) -> None:
    """Add the arguments for `open_queue`."""
    command.add_argument(
        "--storage",
        metavar="URL",
        default=os.environ.get(STORAGE) or None,
        help="database that workers of several machines share: postgresql+psycopg://USER:PASSWORD@HOST/NAME "
        f"(default: ${STORAGE}, which other users of the machine cannot see)",
    )
    command.add_argument(
        "--lease",
        type=number_where(lambda seconds: 1 <= seconds <= 86400, "from 1 to 86400 seconds"),
        default=60.0,
        help="seconds without a sign from a trial's worker before another worker takes the trial (default 60)",
    )


@contextmanager
def open_queue(plan: Plan, options: argparse.Namespace) -> Iterator[Queue]:
    """The study's queue. Storage outages are printed on stderr; an outage as long as a lease ends the command."""
    from dit_in_dit.study.queue import Queue
    from dit_in_dit.study.storage import StorageAwayError

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        yield Queue(plan, options.out, options.storage, options.lease, say)
    except StorageAwayError as error:
        raise UserError(str(error)) from None


def format_counts(counts: Counter[str]) -> str:
    """Counts of trials by state, without the zeros."""
    states = ("done", "failed", "pruned", "running", "waiting")
    return ", ".join(f"{counts[state]} {state}" for state in states if counts[state])


def _status(options: argparse.Namespace) -> None:
    from dit_in_dit.study.plan import read_plan

    plan = read_plan(options.out)
    with open_queue(plan, options) as queue:
        counts, trials = queue.counts(), queue.keys()
    print(f"{plan.name}: {format_counts(counts)}, of {queue.total}")
    steps = {key: trial.user_attrs.get("beat", [0, 0])[1] for key, trial in trials.items()}
    print_table([], [[key, trials[key].state.name.lower(), f"step {steps[key]}"] for key in sorted(trials)])


def _work(options: argparse.Namespace) -> None:
    from dit_in_dit.runtime.device import pick_device
    from dit_in_dit.study.plan import read_plan

    plan, device = read_plan(options.out), pick_device(options.device)
    with open_queue(plan, options) as queue:
        work_here(plan, options.out, queue, device)


def work_here(plan: Plan, out: Path, queue: Queue, device: torch.device) -> None:
    """Do trials in this process until no trial is left."""
    from dit_in_dit.study.worker import run_trials

    shown = 0.0
    with (
        study_progress(plan, queue) as show,
        closing(run_trials(plan, out, queue, device)) as events,
        exit_on_sigterm(),
    ):
        for event in events:
            training = event.kind == "training"
            if event.kind in ("done", "failed", "pruned", "lost"):
                show(line=f"{event.key}: {event.kind}{f', {event.text}' if event.text else ''}")
            elif event.text == "continued":
                show(line=f"{event.key}: continued from step {event.step}")
            if not training or time.monotonic() - shown > 1:  # counting asks the storage
                state = f"{event.step}/{event.steps}" if training else event.kind
                show(f"{event.key} {state} {event.text}", event.step if training else None)
                shown = time.monotonic()
        show()


@contextmanager
def study_progress(plan: Plan, queue: Queue) -> Iterator[Callable[..., None]]:
    """Show a bar of all training steps; the yielded function updates the bar, or prints a line above it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    steps = sum(trial.config.train.steps for trial in plan.trials) / len(plan.trials)
    with Progress(*columns, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task("study", total=queue.total * steps)

        def show(text: str = "", step: int | None = None, *, line: str = "") -> None:
            if line:
                console.print(line)
                return
            counts = queue.counts()
            ended = counts["done"] + counts["failed"] + counts["pruned"]
            running = queue.steps() if step is None else step
            bar.update(task, completed=ended * steps + running, description=f"{format_counts(counts)}  {text}")

        yield show


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within a `with` block, SIGTERM stops the worker as Ctrl-C does: the trial is given back immediately."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
