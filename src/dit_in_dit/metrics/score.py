"""A score of images against real ones, with its interval and its floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.runtime.seeding import generator

Float64Array = NDArray[np.float64]

FLOOR_SPLITS = 64  # the floor is the mean over this many random halvings of the reference
RESAMPLES = 100  # of the bootstrap
DRAWS = {
    "halves": 0,
    "resamples": 1,
    "projections": 2,
    "order": 3,
    "subsets": 4,
    "classifier": 5,
}  # streams of the purpose "evaluation"


@dataclass(frozen=True)
class Score:
    """A number, its 95% interval, and its floor, the score of real images against real images. None: unknown."""

    value: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None


@dataclass(frozen=True)
class ReferenceHalves:
    """Positions of disjoint halves of the reference, `first` and `second` each (FLOOR_SPLITS, M)."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]

    @classmethod
    def of(cls, count: int) -> ReferenceHalves:
        """Random halves of `count` images; an odd image is left out."""
        draw, half = generator(0, "evaluation", DRAWS["halves"]), count // 2
        orders = np.stack([draw.permutation(count) for _ in range(FLOOR_SPLITS)])
        return cls(orders[:, :half], orders[:, half : 2 * half])


def bootstrap_weights(count: int) -> Iterator[tuple[Float64Array, Float64Array]]:
    """Pairs of bootstrap weights, for the images and for the reference: each (count,), multinomial, of mean one."""
    draw = generator(0, "evaluation", DRAWS["resamples"])
    even = np.full(count, 1 / count)
    for _ in range(RESAMPLES):
        yield draw.multinomial(count, even).astype(float), draw.multinomial(count, even).astype(float)


def summary_score(count: int, summary: Callable[[NDArray[np.int64]], float], floor: float) -> Score:
    """A summary of `count` images, a function of the numbers of some of them, with its bootstrap interval."""
    draw = generator(0, "evaluation", DRAWS["resamples"])
    resampled = [summary(draw.integers(count, size=count)) for _ in range(RESAMPLES)]
    return bootstrap_score(summary(np.arange(count)), resampled, [floor])


def bootstrap_score(value: float, resampled: list[float], floors: list[float]) -> Score:
    """A distance with the interval value +- 1.96 bootstrap deviations.

    Percentiles of resampled distances are not used: resampling adds distance, so that all percentiles exceed the value.
    """
    deviation = float(np.std(resampled, ddof=1))
    return Score(value, value - 1.96 * deviation, value + 1.96 * deviation, float(np.mean(np.abs(floors))))
