"""Routes of patches around outer blocks in training (TREAD, Krause et al. 2025)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Route(NamedTuple):
    """Outer blocks `first` to `last`, both included, see the patches `keep` (N, K), int64, ascending for each image.

    The other patches bypass these blocks: after the last of them in an outer stage, each is what it was before the
    first. Inner stages, aggregation and spread see all patches. Tokens of time and class always stay.
    """

    keep: Tensor
    first: int
    last: int

    def within(self, start: int, count: int) -> range:
        """The blocks of this route, numbered within a stage of `count` blocks that starts with block `start`."""
        return range(max(self.first - start, 0), min(self.last - start + 1, count))

    def places(self, length: int) -> Tensor:
        """Places (N, length) that a short sequence has in the full one; tokens before the patches keep theirs."""
        lead = length - self.keep.shape[1]
        if not lead:
            return self.keep
        return torch.cat([torch.arange(lead, device=self.keep.device).expand(len(self.keep), -1), self.keep + lead], 1)

    def enter(self, x: Tensor, patches: int) -> Tensor:
        """The kept tokens of a full sequence (N, L, D) whose last tokens are the patches."""
        places = self.places(x.shape[1] - patches + self.keep.shape[1])
        return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def leave(self, x: Tensor, before: Tensor, patches: int) -> Tensor:
        """The full sequence from the short one, and the sequence from which it was taken."""
        kept = self.keep.shape[1]
        index = self.keep.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        own = before[:, -patches:].to(x.dtype).scatter(1, index, x[:, -kept:])
        return own if x.shape[1] == kept else torch.cat([x[:, :-kept], own], dim=1)
