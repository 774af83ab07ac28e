"""Randomness as a function: what is drawn depends on (seed, purpose, index) and on nothing else."""

from __future__ import annotations

import numpy as np

# The numbers are part of what a seed means: never change one, add the next.
PURPOSES = {
    **{"order": 0, "example": 1, "noise": 2, "sample": 3, "mosaic": 4, "held_out": 5, "evaluation": 6},
    "source": 7,
}


def generator(seed: int, purpose: str, index: int) -> np.random.Generator:
    """A counter-based generator (Philox, Salmon et al. 2011) at the start of the stream of (seed, purpose, index).

    The index is the counter's highest word: streams are 2^192 draws apart and never meet.
    """
    return np.random.Generator(np.random.Philox(key=[seed, PURPOSES[purpose]], counter=[0, 0, 0, index]))
