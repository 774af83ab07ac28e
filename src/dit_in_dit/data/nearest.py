"""Nearest neighbours of images, compared at a small size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dit_in_dit.reporting.images import Pixels

SIDE = 32  # longest side of an image that is compared, in pixels; larger ones are averaged down
BLOCK = 2**26  # most distances in memory


def thumbnails(images: Pixels) -> Tensor:
    """uint8 (N, H, W, C) as images (N, C, h, w) in [-1, 1], of at most SIDE pixels a side."""
    return shrink(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)


def shrink(images: Tensor) -> Tensor:
    """Images or latents (N, C, H, W) averaged down to at most SIDE pixels a side."""
    factor = max(1, max(images.shape[2:]) / SIDE)
    height, width = (max(1, round(side / factor)) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images, (height, width))


def nearest(queries: Tensor, base: Tensor, *, itself: bool = False) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Distance (N,) and number (N,) of the row of `base` nearest to each query; with `itself`, query i is row i and
    only other rows count."""
    norms = base.square().sum(1)
    rows = max(1, BLOCK // len(base))
    numbers = []
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows]
        squares = norms - 2 * block @ base.T  # less the query's own norm: the same order
        if itself:
            squares[torch.arange(len(block)), torch.arange(start, start + len(block))] = torch.inf
        numbers.append(squares.argmin(1))
    number = torch.cat(numbers)
    # Computed again from the difference: the expanded square loses small distances.
    distances = [(q.double() - base[n].double()).square().mean().sqrt() for q, n in zip(queries, number, strict=True)]
    return torch.stack(distances).numpy(), number.numpy()
