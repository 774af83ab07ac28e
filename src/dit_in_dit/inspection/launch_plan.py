"""Launch plan of a run on GPUs: command, memory and time, in closed form and without a GPU.

Memory is counted. Time follows from the MACs and an assumed MFU (the fraction of a GPU's peak that a training step
reaches). Nothing here was measured on a GPU.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dit_in_dit.config.errors import UserError, did_you_mean
from dit_in_dit.config.run import RunConfig
from dit_in_dit.inspection.cost import FORWARDS_PER_STEP, run_macs
from dit_in_dit.inspection.trace import inspect

# name: memory in GB, peak of dense bfloat16 products in TFLOPS; from NVIDIA's data sheets
GPUS = {
    "a100": (80, 312),
    "h100": (80, 989),
    "h200": (141, 989),
    "b200": (180, 2250),
    "l40s": (48, 362),
    "rtx4090": (24, 165),
}
MFU = 0.35  # an assumption
ROOM = 0.9  # fraction of the memory that a plan may use
# Bytes per parameter: weight, gradient, two moments and average in float32, and autocast's copy in bfloat16.
STATE_BYTES = 22
# FLOPs of a training step per MAC of a forward pass; recomputation runs the forward pass twice.
FLOPS_PER_MAC = {"none": 2 * FORWARDS_PER_STEP, "both": 2 * (FORWARDS_PER_STEP + 1)}


@dataclass(frozen=True)
class Recipe:
    """A launch command and its estimates."""

    command: str
    gpus: int
    batch_size: int  # train.batch_size; the examples of a step are those of the preset
    accumulate: int  # train.accumulate
    rows: int  # images in a forward pass of one GPU
    recompute: str  # train.recompute
    memory: float  # upper bound in bytes per GPU, with activations in float32; bfloat16 takes 50 to 100 % of it
    step: float  # seconds per optimizer step
    hours: float  # for all steps
    images: float  # images per second over all GPUs


def recipe(
    preset: str,
    config: RunConfig,
    gpus: int,
    *,
    gpu: str = "h100",
    mfu: float = MFU,
    per_node: int = 8,
    settings: Sequence[str] = (),
) -> Recipe:
    """Plan the launch of a config on `gpus` GPUs. The examples of a step stay the same; only the order of sums changes.

    The plan uses the fewest forward passes per step that fit into memory.

    Args:
        settings: KEY=VALUE assignments by which the config differs from the preset.

    Raises:
        UserError: the GPUs cannot share the batch, or a single image does not fit.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu: unknown GPU {gpu[:40]!r}{did_you_mean(gpu, GPUS)}")
    total = config.global_batch
    if total % gpus:
        raise UserError(f"--gpus must divide the {total} examples of a step: got {gpus}")
    capacity, peak = GPUS[gpu]
    train = config.train
    for recompute in dict.fromkeys((train.recompute, "both")):
        one = _counted(config.model, 1, recompute, token_drop=config.lasting_token_drop)
        macs = one["macs"]["total"]
        if config.token_drop:  # the mean of all steps
            macs = float(run_macs(config, train.steps)) / (FORWARDS_PER_STEP * train.steps * total)
        state = STATE_BYTES * one["parameters"]["total"]
        for accumulate in (n for n in range(1, total + 1) if total % n == 0 and total // n % gpus == 0):
            rows = total // accumulate // gpus
            memory = state + rows * one["activation_bytes"]["total"]
            if memory <= ROOM * capacity * 1e9:
                flops = FLOPS_PER_MAC["none" if recompute == "none" else "both"] * macs * total
                step = flops / (gpus * peak * 1e12 * mfu)
                keys = {"batch_size": total // accumulate, "accumulate": accumulate, "recompute": recompute}
                changed = [f"train.{key}={value}" for key, value in keys.items() if value != getattr(train, key)]
                return Recipe(
                    _command(preset, [*settings, *changed], gpus, per_node),
                    *(gpus, total // accumulate, accumulate, rows, recompute, memory),
                    *(step, step * train.steps / 3600, total / step),
                )
    raise UserError(
        f"one image of {preset} and the model's state do not fit into {capacity} GB (--gpu {gpu}): "
        "choose a GPU with more memory"
    )


_counted = lru_cache(maxsize=16)(inspect)


def _command(preset: str, settings: Sequence[str], gpus: int, per_node: int) -> str:
    options = [f"--set {shlex.quote(setting)}" for setting in settings]
    train = " ".join(["train --preset", preset, *options, f"--out runs/{preset}"])
    if gpus == 1:
        return f"dit-in-dit {train}"
    if gpus <= per_node:
        return f"torchrun --standalone --nproc-per-node {gpus} -m dit_in_dit {train}"
    nodes = math.ceil(gpus / per_node)
    if gpus % per_node:
        raise UserError(f"--gpus over several machines must be a multiple of {per_node} (--per-node): got {gpus}")
    endpoint = "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1):29500"
    launch = f"torchrun --nnodes {nodes} --nproc-per-node {per_node} --rdzv-backend c10d --rdzv-endpoint {endpoint}"
    slurm = f"sbatch --nodes {nodes} --ntasks-per-node 1 --gpus-per-node {per_node} --exclusive"
    return f"{slurm} --wrap {shlex.quote(f'srun {launch} -m dit_in_dit {train}')}"
