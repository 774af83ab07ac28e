"""`study report`: the report of a study's folder, finished or not."""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_in_dit.cli.options import Commands


def add(study: Commands) -> None:
    """Add the subcommand."""
    command = study.add("report", print_report, "write report.html, report.md, results.csv and tables to paste")
    command.add_argument("out", type=Path, metavar="DIR", help="the study's folder")


def print_report(options: argparse.Namespace) -> None:
    """Write the report; print its summary and the files."""
    from dit_in_dit.study.report import write_report

    written = write_report(options.out)
    for sentence in written.summary:
        print(sentence)
    print()
    for path, what in written.files:
        print(f"{path}  {what}")
