"""Modulation of a block's branches by the condition. Each kind is a class in a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_in_dit.model.fused import fuses, gate_residual, norm_modulate


class Modulation(nn.Module):
    """adaLN: rows (..., K) -> `count` vectors of the tokens' width, each (..., D); all are zero at first.

    With `places` above 1, a row (N, T, 1, K) gives vectors for each place in its patch, (N, T, places, D).
    """

    def __init__(self, condition: int, width: int, count: int, places: int = 1) -> None:
        super().__init__()
        self.count, self.places = count, places
        self.linear = nn.Linear(condition, places * count * width)

    def initialise(self) -> None:
        """adaLN-Zero: every block starts as the identity."""
        nn.init.zeros_(self.linear.weight)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        vectors = self.linear(F.silu(c))
        if self.places > 1:
            vectors = vectors.unflatten(-1, (self.places, -1)).squeeze(2)
        return vectors.chunk(self.count, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift; each conditioning row is broadcast over its tokens."""
    return torch.addcmul(shift, x, 1 + scale)


class BlockModulation(nn.Module, ABC):
    """Vectors that modulate the branches of a block; constructed by `cls(condition, width, branches, places)`.

    `condition` is the width of a conditioning row, `branches` the number of branches (mixing, MLP), `places` the number
    of places in a patch if each has vectors of its own.
    """

    per_branch: ClassVar[int]  # vectors for a branch

    def __init__(self, condition: int = 0, width: int = 0, branches: int = 0, places: int = 1) -> None:
        super().__init__()
        self.branches = branches

    @classmethod
    def macs(cls, condition: int, width: int, branches: int, places: int = 1) -> int:
        """MACs per conditioning row."""
        return condition * cls.per_branch * branches * width * places

    @abstractmethod
    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """`per_branch` vectors for each branch, from rows (..., K)."""

    @staticmethod
    @abstractmethod
    def branch(x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor], *vectors: Tensor) -> Tensor:
        """x plus a modulated branch, (..., D) -> (..., D)."""


class AdaLNZero(Modulation, BlockModulation):
    """x + gate * branch(norm(x) * (1 + scale) + shift) (Peebles & Xie 2023, figure 3)."""

    per_branch = 3

    def __init__(self, condition: int, width: int, branches: int, places: int = 1) -> None:
        super().__init__(condition, width, self.per_branch * branches, places)

    @staticmethod
    def branch(x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor], *vectors: Tensor) -> Tensor:
        shift, scale, gate = vectors
        if fuses(x, norm, *vectors):
            x, modulated = norm_modulate(x, norm, shift, scale)
            return gate_residual(x, gate, branch(modulated))
        return torch.addcmul(x, gate, branch(modulate(norm(x), shift, scale)))


class PostModulation(AdaLNZero):
    """x + branch(norm(x)) * (1 + scale) + shift, without a gate (PixelDiT with post-modulation)."""

    per_branch = 2

    @staticmethod
    def branch(x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor], *vectors: Tensor) -> Tensor:
        scale, shift = vectors
        return x + modulate(branch(norm(x)), shift, scale)


class SharedModulation(BlockModulation):
    """adaLN-Zero with the vectors of one linear layer for all blocks, which come as the conditioning row (MPDiT)."""

    per_branch = 3
    branch = staticmethod(AdaLNZero.branch)

    @classmethod
    def macs(cls, condition: int, width: int, branches: int, places: int = 1) -> int:
        return 0

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return c.chunk(6, dim=-1)[-self.per_branch * self.branches :]  # a block without mixing: those of the MLP


class NoModulation(BlockModulation):
    """x + branch(norm(x)) (RAEv2's outer blocks)."""

    per_branch = 0

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return ()

    @staticmethod
    def branch(x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor], *vectors: Tensor) -> Tensor:
        return x + branch(norm(x))


class SharedHead(nn.Module):
    """Shift and scale of the head, taken from the vectors of `SharedModulation` for the MLP."""

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return c.chunk(6, dim=-1)[3:5]


MODULATIONS: dict[str, type[BlockModulation]] = {
    "block": AdaLNZero,
    "post": PostModulation,
    "shared": SharedModulation,
    "none": NoModulation,
}
