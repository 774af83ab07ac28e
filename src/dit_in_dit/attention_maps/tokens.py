"""Token layout of a level: which tokens one attention call sees together, and where they lie in the image.

A token is a sub-patch at the inner level and a patch at the outer one. Letters: T patches, S sub-patches per patch,
L tokens per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from dit_in_dit.config.run import ModelConfig
from dit_in_dit.model.mixers import PatchMixer


@dataclass(frozen=True)
class Tokens:
    """The groups within which the tokens of one level attend to each other.

    Attributes:
        grid: tokens down and across the image.
        per_patch: tokens per patch: S at the inner level, 1 at the outer one.
        places: token numbers of each group, (groups, L). Tokens are numbered row by row over the image. Tokens of one
            patch are adjacent in a group.
        patches: patch numbers of each group, (groups, L / per_patch).
    """

    grid: tuple[int, int]
    per_patch: int
    places: NDArray[np.int64]
    patches: NDArray[np.int64]

    @property
    def length(self) -> int:
        """L, the number of tokens that one token attends to, itself included."""
        return self.places.shape[1]

    def distances(self, rows: slice) -> Tensor:
        """Distances (rows, L), in tokens, from the tokens `rows` of a group to all tokens of the group.

        The distances are the same in every group.
        """
        y, x = (torch.from_numpy(part).float() for part in np.divmod(self.places[0], self.grid[1]))
        return torch.hypot(y[rows, None] - y, x[rows, None] - x)

    @property
    def even_distance(self) -> float:
        """Mean distance under uniform attention, in tokens."""
        return float(np.mean([self.distances(slice(i, i + 1)).mean() for i in range(self.length)]))


def outer_tokens(model: ModelConfig) -> Tokens:
    """Layout of the outer level: every patch attends to every patch."""
    numbers = np.arange(model.patches)[None]
    return Tokens(model.grid, 1, numbers, numbers)


def inner_tokens(model: ModelConfig, mixer: PatchMixer) -> Tokens:
    """Layout of the inner level, with the groups that the mixer forms."""
    (h, w), i = model.grid, model.sub_grid
    numbers = rearrange(torch.arange(h * i * w * i), "(h i w j) -> 1 (h w) (i j) 1", h=h, i=i, w=w, j=i)
    patches = torch.arange(h * w)[None, :, None, None].expand(-1, -1, i * i, -1)
    places, owners = (mixer.group(x)[..., 0].numpy() for x in (numbers, patches))
    return Tokens((h * i, w * i), i * i, places, owners[:, :: i * i])
