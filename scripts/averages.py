"""Held-out denoising errors of every average of a run, as CSV.

    python scripts/averages.py RUN [RUN ...] > errors.csv

A run needs train.ema_lengths; lengths that `dit-in-dit average` has reconstructed are measured too.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch

from dit_in_dit.data.run_data import find_source
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.metrics.average_curve import average_length
from dit_in_dit.runs.averages import average_names
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.training.batches import held_out_batch
from dit_in_dit.training.distributed import Process
from dit_in_dit.training.held_out import HELD_OUT_BATCH, HELD_OUT_IMAGES, denoising_errors


def main() -> None:
    """Print a line for each run, average, time and kind of error."""
    device, rows = torch.device("cpu"), csv.writer(sys.stdout)
    rows.writerow(["run", "average", "length", "t", "kind", "error"])
    for run in map(Path, sys.argv[1:]):
        saved = Checkpoint.open(run)
        config = saved.config
        source, _ = find_source(config, None, None)
        held_out, objective = held_out_batch(source, config.model, HELD_OUT_IMAGES), Objective(config.diffusion)
        first = str(config.train.decays[0])
        for name in (first, *average_names(saved.state())):
            model = saved.model(device, averaged=name if name != first else True)
            errors = denoising_errors(objective, model, held_out, HELD_OUT_BATCH, device, Process())
            for t, kinds in errors.items():
                for kind, error in kinds.items():
                    rows.writerow([run, name, f"{average_length(name, saved.step):.4f}", t, kind, repr(error)])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
