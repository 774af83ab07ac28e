"""`study run`: plan, train and measure every trial, here or in worker processes, and report."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dit_in_dit.cli.options import Commands, make_folder, whole_number
from dit_in_dit.cli.study.plan import add_study, plan_named, print_costs
from dit_in_dit.cli.study.report import print_report
from dit_in_dit.cli.study.work import STORAGE, add_storage, exit_on_sigterm, open_queue, study_progress, work_here
from dit_in_dit.config import plugins
from dit_in_dit.config.errors import UserError

if TYPE_CHECKING:
    import torch

    from dit_in_dit.study.plan import Plan
    from dit_in_dit.study.queue import Queue

PATIENCE = 10.0  # seconds within which workers must give their trials back


def add(study: Commands) -> None:
    """Add the subcommand."""
    about = "train and measure every arm with every seed, then report; run the command again to resume"
    command = study.add("run", _run, about)
    add_study(command)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the study's folder")
    command.add_argument("--workers", default="1", help="processes on this machine; auto: as many as memory allows")
    about = "folder with plan.json and results.csv of this study, whose finished trials are not trained again"
    command.add_argument("--from", dest="earlier", type=Path, metavar="DIR", help=about)
    add_storage(command)


def _run(options: argparse.Namespace) -> None:
    from dit_in_dit.runtime.device import pick_device
    from dit_in_dit.study.plan import read_study_config
    from dit_in_dit.study.planning import open_plan

    study, device = read_study_config(options.study, options.set), pick_device(options.device)
    workers = _workers(options.workers)
    make_folder(options.out)
    if options.earlier:
        from dit_in_dit.study.exports import take_trials

        print(f"trials taken from {options.earlier}: {take_trials(options.earlier, options.out)}")
    plan = open_plan(options.out, lambda: plan_named(options, study, device), study)
    print_costs(plan)
    sys.stdout.flush()  # the table comes before the progress, also when stdout is a file
    with open_queue(plan, options) as queue:
        count = workers or _as_memory_allows(plan, device)
        cores = (os.cpu_count() or 1) // plan.study.threads
        if device.type == "cpu" and count < min(cores, len(plan.trials)):
            print(f"{count} of {cores} trials that the cores could run at once: see --workers", file=sys.stderr)
        if count == 1:
            work_here(plan, options.out, queue, device)
        else:
            _work_in_processes(plan, options, queue, count, device)
        failed = queue.counts()["failed"]
    print_report(options)
    if failed:
        sys.exit(1)


def _workers(text: str) -> int | None:
    """The number of processes; None for auto."""
    if text == "auto":
        return None
    try:
        return whole_number(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--workers {error}, or auto") from None


def _as_memory_allows(plan: Plan, device: torch.device) -> int:
    """The number of trials that fit into memory together; on the CPU, at most one for every `threads` cores."""
    import torch

    from dit_in_dit.study.worker import trial_bytes

    largest = max(trial_bytes(arm.config) for arm in plan.arms)
    if device.type == "cuda":
        free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
        return max(1, min(len(plan.trials), sum(amount // largest for amount in free)))
    free_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    cores = (os.cpu_count() or 1) // plan.study.threads
    return max(1, min(len(plan.trials), cores, free_bytes // largest))


def _work_in_processes(plan: Plan, options: argparse.Namespace, queue: Queue, count: int, device: torch.device) -> None:
    """Start `count` workers and watch them until every trial has ended.

    Raises:
        UserError: all workers ended before the trials did.
    """
    logs = options.out / "workers"
    logs.mkdir(exist_ok=True)
    workers = _start_workers(options, logs, count, device)
    exited: set[int] = set()
    try:
        with study_progress(plan, queue) as show, exit_on_sigterm():
            while not queue.finished():
                show(f"{len(workers) - len(exited)} workers")
                for number, worker in enumerate(workers):
                    if worker.poll() is not None and number not in exited and not queue.finished():
                        exited.add(number)
                        show(line=f"worker {number} ended with {worker.returncode}: see {logs / f'{number}.log'}")
                if len(exited) == len(workers) and not queue.finished():
                    raise UserError(f"all workers have ended, see {logs}; run the same command to resume")
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


def _start_workers(
    options: argparse.Namespace, logs: Path, count: int, device: torch.device
) -> list[subprocess.Popen[bytes]]:
    """Start `count` processes of `study work`, spread over the CUDA devices unless --device names a device."""
    import torch

    command = [sys.executable, "-m", "dit_in_dit", "study", "work", str(options.out), "--lease", str(options.lease)]
    command += plugins.plugin_arguments()
    environment = {**os.environ, **({STORAGE: options.storage} if options.storage else {})}
    workers = []
    for number in range(count):
        take_turns = device.type == "cuda" and device.index is None
        name = f"cuda:{number % torch.cuda.device_count()}" if take_turns else str(device)
        with (logs / f"{number}.log").open("ab") as log:
            workers.append(subprocess.Popen([*command, "--device", name], stdout=log, stderr=log, env=environment))
    return workers
