"""Rotary positions of attention (Su et al. 2021), over the two axes of the image. Each kind is a class in a table."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_in_dit.config.model import ModelConfig
from dit_in_dit.model.gelu import in_transform

EXTENT = 16.0  # positions of `extent` run from 0 to this number, whatever the number of tokens


class Rope(nn.Module, ABC):
    """Rotation of queries and keys, each (B, heads, L, d), by angles of their places; pairs are channels 2i, 2i + 1.

    `width` is d, a multiple of 4; `places` (T, 2) are row and column of each token in a grid of the image with `sides`
    rows and columns. The first `lead` tokens have no place and are not rotated; L = lead + T.

    `forward` takes the rows (N, L) of the lead + T angles that the tokens have, if they are not all tokens in order.
    """

    def __init__(self, width: int, places: Tensor, sides: tuple[int, int], lead: int = 0) -> None:
        super().__init__()
        steps = torch.arange(width // 4, dtype=torch.float64, device=places.device)
        angles = F.pad(self.angles(places.double(), sides, 10000.0 ** (-4 * steps / width)), (0, 0, lead, 0))
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    @staticmethod
    @abstractmethod
    def angles(places: Tensor, sides: tuple[int, int], frequencies: Tensor) -> Tensor:
        """Angle of each pair of channels, (T, d/2), from places (T, 2) and frequencies (d/4,)."""

    def forward(self, q: Tensor, k: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos, self.sin
        if rows is not None:
            cos, sin = cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)  # N 1 L d/2
        return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels of x (..., L, d) turned by angles with cosines and sines (L, d/2), in the dtype of x.

    On a CPU, a complex product does it in one pass over memory; other devices and compilers lack or do not fuse it.
    """
    eager = not torch.compiler.is_compiling() and not in_transform()
    if eager and x.device.type == "cpu" and x.dtype == cos.dtype and x.dtype in (torch.float32, torch.float64):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # type: ignore[no-untyped-call]
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


class GridRope(Rope):
    """Positions 0, 1, 2 ...; rows turn the first half of the channels, columns the second (JiT, LightningDiT, RAE)."""

    @staticmethod
    def angles(places: Tensor, sides: tuple[int, int], frequencies: Tensor) -> Tensor:
        return (places[:, :, None] * frequencies).flatten(1)


class ExtentRope(Rope):
    """Positions from 0 to 16 over each axis; columns and rows turn pairs in turns (DDT, DeCo, PixNerd, PixelDiT)."""

    @staticmethod
    def angles(places: Tensor, sides: tuple[int, int], frequencies: Tensor) -> Tensor:
        spread = EXTENT / (torch.tensor(sides, dtype=places.dtype, device=places.device) - 1).clamp(min=1)
        column_row = (places * spread).flip(1)
        return (frequencies[:, None] * column_row[:, None]).flatten(1)


ROPES: dict[str, type[Rope] | None] = {"none": None, "grid": GridRope, "extent": ExtentRope}


def patch_rope(kind: str, model: ModelConfig, lead: int = 0) -> Rope | None:
    """Rotary positions of attention among patches, with the heads of the outer level; None for kind none."""
    make, width = ROPES[kind], model.outer.width // model.outer.num_heads
    return make(width, places(*model.grid).flatten(0, 1), model.grid, lead) if make else None


def by_patch(image: Tensor, grid: tuple[int, int], sub_grid: int) -> Tensor:
    """Values per sub-patch grouped by patch, (h*i, w*i, ...) -> (h*w, i*i, ...); `grid` is h, w, and `sub_grid` i."""
    (h, w), i = grid, sub_grid
    # Not einops: its first use imports torch._dynamo, which fails in PyTorch 2.6 while a model is on meta.
    return image.view(h, i, w, i, -1).transpose(1, 2).reshape(h * w, i * i, -1)


def places(rows: int, columns: int) -> Tensor:
    """Row and column of each place of a grid, (rows, columns, 2)."""
    return torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
