"""`average`: averages of other lengths of a run, reconstructed after training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dit_in_dit.cli.options import Commands, number_where
from dit_in_dit.config.averages import LONGEST, SHORTEST

ROUGH = 0.05  # error of the weights over the steps above which the user is warned


def add(commands: Commands) -> None:
    """Add the command."""
    about = "reconstruct averages of other lengths from a run's snapshots (train.ema_lengths), for --ema length=LENGTH"
    average = commands.add("average", _average, about)
    average.add_argument("run_folder", type=Path, metavar="RUN")
    average.add_argument(
        "--length",
        type=number_where(lambda length: SHORTEST <= length <= LONGEST, f"from {SHORTEST} to {LONGEST}"),
        action="append",
        required=True,
        help="standard deviation of the averaged steps, relative to all steps; repeatable",
    )


def _average(options: argparse.Namespace) -> None:
    from dit_in_dit.runs.reconstruction import reconstruct

    for length in options.length:
        made = reconstruct(options.run_folder, length)
        print(
            f"{made.name} at step {made.step} from {made.averages} averages, error {made.error:.2%}: in {made.folder}"
        )
        if made.error > ROUGH:
            way = "keep more snapshots (train.ema_snapshot_every), or choose a length nearer to the tracked ones"
            print(
                f"dit-in-dit: {made.name} is off by {made.error:.0%} of its weights over the steps: {way}",
                file=sys.stderr,
            )
