"""`doctor`: look for faults in a run, or in a config before it is trained."""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from dit_in_dit.cli.options import Commands, add_config, add_device, chosen_config, make_folder, print_table
from dit_in_dit.config.errors import UserError
from dit_in_dit.runs import atomic
from dit_in_dit.runs.pretrained import find_run

if TYPE_CHECKING:
    from dit_in_dit.doctor.doctor import DoctorReport


def add(commands: Commands) -> None:
    """Add the command."""
    about = "examine a run or a config; exit code 0: healthy, or only warnings; 1: a fault; 2: cannot be examined"
    doctor = commands.add("doctor", _doctor, about)
    doctor.add_argument(
        "run_folder", type=find_run, nargs="?", metavar="RUN", help="a run's folder; without it, name a config:"
    )
    add_config(doctor)
    add_device(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--out", type=Path, metavar="DIR", help="folder for doctor.json and doctor.png")


def _doctor(options: argparse.Namespace) -> None:
    from dit_in_dit.doctor.doctor import draw_report, examine
    from dit_in_dit.runs.folder import read_config
    from dit_in_dit.runtime.device import pick_device

    run: Path | None = options.run_folder
    if run and (options.preset or options.config or options.set):
        raise UserError("RUN has its own config: leave out --preset, --config and --set, or leave out RUN")
    config = read_config(run) if run else chosen_config(options)
    if options.out:
        make_folder(options.out)
    report = examine(config, pick_device(options.device), run)
    if options.json:
        print(report.to_json())
    else:
        _show(report)
    if options.out:
        atomic.write_atomic(options.out / "doctor.json", report.to_json())
        draw_report(report, options.out / "doctor.png")
    if any(finding.severity == "fault" for finding in report.findings):
        sys.exit(1)


def _show(report: DoctorReport) -> None:
    print(f"{report.subject}, step {report.step}")
    for section in report.sections:
        if section.rows:
            print(f"\n{section.title}")
        # Rows with the same columns share a head.
        for heads, rows in groupby(section.rows.items(), key=lambda item: tuple(item[1])):
            print_table(["", *heads], [[name, *(f"{value:.4g}" for value in row.values())] for name, row in rows])
    print("\nfindings" if report.findings else "\nno findings")
    for finding in report.findings:
        print(f"  {finding.severity}: {finding.check}: {finding.seen}\n    -> {finding.advice}")
