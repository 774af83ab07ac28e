"""Means over seeds and differences between arms, with Student's t intervals.

Seeds are paired: a seed gives the same data order and the same noise in every arm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_in_dit.config.errors import UserError

LEVEL = 0.95
ROUNDING = 1e-12  # relative: values that differ by less are equal up to rounding


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95% interval. One seed has no interval; the mean is NaN if a value is not finite."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """An arm minus the arm it is compared with, over the seeds that both have."""

    seeds: tuple[int, ...]  # the seeds that both arms have
    mean: float  # mean of the differences; NaN if there is no common seed, or if a value is not finite
    scale: float | None  # factor from a difference to percent of the other arm's absolute mean; None if that is 0
    low: float | None = None  # the 95% interval; None for one seed, or if the differences do not vary
    high: float | None = None
    wide_low: float | None = None  # the interval that holds for all comparisons together (Bonferroni)
    wide_high: float | None = None
    p: float | None = None  # two-sided p-value of this single comparison, not corrected
    equal: bool = False  # in every seed, the two arms have equal values
    constant: bool = False  # the two arms differ by the same amount in every seed, so there is no interval

    @property
    def percent(self) -> float | None:
        """The mean difference in percent."""
        return None if self.scale is None else self.mean * self.scale

    @property
    def marked(self) -> bool:
        """Whether the interval for all comparisons together excludes zero."""
        return self.wide_low is not None and self.wide_high is not None and (self.wide_low > 0 or self.wide_high < 0)


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean and 95% interval (Student's t) of at least one value; each seed gives one value."""
    mean = float(np.mean(values)) if all(map(math.isfinite, values)) else math.nan
    if len(values) < 2 or math.isnan(mean):
        return Estimate(mean, None, None)
    reach = standard_errors(len(values)) * _error(values)
    return Estimate(mean, mean - reach, mean + reach)


def paired_difference(arm: Mapping[int, float], other: Mapping[int, float], comparisons: int = 1) -> Difference:
    """The paired difference of two arms' values by seed.

    Args:
        comparisons: how many comparisons the study has; `wide_low` to `wide_high` has level `1 - 0.05 / comparisons`.
    """
    seeds = tuple(sorted(arm.keys() & other.keys()))
    a, b = (np.array([values[seed] for seed in seeds], float) for values in (arm, other))
    if not seeds or not (np.isfinite(a) & np.isfinite(b)).all():
        return Difference(seeds, math.nan, None)
    each = a - b
    rounding = ROUNDING * max(np.abs(a).max(), np.abs(b).max())
    if np.abs(each).max() <= rounding:
        return Difference(seeds, 0.0, None, equal=True)
    mean, size = float(each.mean()), float(abs(b.mean()))
    scale = 100 / size if size > rounding else None
    if len(seeds) < 2:
        return Difference(seeds, mean, scale)
    if np.ptp(each) <= rounding:
        return Difference(seeds, mean, scale, constant=True)
    error = _error(each)
    reach, wide = (standard_errors(len(seeds), comparisons=m) * error for m in (1, comparisons))
    p = 2 * float(_special().stdtr(len(seeds) - 1, -abs(mean) / error))
    return Difference(seeds, mean, scale, mean - reach, mean + reach, mean - wide, mean + wide, p)


def standard_errors(count: int, comparisons: int = 1) -> float:
    """Half the width of an interval over `count` seeds, in standard errors; infinite for one seed."""
    if count < 2:
        return math.inf
    return float(_special().stdtrit(count - 1, 1 - (1 - LEVEL) / 2 / comparisons))


def _error(values: Any) -> float:
    """Standard error of the mean of at least two values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _special() -> Any:
    try:
        from scipy import special  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("studies need scipy: pip install 'dit-in-dit[study]'") from None
    return special
