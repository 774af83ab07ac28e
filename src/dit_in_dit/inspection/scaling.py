"""Memory, traffic and checkpoints of data-parallel training on many GPUs, in closed form. Nothing of it was measured.

With DDP every GPU holds all state. With FSDP the GPUs of a sharded copy divide it; with train.shard below the number of
GPUs there are several copies (HSDP), and gradients are summed within a copy, then between copies.
"""

from __future__ import annotations

from dataclasses import dataclass

from dit_in_dit.config.model import ModelConfig
from dit_in_dit.inspection.cost import parameters

# Bytes per parameter: weight, gradient, two moments and average in float32; DDP also has autocast's copy in bfloat16.
SHARDED_BYTES, WHOLE_BYTES = 20, 22
SAVED_BYTES = 16  # weight, two moments and average
# Assumptions, bytes per second of a GPU in one direction: NVLink of an H100, a 400 Gb/s port for each GPU, and the
# writes of one process.
NVLINK, NETWORK, DISK = 450e9, 50e9, 1e9


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model: all, in blocks, in its largest block."""

    total: int
    blocks: int
    largest: int


def sizes(model: ModelConfig) -> Sizes:
    """Parameters of a model, counted."""
    parts = parameters(model)
    levels = {level: parts.get(f"{level}_blocks", 0) for level in ("outer", "inner")}
    largest = max(number // max(1, model.blocks(level)) for level, number in levels.items())
    return Sizes(parts["total"], sum(levels.values()), largest)


def state_bytes(size: Sizes, shard: int, accumulate: int, extra: float = 0.0) -> float:
    """Bytes of a GPU without activations; at most. `shard` GPUs hold a copy; 0: DDP. `extra`: bytes per
    parameter beside those of AdamW and one average.

    With FSDP, whole at one time are all that is in no block (weights and gradients), two blocks (the next one is
    gathered while one computes), and the gradient of a block before and after its cast. With accumulate above 1 all
    gradients are whole, because they are summed over processes only once in a step.
    """
    if not shard:
        return (WHOLE_BYTES + extra) * size.total
    whole = 8 * (size.total - size.blocks) + 16 * size.largest + (4 * size.total if accumulate > 1 else 0)
    return (SHARDED_BYTES + extra) * size.total / shard + whole


def traffic(size: Sizes, gpus: int, per_node: int, shard: int, accumulate: int) -> tuple[float, float, float]:
    """Bytes that a GPU sends in a step, over NVLink and over the network, by ring algorithms, and the seconds that both
    take; `shard` as above.

    FSDP gathers blocks twice in a forward and backward pass, in bfloat16 (blocks with learned scales of norms: float32,
    not counted here), all else once in float32, and reduces gradients in float32 once. DDP reduces and gathers float32
    gradients, first within a machine. Between copies or machines, the part of a GPU is summed. A copy over several
    machines is exchanged in rings, of which each port of a machine carries one.
    """
    group = shard or min(gpus, per_node)
    share, copies = (group - 1) / group, gpus // group
    gathers = 4 * size.total * (accumulate if shard else 1)  # twice two bytes, or once four
    inside, outside = share * (gathers + 4 * size.total), 2 * (copies - 1) / copies * 4 * size.total / group
    outside += 0 if group <= per_node else inside / per_node
    return inside, outside, inside / NVLINK + outside / NETWORK
