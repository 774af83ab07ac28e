"""Random numbers that depend only on (seed, purpose, index)."""

from __future__ import annotations

import numpy as np

# Never change a number, it is part of the meaning of a seed; for a new purpose add the next.
PURPOSES = {
    **{"order": 0, "example": 1, "noise": 2, "sample": 3, "mosaic": 4, "held_out": 5, "evaluation": 6},
    **{"source": 7, "balance": 8, "dropout": 9, "terms": 10, "token_drop": 11},
}


def generator(seed: int, purpose: str, index: int) -> np.random.Generator:
    """A counter-based generator (Philox, Salmon et al. 2011) at the start of the stream of (seed, purpose, index).

    The index is the highest word of the counter: streams start 2^192 numbers apart and never overlap.
    """
    return np.random.Generator(np.random.Philox(key=[seed, PURPOSES[purpose]], counter=[0, 0, 0, index]))
