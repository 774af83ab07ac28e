"""Time shift (Esser et al. 2024, equation 23): its factor as a number or by the size of the model's images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.samplers import SAMPLERS

Shift = float | Literal["tokens", "dimension"]
# The shift is 1 for DiT's latents of 256x256 images: 16x16 patches, 4x32x32 numbers.
BASES = {"tokens": 256, "dimension": 4096}


def shift_factor(shift: Shift, sizes: Mapping[str, int] | None) -> float:
    """The factor s: the number itself, or sqrt(size / base) with the model's `sizes` (by the names of BASES).

    Raises:
        UserError: a name is given without sizes, which only the config of a run has.
    """
    if not isinstance(shift, str):
        return shift
    if sizes is None:
        raise UserError(f"time_shift={shift} needs the size of a model: take it from a run's config, or give a number")
    return math.sqrt(sizes[shift] / BASES[shift])


def check_shift(name: str, shift: Shift | None, path: str, sampler: str | None = None) -> None:
    """UserError if a shift other than 1 is set for another path than flow, or for a user's own scheduler."""
    if shift in (None, 1):
        return
    if path != "flow":
        raise UserError(f"{name}={shift} needs diffusion.path=flow: set {name}=1")
    if sampler and not isinstance(SAMPLERS[sampler].schedulers.get(path), str):
        raise UserError(f"sampler {sampler} has its own scheduler, which takes no shift: set sample.time_shift=1")
