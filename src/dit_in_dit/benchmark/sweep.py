"""How costs grow with one quantity: times at several values, measured alternately, and a fitted power law."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from dit_in_dit.benchmark.parts import INNER, part_macs, part_seconds, subject_for_parts
from dit_in_dit.benchmark.timing import interleave
from dit_in_dit.config.errors import UserError, did_you_mean
from dit_in_dit.config.files import replace_keys
from dit_in_dit.config.run import ModelConfig, RunConfig


@dataclass(frozen=True)
class Axis:
    """The quantity that a sweep varies."""

    label: str  # name of the size in plots and tables
    keys: Callable[[ModelConfig, int], Mapping[str, Any]]  # config keys that set the quantity to a value
    size: Callable[[RunConfig], float]  # the size of a config; costs are fitted as a power of this size


def _sub_patch(model: ModelConfig, sub_patches: int) -> Mapping[str, Any]:
    side = math.isqrt(sub_patches)
    if side < 1 or side**2 != sub_patches or model.patch_size % side:
        raise UserError(
            f"--sweep S: must be the square of a divisor of patch_size={model.patch_size}: got {sub_patches}"
        )
    return {"model.inner.sub_patch": model.patch_size // side}


AXES = {
    "image": Axis(
        "image area, pixels",
        lambda model, side: {"model.image_size": side},
        lambda run: float(math.prod(run.model.image_size)),
    ),
    "p": Axis(
        "patch size p, at the same S",
        lambda model, p: {"model.patch_size": p, "model.inner.sub_patch": max(1, p // model.sub_grid)},
        lambda run: run.model.patch_size,
    ),
    "s": Axis("sub-patch size s", lambda model, s: {"model.inner.sub_patch": s}, lambda run: run.model.inner.sub_patch),
    "S": Axis("sub-patches per patch S", _sub_patch, lambda run: run.model.sub_patches),
    "E": Axis("inner width E", lambda model, width: {"model.inner.width": width}, lambda run: run.model.inner.width),
    "batch": Axis("images in the batch", lambda model, n: {"train.batch_size": n}, lambda run: run.train.batch_size),
}


@dataclass(frozen=True)
class Point:
    """Costs at one value; `step` and `inner` hold each round's seconds for the whole batch."""

    value: int
    size: float
    macs: int
    inner_macs: int
    kept: int
    step: tuple[float, ...]
    inner: tuple[float, ...]


@dataclass(frozen=True)
class Sweep:
    """Costs along an axis of `AXES`."""

    axis: str
    points: tuple[Point, ...]

    def exponents(self, what: str) -> tuple[float, ...]:
        """Exponents of `step` or `inner` in each round, or the one exponent of `macs`, `inner_macs` or `kept`."""
        sizes = [point.size for point in self.points]
        values = [getattr(point, what) for point in self.points]
        rounds = zip(*values, strict=True) if isinstance(values[0], tuple) else [values]
        return tuple(exponent(sizes, costs) for costs in rounds)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        costs = ("step", "inner", "macs", "inner_macs", "kept")
        positive = [what for what in costs if all(np.all(np.array(getattr(point, what)) > 0) for point in self.points)]
        return {
            "axis": self.axis,
            "label": AXES[self.axis].label,
            "points": [vars(point) for point in self.points],
            "exponents": {what: median(self.exponents(what)) for what in positive},
        }


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent k of cost ~ size^k, by least squares in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def sweep_configs(run: RunConfig, axis: str, values: Sequence[int]) -> dict[str, RunConfig]:
    """The config at each value, in ascending order. UserError if the axis is unknown, a value gives no valid config, or
    there are fewer than two values."""
    if axis not in AXES:
        raise UserError(f"--sweep: unknown quantity {axis!r}{did_you_mean(axis, AXES)}")
    if len(set(values)) < 2:
        raise UserError(f"--sweep {axis} needs two values or more, all different: got {len(set(values))}")
    return {str(value): replace_keys(run, AXES[axis].keys(run.model, value)) for value in sorted(set(values))}


def sweep(run: RunConfig, axis: str, values: Sequence[int], device: torch.device, seconds: float) -> Sweep:
    """Measure the step and the inner path (`parts.INNER`) at each value, alternately; UserError as `sweep_configs`."""
    subjects = {name: subject_for_parts(config, device) for name, config in sweep_configs(run, axis, values).items()}
    rounds = interleave({name: partial(part_seconds, subject) for name, subject in subjects.items()}, seconds)
    points = []
    for name, subject in subjects.items():
        macs, size = part_macs(subject), AXES[axis].size(subject.run)
        costs = sum(macs.values()), sum(macs[part] for part in INNER), subject.kept_bytes()
        step = tuple(sum(parts.values()) for parts in rounds[name])
        inner = tuple(sum(parts.get(part, 0.0) for part in INNER) for parts in rounds[name])
        points.append(Point(int(name), size, *costs, step, inner))
    return Sweep(axis, tuple(points))
