"""Exponential moving average (EMA) of the weights."""

from __future__ import annotations

import copy

import torch

from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.training.sharding import local_part


def ema_decay(step: int, most: float) -> float:
    """EMA decay at a step; it ramps up to `most`, so that the average forgets the random start."""
    return min(most, (1 + step) / (10 + step))


class Ema:
    """A copy of the model with averaged weights."""

    def __init__(self, model: NestedDiT, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: NestedDiT, step: int) -> None:
        """Move the average towards the weights after step `step`; each process moves its part of sharded weights."""
        averaged = [local_part(weight) for weight in self.model.parameters()]
        trained = [local_part(weight) for weight in model.parameters()]
        torch._foreach_lerp_(averaged, trained, 1 - ema_decay(step, self.decay))
