"""`study`: answer a question with trained arms, from the plan to the report; a file for each part of its commands."""

from __future__ import annotations

from dit_in_dit.cli.options import Commands
from dit_in_dit.cli.study import plan, report, run, work


def add(commands: Commands) -> None:
    """Add the command and its subcommands."""
    study = Commands(commands.add("study", print, "answer a question with arms of equal cost, seeds and intervals"))
    for part in (plan, run, work, report):
        part.add(study)
