"""Norms of tokens over their width, each a class in a table; adaLN brings scale and shift after them."""

from __future__ import annotations

from abc import ABC

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # DiT's, in every norm


class Norm(nn.Module, ABC):
    """Norm over the last axis, (..., D) -> (..., D); made by `cls(width, eps)`."""

    def __init__(self, width: int, eps: float = EPS) -> None:
        super().__init__()
        self.eps = eps


class LayerNorm(Norm):
    """Zero mean and unit variance, without parameters (DiT)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


class RmsNorm(Norm):
    """Unit root mean square, with a learned weight per channel (Zhang & Sennrich 2019; JiT, LightningDiT, DDT)."""

    def __init__(self, width: int, eps: float = EPS) -> None:
        super().__init__(width, eps)
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


NORMS: dict[str, type[Norm]] = {"layer": LayerNorm, "rms": RmsNorm}
