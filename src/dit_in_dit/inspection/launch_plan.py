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
from typing import Any

from dit_in_dit.config.errors import UserError, did_you_mean
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.inspection.cost import FORWARDS_PER_STEP, macs, run_macs
from dit_in_dit.inspection.gpus import GPUS
from dit_in_dit.inspection.optimizer_cost import moments_per_weight, step_macs
from dit_in_dit.inspection.scaling import DISK, SAVED_BYTES, sizes, state_bytes, traffic
from dit_in_dit.inspection.trace import inspect

MFU = 0.35  # an assumption
ROOM = 0.9  # fraction of the memory that a plan may use
# FLOPs of a training step per MAC of a forward pass; recomputation runs the forward pass twice, or all but its MACs.
FLOPS_PER_MAC = {"none": 2 * FORWARDS_PER_STEP, "both": 2 * (FORWARDS_PER_STEP + 1)}
FLOPS_PER_MAC["selective"] = FLOPS_PER_MAC["none"]


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
    shard: int  # GPUs that hold one sharded copy; 0: every GPU holds all (DDP)
    state: float  # bytes of the memory that are no activations
    inside: float  # bytes that a GPU sends in a step over NVLink
    outside: float  # bytes that a GPU sends in a step over the network
    links: float  # seconds that both take; at most all of it runs beside the computation
    checkpoint: float  # bytes
    save: float  # seconds for the write of a checkpoint
    sky: str  # launch command of SkyPilot


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

    The plan uses the fewest forward passes per step that fit into memory, and over several machines one sharded copy in
    each (HSDP), unless the config sums gradients in a fixed order or `settings` name train.parallel.

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
    (capacity, peak), train, size = GPUS[gpu], config.train, sizes(config.model)
    extra, (layout, copy) = _extra_bytes(config), _layout(train, gpus, per_node, settings)
    for recompute in dict.fromkeys((train.recompute, "selective", "both")):
        one = _counted(config.model, 1, recompute, token_drop=config.lasting_token_drop)
        for accumulate in (n for n in range(1, total + 1) if total % n == 0 and total // n % gpus == 0):
            rows = total // accumulate // gpus
            state = state_bytes(size, copy, accumulate, extra)
            memory = state + rows * one["activation_bytes"]["total"]
            if memory <= ROOM * capacity * 1e9:
                flops = FLOPS_PER_MAC.get(recompute, FLOPS_PER_MAC["both"]) * _mean_macs(config) * total
                flops += 2 * gpus * step_macs(config.model, train.optimizer)  # every GPU orthogonalises all matrices
                step = flops / (gpus * peak * 1e12 * mfu)
                keys = {"batch_size": total // accumulate, "accumulate": accumulate, "recompute": recompute, **layout}
                changed = [f"train.{key}={value}" for key, value in keys.items() if value != getattr(train, key)]
                return Recipe(
                    _command(preset, [*settings, *changed], gpus, per_node),
                    *(gpus, total // accumulate, accumulate, rows, recompute, memory),
                    *(step, step * train.steps / 3600, total / step, copy, state),
                    *traffic(size, gpus, per_node, copy, accumulate),
                    *_saving(size.total, extra),
                    _sky(preset, [*settings, *changed], gpus, per_node, gpu),
                )
    raise UserError(f"one image of {preset} and the state exceed {capacity} GB (--gpu {gpu}): choose a larger GPU")


_counted = lru_cache(maxsize=16)(inspect)


def _mean_macs(config: RunConfig) -> float:
    """MACs of a forward pass per image, the mean of the run's steps."""
    if not config.token_drop:
        return float(macs(config.model)["total"])
    return float(run_macs(config, config.train.steps)) / (FORWARDS_PER_STEP * config.train.steps * config.global_batch)


def _extra_bytes(config: RunConfig) -> float:
    """Bytes per parameter beside the two moments of AdamW and the first average."""
    train = config.train
    return 4 * (moments_per_weight(config.model, train.optimizer) - 2 + len(train.further_averages))


def _saving(parameters: int, extra: float) -> tuple[float, float]:
    """Bytes of a checkpoint, and seconds to write it."""
    saved = (SAVED_BYTES + extra) * parameters
    return saved, saved / DISK


def _layout(train: TrainConfig, gpus: int, per_node: int, settings: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Values of train.parallel and train.shard; GPUs that hold a sharded copy, 0 with DDP."""
    chosen = train.reduction == "fixed" or any(setting.startswith("train.parallel") for setting in settings)
    parallel, shard = (train.parallel, train.shard) if chosen or gpus <= per_node else ("fsdp", per_node)
    return {"parallel": parallel, "shard": shard}, (shard or gpus) if parallel == "fsdp" and gpus > 1 else 0


def _train(preset: str, settings: Sequence[str]) -> str:
    options = [f"--set {shlex.quote(setting)}" for setting in settings]
    return " ".join(["train --preset", preset, *options, f"--out runs/{preset}"])


def _sky(preset: str, settings: Sequence[str], gpus: int, per_node: int, gpu: str) -> str:
    """SkyPilot's command; it starts the same line on every machine, with its variables SKYPILOT_*."""
    nodes, name = math.ceil(gpus / per_node), {"a100": "A100-80GB"}.get(gpu, gpu.upper())
    launch = "torchrun --nnodes $SKYPILOT_NUM_NODES --nproc-per-node $SKYPILOT_NUM_GPUS_PER_NODE"
    launch += ' --node-rank $SKYPILOT_NODE_RANK --master-addr $(echo "$SKYPILOT_NODE_IPS" | head -n 1)'
    run = f"{launch} --master-port 29500 -m dit_in_dit {_train(preset, settings)}"
    return f"sky launch --gpus {name}:{min(gpus, per_node)} --num-nodes {nodes} --workdir . {shlex.quote(run)}"


def _command(preset: str, settings: Sequence[str], gpus: int, per_node: int) -> str:
    train = _train(preset, settings)
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
