"""`study`: a question as data, from its plan to its report."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_in_dit.cli.options import Commands, add_device, make_folder, print_table, whole_number
from dit_in_dit.config import plugins
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.program import format_stages

if TYPE_CHECKING:
    from dit_in_dit.study.plan import Arm, Plan, StudyConfig
    from dit_in_dit.study.queue import Queue

STORAGE = "DIT_IN_DIT_STORAGE"  # the environment's name of a URL, whose password `ps` would show
PATIENCE = 10.0  # seconds that workers have to give their trials back


def add(commands: Commands) -> None:
    """Add the command and its own commands."""
    study = Commands(commands.add("study", print, "answer a question with arms of equal cost, seeds and intervals"))
    study.add("list", _list, "the studies that come with the package")
    show = study.add("show", _show, "print a study, to write one of your own after it")
    show.add_argument("study", metavar="NAME|FILE")

    for name, run, about in (
        ("plan", _plan, "match the arms and print what each costs; nothing is trained"),
        ("run", _run, "train and measure every arm with every seed, then report; run again, it goes on"),
    ):
        command = study.add(name, run, about)
        command.add_argument("study", metavar="NAME|FILE", help="a shipped study (see `study list`) or a YAML file")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as budget.steps=400")
        add_device(command)
        if name == "run":
            command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the study's folder")
            command.add_argument("--workers", default="1", help="processes on this machine, or auto: as memory allows")
            _add_storage(command)

    work = study.add("work", _work, "join a study that was started, as one more worker, on any machine")
    for command, run_too in ((work, True), (study.add("status", _status, "how far a study is"), False)):
        command.add_argument("out", type=Path, metavar="DIR", help="the study's folder")
        _add_storage(command)
        if run_too:
            add_device(command)
    report = study.add("report", _report, "write report.html, report.md, results.csv and tables to paste")
    report.add_argument("out", type=Path, metavar="DIR", help="the study's folder")


def _add_storage(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--storage",
        metavar="URL",
        default=os.environ.get(STORAGE) or None,
        help="database that workers of several machines share: postgresql+psycopg://USER:PASSWORD@HOST/NAME "
        f"(default: ${STORAGE}, which other users of the machine cannot see)",
    )
    command.add_argument(
        "--lease", type=_seconds, default=60.0, help="seconds without a sign of life until a trial is lost (60)"
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"must be from 1 to 86400 seconds: got {text[:40]!r}")
    return seconds


# -------------------------------------------------------------------------------------------- looking


def _list(options: argparse.Namespace) -> None:
    from dit_in_dit.study.plan import read_study_config, shipped_studies

    for name in shipped_studies():
        study = read_study_config(name)
        many = f"{study.trials} trials" if study.search else f"{len(study.arms)} arms x {len(study.seeds)} seeds"
        print(f"{name:<12} {study.question}\n{'':<12} from {study.base}, {many}, equal {study.match}")


def _show(options: argparse.Namespace) -> None:
    from dit_in_dit.study.plan import read_study_config, shipped_studies

    read_study_config(options.study)  # a mistake in it is said, not shown
    print(shipped_studies().get(options.study, Path(options.study)).read_text(), end="")


def _plan(options: argparse.Namespace) -> None:
    from dit_in_dit.runtime.device import pick_device
    from dit_in_dit.study.plan import read_study_config

    _costs(_planned(options, read_study_config(options.study, options.set), pick_device(options.device)))


def _planned(options: argparse.Namespace, study: StudyConfig, device: Any) -> Plan:
    from rich.console import Console

    from dit_in_dit.study.planning import plan_study

    with Console(stderr=True).status("matching the arms and timing a step of each"):
        return plan_study(Path(options.study).stem, study, device)


def _costs(plan: Plan) -> None:
    """What every arm costs, and what was changed so that it costs that."""
    study = plan.study
    print(f"{plan.name}: {study.question}")
    held = "nothing is matched" if study.match == "none" else f"equal {study.match} within {study.tolerance:.1%}"
    print(f"  {held}; {plan.arms[0].config.train.steps} steps; seeds {', '.join(map(str, study.seeds))}")
    print_table(
        ["", "stages", "D", "E", "MMACs", "", "M params", "", "ms/step", "", "matched"],
        [_arm_row(arm) for arm in plan.arms],
    )


def _arm_row(arm: Arm) -> list[Any]:
    """Its size, each cost with the gap to the arm that it is compared with, and what matching changed."""
    model = arm.config.model
    gap = {name: "" if arm.against == arm.name else f"{value:+.1%}" for name, value in arm.gap.items()}
    return [
        arm.name,
        format_stages(model.program),
        model.outer.width,
        model.inner.width if model.blocks("inner") else None,
        f"{arm.cost['macs'] / 1e6:.2f}",
        gap.get("macs", ""),
        f"{arm.cost['params'] / 1e6:.3f}",
        gap.get("params", ""),
        f"{1e3 * arm.cost['time']:.1f}" if "time" in arm.cost else None,
        gap.get("time", ""),
        "\n".join(f"{name} {before} -> {after}" for name, (before, after) in arm.matched.items()),
    ]


# -------------------------------------------------------------------------------------------- running


def _run(options: argparse.Namespace) -> None:
    from dit_in_dit.runtime.device import pick_device
    from dit_in_dit.study.plan import read_study_config
    from dit_in_dit.study.planning import begin

    study, device = read_study_config(options.study, options.set), pick_device(options.device)
    workers = _workers(options.workers)
    make_folder(options.out)
    plan = begin(options.out, lambda: _planned(options, study, device), study)
    _costs(plan)
    sys.stdout.flush()  # the table comes before the work, also where it is not a terminal's
    with _board(plan, options) as board:
        counts = _do(plan, options, board, workers, device)
    _report(options)
    if counts["failed"]:
        sys.exit(1)


@contextmanager
def _board(plan: Plan, options: argparse.Namespace) -> Iterator[Queue]:
    """The study's board. A storage that is away is said on stderr, and after a lease ends the command."""
    from dit_in_dit.study.queue import Queue
    from dit_in_dit.study.storage import AwayError

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        yield Queue(plan, options.out, options.storage, options.lease, say)
    except AwayError as error:
        raise UserError(str(error)) from None


def _do(plan: Plan, options: argparse.Namespace, board: Queue, workers: int | None, device: Any) -> Counter[str]:
    """Do all trials here or in worker processes; how they ended."""
    count = workers or _as_memory_allows(plan, device)
    cores = (os.cpu_count() or 1) // plan.study.threads
    if device.type == "cpu" and count < min(cores, len(plan.trials)):
        print(f"{count} of {cores} trials that the cores could do at once: see --workers", file=sys.stderr)
    if count == 1:
        _alone(plan, options.out, board, device)
    else:
        _together(plan, options, board, count, device)
    return board.counts()


def _workers(text: str) -> int | None:
    """The number of processes; None for auto."""
    if text == "auto":
        return None
    try:
        return whole_number(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--workers {error}, or auto") from None


def _as_memory_allows(plan: Plan, device: Any) -> int:
    """Trials that fit at once, and on the CPU no more than its cores."""
    import torch

    from dit_in_dit.study.worker import memory

    most = max(memory(arm.config) for arm in plan.arms)
    if device.type == "cuda":
        free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
        return max(1, min(len(plan.trials), sum(amount // most for amount in free)))
    free_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    cores = (os.cpu_count() or 1) // plan.study.threads
    return max(1, min(len(plan.trials), cores, free_bytes // most))


@contextmanager
def _progress(plan: Plan, board: Queue) -> Iterator[Callable[..., None]]:
    """A bar over all training steps; the function shows how far the study is, and of the trial at hand."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    steps = sum(trial.config.train.steps for trial in plan.trials) / len(plan.trials)
    with Progress(*columns, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task("study", total=board.total * steps)

        def show(text: str = "", step: int | None = None, *, line: str = "") -> None:
            if line:
                console.print(line)
                return
            counts = board.counts()
            ended = counts["done"] + counts["failed"] + counts["pruned"]
            running = board.steps() if step is None else step
            bar.update(task, completed=ended * steps + running, description=f"{_said(counts)}  {text}")

        yield show


def _said(counts: Counter[str]) -> str:
    return ", ".join(
        f"{counts[name]} {name}" for name in ("done", "failed", "pruned", "running", "waiting") if counts[name]
    )


def _alone(plan: Plan, out: Path, board: Queue, device: Any) -> None:
    """Do the trials in this process."""
    from dit_in_dit.study.worker import work

    shown = 0.0
    with _progress(plan, board) as show, closing(work(plan, out, board, device)) as events, _terminated():
        for event in events:
            text = (
                f"{event.key} {event.step}/{event.steps}" if event.kind == "training" else f"{event.key} {event.kind}"
            )
            if event.kind in ("done", "failed", "pruned", "lost"):
                show(line=f"{event.key}: {event.kind}{f', {event.text}' if event.text else ''}")
            elif event.text == "continued":
                show(line=f"{event.key}: continued from step {event.step}")
            if event.kind != "training" or time.monotonic() - shown > 1:  # counting asks the storage
                show(f"{text} {event.text}", event.step if event.kind == "training" else None)
                shown = time.monotonic()
        show()


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does: the trial is given back at once."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _together(plan: Plan, options: argparse.Namespace, board: Queue, count: int, device: Any) -> None:
    """Start workers and look on until they have done all."""
    import torch

    logs = options.out / "workers"
    logs.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "dit_in_dit", "study", "work", str(options.out), "--lease", str(options.lease)]
    command += plugins.arguments()
    environment = {**os.environ, **({STORAGE: options.storage} if options.storage else {})}
    workers: list[subprocess.Popen[bytes]] = []
    for number in range(count):
        spread = device.type == "cuda" and device.index is None
        name = f"cuda:{number % torch.cuda.device_count()}" if spread else str(device)
        with (logs / f"{number}.log").open("ab") as log:
            workers.append(subprocess.Popen([*command, "--device", name], stdout=log, stderr=log, env=environment))
    gone: set[int] = set()
    try:
        with _progress(plan, board) as show, _terminated():
            while not board.finished():
                show(f"{len(workers) - len(gone)} workers")
                for number, worker in enumerate(workers):
                    if worker.poll() is not None and number not in gone and not board.finished():
                        gone.add(number)
                        show(line=f"worker {number} ended with {worker.returncode}: see {logs / f'{number}.log'}")
                if len(gone) == len(workers) and not board.finished():
                    raise UserError(f"all workers have ended, see {logs}; run the same command to go on")
                time.sleep(1)
            show()
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            try:
                worker.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.kill()


def _work(options: argparse.Namespace) -> None:
    from dit_in_dit.runtime.device import pick_device
    from dit_in_dit.study.plan import read_plan

    plan, device = read_plan(options.out), pick_device(options.device)
    with _board(plan, options) as board:
        _alone(plan, options.out, board, device)


def _status(options: argparse.Namespace) -> None:
    from dit_in_dit.study.plan import read_plan

    plan = read_plan(options.out)
    with _board(plan, options) as board:
        counts, trials = board.counts(), board.keys()
    print(f"{plan.name}: {_said(counts)}, of {board.total}")
    steps = {key: trial.user_attrs.get("beat", [0, 0])[1] for key, trial in trials.items()}
    print_table([], [[key, trials[key].state.name.lower(), f"step {steps[key]}"] for key in sorted(trials)])


def _report(options: argparse.Namespace) -> None:
    from dit_in_dit.study.report import report

    made = report(options.out)
    for sentence in made.summary:
        print(sentence)
    print()
    for path, what in made.files:
        print(f"{path}  {what}")
