"""Held-out denoising error of a model, shared by the processes of a run."""

from __future__ import annotations

import torch

from dit_in_dit.diffusion.objective import EVALUATION_TIMES, Objective
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.training.batches import Batch
from dit_in_dit.training.distributed import Process

HELD_OUT_IMAGES = 512  # most images in a held-out evaluation
HELD_OUT_BATCH = 64  # most images in a forward pass of this evaluation, whatever the number of processes


@torch.no_grad()
def denoising_errors(
    objective: Objective, model: NestedDiT, held_out: Batch, most: int, device: torch.device, world: Process
) -> dict[str, dict[str, float]]:
    """Held-out denoising error by time: whole image and high frequencies.

    Batches of at most `most` images are divided among the processes. The sums do not depend on the number of processes.
    """
    errors = {}
    x, noise, _, y, *_ = held_out
    batch = min(most, HELD_OUT_BATCH)
    starts = range(0, len(x), batch)
    # The same number of forward passes in each process, because all take part in each pass of a sharded model.
    turns = range(-(-len(starts) // world.size))
    own_starts = [starts[(turn * world.size + world.rank) % len(starts)] for turn in turns]
    for t in EVALUATION_TIMES:
        sums = []
        for start in own_starts:
            part = slice(start, start + batch)
            images, noises, labels = (v[part].to(device) for v in (x, noise, y))
            both = objective.denoising_error(model, images, noises, t, labels)
            sums.append(torch.stack(both).cpu().double().sum(1))  # on the CPU: not every device has float64
        every = world.gather(torch.stack(sums)).transpose(0, 1).flatten(0, 1)
        total = torch.zeros(2, dtype=torch.float64)
        for sum_ in every[: len(starts)]:
            total += sum_
        errors[str(t)] = dict(zip(("whole", "high"), (total / len(x)).tolist(), strict=True))
    return errors
