"""Cost of the optimizer, which does not grow with the batch: numbers that it keeps, and MACs of Muon's step."""

from __future__ import annotations

import torch

from dit_in_dit.config.model import ModelConfig
from dit_in_dit.model.matrices import block_matrices
from dit_in_dit.model.nested import NestedDiT, part_of

NEWTON_SCHULZ_STEPS = 5


def moments(model: ModelConfig, optimizer: str) -> dict[str, int]:
    """Numbers in the optimizer's moments for each part of the model, and their `total`: two for a trained parameter;
    with Muon, one for an element of a block's matrix. A user's optimizer counts as two."""
    parts: dict[str, int] = {}
    for name, count, tensor in _trained(model):
        number = (1 if count and optimizer == "muon" else 2) * tensor.numel()
        parts[part_of(name)] = parts.get(part_of(name), 0) + number
    return {**parts, "total": sum(parts.values())}


def moments_per_weight(model: ModelConfig, optimizer: str) -> float:
    """Numbers in the optimizer's moments for each trained weight."""
    return moments(model, optimizer)["total"] / moments(model, "adamw")["total"] * 2 if optimizer == "muon" else 2


def step_macs(model: ModelConfig, optimizer: str) -> int:
    """MACs of one optimizer step in matrix products: with Muon, 2 a^2 b + a^3 for each Newton-Schulz iteration of a
    matrix with sides a <= b; 0 for others."""
    total = 0
    for _, count, tensor in _trained(model) if optimizer == "muon" else ():
        if count:
            short, long = sorted((len(tensor) // count, tensor.shape[1]))
            total += NEWTON_SCHULZ_STEPS * count * (2 * short**2 * long + short**3)
    return total


def _trained(model: ModelConfig) -> list[tuple[str, int, torch.Tensor]]:
    """(name, matrices in it, weight) of every trained parameter; the model is built without memory."""
    with torch.device("meta"):
        module = NestedDiT(model)
    counts = block_matrices(module)
    return [(name, counts.get(name, 0), w) for name, w in module.named_parameters() if w.requires_grad]
