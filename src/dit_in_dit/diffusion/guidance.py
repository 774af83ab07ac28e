"""Guidance away from a weak model: autoguidance by another network, internal guidance by an early head.

Both give x = weak + w (strong - weak) for the prediction at x_t, t and y (Karras et al. 2024; Zhou et al. 2025). They
act on each of the two predictions of classifier-free guidance, with and without the class, before these are combined,
as in the sampler of the official repository of internal guidance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_in_dit.diffusion.objective import Predict
from dit_in_dit.diffusion.path import Flow, convert
from dit_in_dit.diffusion.variance import split_prediction

Pair = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]  # x_t, t, y -> strong and weak prediction
Interval = tuple[float, float]


def is_inside(interval: Interval, t: Tensor) -> bool:
    """Whether the time of a batch, t (N,) of equal times, is in the interval. For (0, 1) no time is read: the host does
    not wait for the device."""
    return tuple(interval) == (0, 1) or interval[0] <= float(t[0]) <= interval[1]


def beside(predict: Predict, weak: Predict, path: Flow, *, given: str, wanted: str, classes: bool) -> Pair:
    """The outputs of `predict`, of quantity `wanted`, and of a weak model of quantity `given`, converted to `wanted`; a
    weak model without `classes` gets none."""

    def pair(x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        output, _ = split_prediction(weak(x, t, y if classes else None), x)
        return predict(x, t, y), convert(path, output, x, t, given=given, wanted=wanted)

    return pair


def away_from_weak(predict: Predict, pair: Pair, scale: float, interval: Interval) -> Predict:
    """The prediction, moved away from the weak one by `scale` (1: not at all) inside the interval of t.

    Args:
        predict: the strong prediction, used alone outside the interval.
        pair: the strong prediction (N, C or 2C, H, W) and the weak one (N, C, H, W or more channels) of the same
            quantity. Channels of a learned variance are those of the strong prediction.
    """
    if scale == 1:
        return predict

    def with_guidance(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if not is_inside(interval, t):
            return predict(x, t, y)
        strong, weak = pair(x, t, y)
        (prediction, fraction), (weak, _) = split_prediction(strong, x), split_prediction(weak, x)
        guided = weak + scale * (prediction - weak)
        return guided if fraction is None else torch.cat([guided, fraction], dim=1)

    return with_guidance
