"""How well runs estimate held-out images close to pure noise, where sampling begins and training draws few times.

    python scripts/near_noise.py RUN [RUN ...]

For each time: the mean squared error of the image estimate, the part of it that stays in the means of 8x8 blocks, and
the brightness that the estimate has too much (images are in [-1, 1]).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from dit_in_dit.data.run_data import find_source
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.pretrained import find_run
from dit_in_dit.training.batches import held_out_batch
from dit_in_dit.training.held_out import HELD_OUT_BATCH, HELD_OUT_IMAGES

TIMES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)
BLOCK = 8  # pixels


@torch.inference_mode()
def near_noise(run: Path) -> Iterator[tuple[float, float, float, float]]:
    """t, whole error, error of block means, and excess brightness, for each time. Raises UserError."""
    saved = Checkpoint.open(run)
    model, objective = saved.model(torch.device("cpu")), Objective(saved.config.diffusion)
    source, _ = find_source(saved.config, None, None)
    x, noise, _, y, *_ = held_out_batch(source, saved.config.model, HELD_OUT_IMAGES)
    for t in TIMES:
        errors = []
        for part in torch.arange(len(x)).split(HELD_OUT_BATCH):
            times = torch.full((len(part),), t)
            _, estimate = objective.estimate(model, x[part], noise[part], times, y[part])
            errors.append(estimate - x[part])
        error = torch.cat(errors)
        blocks = F.avg_pool2d(error, min(BLOCK, *error.shape[2:]))
        yield t, float(error.square().mean()), float(blocks.square().mean()), float(error.mean())


def main() -> None:
    """Print a line for each run and time."""
    print(f"{'run':<32}{'t':>6}{'error':>9}{'blocks':>9}{'bright':>9}")
    for run in sys.argv[1:]:
        for t, whole, blocks, bright in near_noise(find_run(run)):
            print(f"{Path(run).name:<32}{t:>6}{whole:>9.4f}{blocks:>9.4f}{bright:>+9.3f}", flush=True)


if __name__ == "__main__":
    main()
