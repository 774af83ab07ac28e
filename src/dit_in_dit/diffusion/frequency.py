"""DeCo's frequency loss (Ma et al. 2025): errors of 8x8 DCT coefficients, weighted by JPEG's quantization tables."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from dit_in_dit.diffusion.path import on_device

# Tables K.1 and K.2 of ITU-T T.81 (JPEG); all further steps of K.2 are 99.
LUMINANCE = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
CHROMINANCE = "17 18 24 47 18 21 26 66 24 26 56 99 47 66 99 99"
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # from red, green, blue


def frequency_matrix(quality: int = 85) -> Tensor:
    """The map (192, 192) from an 8x8 block (channel, row, column) to the coefficients of Y, Cb and Cr, each times the
    square root of its weight: the inverse quantization step at a JPEG quality of 50 to 100, divided by the mean."""
    tables = torch.full((2, 8, 8), 99, dtype=torch.float64)
    tables[0] = torch.tensor([*map(float, LUMINANCE.split())]).view(8, 8)
    tables[1, :4, :4] = torch.tensor([*map(float, CHROMINANCE.split())]).view(4, 4)
    weights = 1 / ((tables * (200 - 2 * quality) + 50) / 100).floor().clamp(1, 255)
    weights = (weights / weights.mean((1, 2), keepdim=True))[[0, 1, 1]]
    k = torch.arange(8, dtype=torch.float64)
    dct = torch.cos(math.pi / 16 * (2 * k + 1) * k[:, None]) / 2
    dct[0] /= math.sqrt(2)
    return weights.sqrt().view(-1, 1) * torch.kron(torch.tensor(YCBCR).double(), torch.kron(dct, dct))


_matrix = on_device(lambda: frequency_matrix().float())


def frequency_error(error: Tensor) -> Tensor:
    """Mean square (N,) of the weighted coefficients of an error (N, 3, H, W) in RGB; H and W are multiples of 8."""
    blocks = rearrange(error, "n c (h p) (w q) -> n (h w) (c p q)", p=8, q=8)
    with torch.autocast(error.device.type, enabled=False):
        return (blocks @ _matrix(error.device).to(error.dtype).T).square().flatten(1).mean(1)
