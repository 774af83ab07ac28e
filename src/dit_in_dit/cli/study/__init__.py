"""`study`: plan and train the arms that answer a question, and report the results."""

from __future__ import annotations

from dit_in_dit.cli.options import Commands
from dit_in_dit.cli.study import plan, report, run, work


def add(commands: Commands) -> None:
    """Add the command and its subcommands."""
    study = Commands(commands.add("study", print, "compare arms of equal cost over several seeds, with intervals"))
    for part in (plan, run, work, report):
        part.add(study)
