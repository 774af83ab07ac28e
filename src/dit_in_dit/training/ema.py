"""Averages of the weights: exponential moving averages (EMA), and power-function averages of EDM2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dit_in_dit.config.training import TrainConfig
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.averages import AVERAGE_PREFIX
from dit_in_dit.runs.power_function import length_exponent, power_decay
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


class Averages:
    """The averages that a run keeps beside `Ema`: of further decays, and of relative lengths (Karras et al. 2024,
    section 3). They are tensors without a model."""

    def __init__(self, model: nn.Module, train: TrainConfig) -> None:
        """The averages of a model that is sharded already, if it is to be sharded: each process copies its part."""
        self.decays: list[Callable[[int], float]] = [partial(ema_decay, most=decay) for decay in train.decays[1:]]
        self.decays += [partial(power_decay, power=length_exponent(length)) for length in train.ema_lengths or ()]
        weights = dict(model.named_parameters(remove_duplicate=False))
        copies = [{name: each.detach().clone() for name, each in weights.items()} for _ in self.decays]
        self.weights = dict(zip(train.further_averages, copies, strict=True))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move each average towards the weights after step `step`, as `Ema.update`."""
        trained = [local_part(weight) for _, weight in model.named_parameters(remove_duplicate=False)]
        for decay, weights in zip(self.decays, self.weights.values(), strict=True):
            torch._foreach_lerp_([local_part(weight) for weight in weights.values()], trained, 1 - decay(step))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all averages, by their names in a checkpoint's state."""
        return {
            f"{AVERAGE_PREFIX}{average}/{name}": weight
            for average, weights in self.weights.items()
            for name, weight in weights.items()
        }
