"""Power-function averages of EDM2 (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models", section 3 and appendix C): at step T, step t has the weight p(t) = (power + 1) t^power / T^(power + 1).

The relative length of an average is the standard deviation of p, divided by T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Profile = tuple[float, float]  # step T, power


def relative_length(power: float) -> float:
    """Relative length of the average with this exponent (EDM2, equation 123)."""
    return math.sqrt((power + 1) / (power + 3)) / (power + 2)


def length_exponent(length: float) -> float:
    """Exponent of the average of a relative length below 1 / sqrt(12), the inverse of `relative_length`.

    By bisection and not by the roots of EDM2's cubic, because a library's eigenvalues differ in their last bits from
    one machine to another.
    """
    low, high = 0.0, 1 / length
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if relative_length(middle) > length else (low, middle)
    return low


def power_decay(step: int, power: float) -> float:
    """Decay at a step, from 1, that makes a moving average follow the profile (EDM2, equation 127)."""
    return (1 - 1 / step) ** (power + 1)


def measured_length(decay: Callable[[int], float], step: int) -> float:
    """Relative length at a step of the moving average with these decays: the standard deviation of the steps by their
    weights in the average, divided by the last step. The initial weights are step 0."""
    mean = square = 0.0
    for t in range(1, step + 1):
        kept = decay(t)
        mean, square = kept * mean + (1 - kept) * t, kept * square + (1 - kept) * t * t
    return math.sqrt(max(0.0, square - mean * mean)) / step


def _products(one: Sequence[Profile], other: Sequence[Profile]) -> NDArray[np.float64]:
    """Inner products of profiles, (len(one), len(other)): integrals of p q over time (EDM2, equation 151)."""
    (s, a), (t, b) = np.array(one).T[:, :, None], np.array(other).T[:, None, :]
    ratio = (s / t) ** np.where(s < t, b, -a)
    products: NDArray[np.float64] = (a + 1) * (b + 1) * ratio / ((a + b + 1) * np.maximum(s, t))
    return products


def fit_profile(stored: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """Weights of the stored averages whose sum is nearest to the wanted one, by least squares between profiles (EDM2,
    algorithm 3); and the root of the squared error that is left, relative to the wanted profile.

    The weights sum to 1. A wanted profile that is stored has weight 1, exactly.
    """
    if wanted in stored:
        return np.array([float(profile == wanted) for profile in stored]), 0.0
    among, with_wanted = _products(stored, stored), _products(stored, [wanted])[:, 0]
    weights: Any = np.linalg.lstsq(among, with_wanted, rcond=None)[0]
    weights = weights / weights.sum()
    norm = _products([wanted], [wanted])[0, 0]
    left = norm - 2 * weights @ with_wanted + weights @ among @ weights
    return weights, math.sqrt(max(0.0, left / norm))
