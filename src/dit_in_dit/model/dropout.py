"""Dropout of block branches in training, with masks that are functions of keys: two words for each example and branch.

A mask does not depend on the step's other examples: it is the same in any number of processes, in a resumed run, when
activations are recomputed, and on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

PIECE = 2**16  # hashes at a time on a CPU: those that stay in a core's cache
Branch = Callable[[Tensor], Tensor]


def drop(x: Tensor, keys: Tensor, rate: float) -> Tensor:
    """x (N, ...) with each element zeroed with probability `rate`, to 1/65536, and the others divided by 1 - rate.

    keys: (N, 2), int32. The hashes of the first half of the numbers decide two elements each, with 16 bits for each.
    """
    limit, size = round(rate * 2**16), math.prod(x.shape[1:])
    numbers = torch.arange(-(-size // 2), dtype=torch.int32, device=x.device)
    in_pieces = x.device.type == "cpu" and not torch.compiler.is_compiling()
    pieces = torch.split(keys, max(1, PIECE // len(numbers))) if in_pieces else [keys]
    dropped = torch.cat([_below(limit, numbers, piece) for piece in pieces])
    return x.masked_fill(dropped[:, :size].view(x.shape), 0) * (2**16 / (2**16 - limit))


def _below(limit: int, numbers: Tensor, keys: Tensor) -> Tensor:
    """Whether 16-bit hashes of the numbers are below a limit, (N, 2 * numbers)."""
    first, second = keys.split(1, dim=1)  # type: ignore[no-untyped-call]
    words = _hash(numbers ^ first) ^ second
    return torch.cat([words & 0xFFFF, (words >> 16) & 0xFFFF], dim=1) < limit


def _hash(word: Tensor) -> Tensor:
    """Wellons' lowbias32, a bijection of 32-bit words whose output bits depend on all input bits. Products wrap; a mask
    after each shift clears the copies of the sign."""
    word = word ^ ((word >> 16) & 0xFFFF)
    word = word * 0x7FEB352D
    word = word ^ ((word >> 15) & 0x1FFFF)
    word = word * (0x846CA68B - 2**32)
    return word ^ ((word >> 16) & 0xFFFF)


def with_dropout(branch: Branch, keys: Tensor, rate: float) -> Branch:
    """The branch, followed by dropout with keys (N, 2)."""
    return partial(_drop_after, branch, keys, rate)


def _drop_after(branch: Branch, keys: Tensor, rate: float, x: Tensor) -> Tensor:
    return drop(branch(x), keys, rate)
