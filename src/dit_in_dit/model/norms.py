"""Norms of tokens over the width. Each norm is a class in a table; adaLN applies scale and shift afterwards."""

from __future__ import annotations

from abc import ABC

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # as in every norm of DiT


class Norm(nn.Module, ABC):
    """Norm over the last axis, (..., D) -> (..., D); constructed by `cls(width, eps)`."""

    def __init__(self, width: int, eps: float = EPS) -> None:
        super().__init__()
        self.eps = eps


class LayerNorm(Norm):
    """Zero mean and unit variance, without parameters (DiT)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


class AffineLayerNorm(Norm):
    """Zero mean and unit variance, then a learned weight and bias per channel (Ba et al. 2016; DeCo's inner blocks)."""

    def __init__(self, width: int, eps: float = EPS) -> None:
        super().__init__(width, eps)
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RmsNorm(Norm):
    """Unit root mean square, with a learned weight per channel (Zhang & Sennrich 2019; JiT, LightningDiT, DDT)."""

    def __init__(self, width: int, eps: float = EPS) -> None:
        super().__init__(width, eps)
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


NORMS: dict[str, type[Norm]] = {"layer": LayerNorm, "layer_affine": AffineLayerNorm, "rms": RmsNorm}
