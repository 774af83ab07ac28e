"""Counter-based normal numbers on any device: Philox-4x32-10 (Salmon et al. 2011) and Box-Muller in torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dit_in_dit.runtime.seeding import PURPOSES

WORD, MASK = 32, 2**32 - 1
ROUNDS = 10
MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)  # of the published generator
CHUNK = {"cpu": 2**15}  # most blocks of four numbers at a time: those that stay in a core's cache
LARGE_CHUNK = 2**22  # on a GPU: 32 MB for each of a few temporary tensors


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words of Philox-4x32-10, a bijection of the counter for each key.

    Args:
        counter: four int64 tensors that broadcast, values below 2^32; the first is the lowest word.
        key: two numbers below 2^32.

    Returns:
        Four int64 tensors of values below 2^32, equal to the last bit on every device.
    """
    a, b, c, d = counter
    for turn in range(ROUNDS):
        first, second = ((word + turn * step) & MASK for word, step in zip(key, WEYL, strict=True))
        # An int64 product wraps modulo 2^64, so that all of its bits are those of the unsigned product. Its high word
        # is masked because the shift copies the sign; the low word stays unmasked until the end.
        p, q = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = ((q >> WORD) ^ b ^ first) & MASK, q, ((p >> WORD) ^ d ^ second) & MASK, p
    return a, b & MASK, c, d & MASK


def box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two normal numbers in float32 for each pair of words below 2^32; their absolute value is at most 6.77."""
    r = ((radius.float() + 0.5) * 2.0**-WORD).log_().mul_(-2).sqrt_()
    turn = angle.float() * (math.tau * 2.0**-WORD)
    return r * turn.cos(), r * turn.sin()


def normal(seed: int, purpose: str, examples: Tensor, shape: Sequence[int]) -> Tensor:
    """Normal noise (N, *shape), float32, on the device of the example numbers (N,), int64.

    Element e of an example is a function of (seed, purpose, example, e): number e % 4 of block e // 4. The counter
    holds block, purpose and the two words of the example's number; the key holds the seed. The words are equal on
    every device. The normal numbers differ by the device's rounding of log, cos and sin.
    """
    size = math.prod(shape)
    noises = []
    for a, b, c, d in _chunks(seed, purpose, examples, size):
        noises.append(torch.stack((*box_muller(a, b), *box_muller(c, d)), -1).flatten(1).narrow(1, 0, size))
    return torch.cat(noises).reshape(-1, *shape)


def words(seed: int, purpose: str, examples: Tensor, size: int) -> Tensor:
    """Random words (N, size), int64 below 2^32, on the device of the example numbers (N,), equal on every device.

    They are the words from which `normal` computes."""
    parts = _chunks(seed, purpose, examples, size)
    return torch.cat([torch.stack(part, -1).flatten(1).narrow(1, 0, size) for part in parts])


def _chunks(seed: int, purpose: str, examples: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The words of blocks of four elements, each (n, size / 4), for some examples at a time."""
    blocks = torch.arange(-(-size // 4), device=examples.device)
    use = torch.full((), PURPOSES[purpose], device=examples.device)
    rows = max(1, CHUNK.get(examples.device.type, LARGE_CHUNK) // len(blocks))
    for some in torch.split(examples.unsqueeze(1), rows):
        yield philox((blocks, use, some & MASK, some >> WORD), (seed & MASK, seed >> WORD))


def uniform(seed: int, purpose: str, examples: Tensor) -> Tensor:
    """A number in [0, 1) for each of the example numbers (N,), float32, equal to the last bit on every device."""
    return (words(seed, purpose, examples, 1)[:, 0] >> 8).float() * 2.0**-24
