"""Keys of dropout masks, functions of (seed, example, block)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_in_dit.runtime.philox import MASK, WORD, philox
from dit_in_dit.runtime.seeding import PURPOSES


def dropout_keys(seed: int, examples: Tensor, blocks: int) -> Tensor:
    """Random words (N, blocks, 4), int32, from example numbers (N,), int64: two for each of a block's two branches."""
    use = torch.full((), PURPOSES["dropout"], device=examples.device)
    block, example = torch.arange(blocks, device=examples.device), examples.unsqueeze(1)
    words = philox((block, use, example & MASK, example >> WORD), (seed & MASK, seed >> WORD))
    return torch.stack(words, -1).to(torch.int32)
