"""Twins of equal cost: a model's outer transformer is changed until the model costs as much as another.

The search changes the number of outer blocks first, then the outer width, then the hidden width of the MLP. Studies
examine the inner transformer, so it never changes, even if its width was equal to the outer width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, zip_longest
from typing import Any, Literal

import torch

from dit_in_dit.benchmark.timing import Times, estimate_seconds, step_seconds
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import changed_keys
from dit_in_dit.config.program import format_stages
from dit_in_dit.config.run import ModelConfig, RunConfig
from dit_in_dit.inspection import cost
from dit_in_dit.inspection.trace import inspect
from dit_in_dit.runtime.device import resolve_auto
from dit_in_dit.study.resize import depth_limits, is_fixed, with_depth, with_hidden, with_outer

By = Literal["macs", "time", "params"]
Count = Callable[[ModelConfig], float]
COST_NAMES = {"macs": "MACs", "time": "time", "params": "parameters"}
SPAN = 4  # largest factor by which a width or an MLP may change
NEAR = 1 / 8  # relative; widths further off are tried after another MLP, which may close a gap in cost of up to this
TRIES = 6  # models that a search for equal time measures
SECONDS_EACH = 2.5  # for measuring a model
SECONDS_TO_SPARE = 15.0  # longest warm-up for which optional times are measured


@dataclass(frozen=True)
class Twin:
    """A model of the wanted cost.

    Attributes:
        changed: config keys that differ from the original model, each with the value before and after.
        gap: relative difference to the wanted cost; above 0, the twin costs more.
        seconds: training step times of the twin and of the model it is matched to; None if not measured.
    """

    model: ModelConfig
    changed: dict[str, tuple[Any, Any]]
    gap: float
    seconds: tuple[float, float] | None = None


class NoTwin(UserError):
    """No change of the outer transformer is within the tolerance; `nearest` is the model with the closest cost."""

    def __init__(self, nearest: Twin, what: str, tolerance: float) -> None:
        outer, blocks = nearest.model.outer, nearest.model.blocks("outer")
        too_much = nearest.gap > 0 and nearest.model.blocks("inner")
        way_out = "shrink the inner transformer" if too_much else "free more of depth, outer.width, outer.mlp_ratio"
        super().__init__(
            f"no twin within {100 * tolerance:g}% in {what}: the nearest has {blocks} outer blocks of width "
            f"{outer.width} and is {nearest.gap:+.1%} off; raise the tolerance, or {way_out}"
        )
        self.nearest = nearest


def forward_macs(model: ModelConfig) -> int:
    """MACs of a forward pass per image."""
    return cost.macs(model)["total"]


def count_parameters(model: ModelConfig) -> int:
    """Trainable parameters, computed from a model of few blocks, because all blocks of a level have the same size."""
    least = {"outer": 1 + max(model.tokens.start, model.internal_head), "inner": 1}  # blocks that other keys name
    program = tuple((level, min(number, least[level])) for level, number in model.program)
    few = replace(model, stages=format_stages(program), depth=None)
    total, each = _parameters_of_few(few)
    return total + sum((model.blocks(level) - few.blocks(level)) * number for level, number in each.items())


@lru_cache(maxsize=4096)
def _parameters_of_few(few: ModelConfig) -> tuple[int, dict[str, int]]:
    parts = cost.parameters(few)
    return parts["total"], {
        level: parts[f"{level}_blocks"] // few.blocks(level) for level in ("outer", "inner") if few.blocks(level)
    }


def costs(config: RunConfig) -> dict[str, float]:
    """`macs`, `params` and `activation_bytes`: bytes that an image's forward pass keeps for the backward pass."""
    activations = inspect(config.model, 1, config.train.recompute)["activation_bytes"]["total"]
    counts = {by: float(count(config.model)) for by, count in COUNTS.items()}
    return {**counts, "activation_bytes": float(activations)}


COUNTS: dict[str, Count] = {"macs": forward_macs, "params": count_parameters}


def find_twin(
    model: ModelConfig, target: float, count: Count, *, tolerance: float = 0.01, fixed: Collection[str] = ()
) -> Twin:
    """The smallest change of the outer transformer that brings `count` within `tolerance` of `target`.

    If a change in the number of outer blocks is enough, nothing else changes. Otherwise the search takes the nearest
    width with its best number of blocks. The number of heads stays, and even head sizes stay even. Before widths that
    are far off, the search tries another `mlp_ratio` for the model with the closest cost so far. Outer stages of a
    program keep their proportions. A named order becomes a program with the same number of inner blocks. If
    `depth_ratio` is fixed, the order keeps its name, and the number of inner blocks follows the depth.

    Args:
        count: gives a model's cost. The cost must grow with the outer depth, width and mlp_ratio.
        fixed: keys or groups of keys that do not change. `model.stages` fixes the order, not the number of blocks.

    Raises:
        NoTwin: no model is within the tolerance.
    """
    return _accept(_nearest(model, target, count, tolerance, fixed), "cost", tolerance)


def _accept(nearest: Twin, what: str, tolerance: float) -> Twin:
    """Return `nearest` if its cost is within the tolerance; otherwise raise NoTwin."""
    if abs(nearest.gap) > tolerance:
        raise NoTwin(nearest, what, tolerance)
    return nearest


def _nearest(model: ModelConfig, target: float, count: Count, tolerance: float, fixed: Collection[str]) -> Twin:
    """The twin, or, if there is none, the model with the closest cost."""
    fewest, most = depth_limits(model, fixed)
    width, heads, blocks = model.outer.width, model.outer.num_heads, model.blocks("outer")
    inner = model.inner if model.inner_stages else None
    rotary = model.outer.rope != "none" or (inner and inner.mixer == "compact" and inner.rope != "none")
    # Rotary positions need heads whose size is a multiple of 4; kernels are slow on heads of odd size.
    step = math.lcm(4, heads * math.gcd(4 if rotary else 2, width // heads))
    tied = inner and (inner.modulation == "shared" or model.carries_tokens)  # both levels have one width

    def compare(after: ModelConfig) -> Twin:
        return Twin(after, changed_keys(model, after, "model."), count(after) / target - 1)

    def with_best_depth(start: ModelConfig) -> Twin:
        return compare(_closest(lambda n: with_depth(start, n, fixed), fewest, most, target, count))

    def widths(sign: int) -> Iterator[Twin]:
        """Narrower models (`sign` -1) or wider models (1), until no number of blocks can compensate for the width."""
        for other in range(width + sign * step, SPAN * width if sign > 0 else width // SPAN, sign * step):
            start = with_outer(model, width=other)
            yield with_best_depth(start)
            end = with_depth(start, fewest if sign > 0 else most, fixed)
            if sign * (count(end) / target - 1) > tolerance:
                return

    def with_best_mlp(start: Twin) -> Twin:
        if is_fixed("model.outer.mlp_ratio", fixed):
            return start
        width = start.model.outer.width
        hidden = int(width * start.model.outer.mlp_ratio)
        smallest, largest = math.ceil(max(hidden / SPAN, width / 100)), min(hidden * SPAN, 64 * width)  # config's range
        return compare(_closest(lambda n: with_hidden(start.model, n), smallest, largest, target, count))

    best = compare(model)
    if abs(best.gap) <= tolerance:
        return best
    sides = () if tied or is_fixed("model.outer.width", fixed) else (widths(-1), widths(1))
    for pair in chain([[with_best_depth(model)]], zip_longest(*sides)):
        tried = [t for t in pair if t]
        if near := [t for t in tried if abs(t.gap) <= tolerance]:
            return min(near, key=lambda t: (abs(t.model.blocks("outer") - blocks), abs(t.gap)))
        best = min([best, *tried], key=lambda t: abs(t.gap))
        is_far = any(abs(t.model.outer.width / width - 1) > NEAR for t in tried)
        if is_far and abs(best.gap) < NEAR and abs((finer := with_best_mlp(best)).gap) <= tolerance:
            return finer
    return with_best_mlp(best)


def _closest(make: Callable[[int], ModelConfig], low: int, high: int, target: float, count: Count) -> ModelConfig:
    """The model, of make(low) to make(high), with cost nearest to the target, by regula falsi. Costs must increase."""
    below, above = count(make(low)), count(make(high))
    if target <= below or low == high:
        return make(low)
    if target >= above:
        return make(high)
    while high - low > 1:
        middle = low + round((target - below) / (above - below) * (high - low))
        middle = min(max(middle, low + 1), high - 1)
        value = count(make(middle))
        if value <= target:
            low, below = middle, value
        else:
            high, above = middle, value
    return make(low if target - below <= above - target else high)


def match(
    config: RunConfig,
    like: RunConfig,
    by: By,
    *,
    tolerance: float = 0.01,
    fixed: Collection[str] = (),
    device: torch.device | None = None,
    threads: int | None = None,
) -> Twin:
    """Resize a run's model until it costs as much as another run's model; if the costs are equal, nothing changes.

    To match time, models with different MACs are tried until their training steps take equally long. `gap` then comes
    from a separate measurement after the search.

    Args:
        fixed, tolerance: as in `find_twin`.
        device, threads: the device and CPU threads for measuring time.

    Raises:
        NoTwin: no model is within the tolerance.
        UserError: the images or classes of the two models differ.
    """
    _check_alike(config.model, like.model)
    if by == "time":
        return _match_time(config, like, tolerance, fixed, device or torch.device("cpu"), threads)
    nearest = _nearest(config.model, COUNTS[by](like.model), COUNTS[by], tolerance, fixed)
    return _accept(nearest, COST_NAMES[by], tolerance)


def _check_alike(model: ModelConfig, like: ModelConfig) -> None:
    """Raise UserError unless both models have the same image shape and classes, because costs are per image."""
    pairs = {name: (getattr(model, name), getattr(like, name)) for name in ("image_size", "channels", "num_classes")}
    unlike = [f"model.{name}={json.dumps(wanted)}" for name, (own, wanted) in pairs.items() if own != wanted]
    if unlike:
        raise UserError(
            f"costs can be compared only for the same images and classes, but the model to match has "
            f"{', '.join(unlike)}: set the same values here, or match another model"
        )


def _match_time(
    config: RunConfig,
    like: RunConfig,
    tolerance: float,
    fixed: Collection[str],
    device: torch.device,
    threads: int | None,
) -> Twin:
    def measured(model: ModelConfig, seconds: float) -> Twin:
        pair = {"this": replace(config, model=model), "like": like}
        times = step_seconds(pair, device, threads=threads, seconds=seconds)
        this, other = times["this"], times["like"]
        changed = changed_keys(config.model, model, "model.")
        return Twin(model, changed, this.over(other) - 1, (this.seconds, other.seconds))

    seen: dict[ModelConfig, float] = {}
    model = best = config.model
    for _ in range(TRIES):
        candidate = measured(model, 2 * SECONDS_EACH)
        if abs(candidate.gap) <= tolerance / 2 or model in seen:
            candidate = measured(model, 4 * SECONDS_EACH)
            if abs(candidate.gap) <= tolerance:
                return candidate
        seen[model] = candidate.gap
        best = min(seen, key=lambda m: abs(math.log1p(seen[m])))
        # Search from the best model, with a tolerance in proportion to its gap: time also depends on the shape.
        step = max(tolerance, abs(math.log1p(seen[best]))) / 4
        model = _nearest(best, _macs_of_equal_time(seen), forward_macs, step, fixed).model
    return _accept(measured(best, 4 * SECONDS_EACH), COST_NAMES["time"], tolerance)


def _macs_of_equal_time(seen: Mapping[ModelConfig, float]) -> float:
    """MACs at which the gap in time would be zero, from a line in log-log space through the two nearest models."""
    points = sorted(((math.log(forward_macs(m)), math.log1p(gap)) for m, gap in seen.items()), key=lambda p: abs(p[1]))
    x, y = points[0]
    slope = 1.0
    if len(points) > 1 and points[1][0] != x:
        slope = min(max((points[1][1] - y) / (points[1][0] - x), 0.5), 2.0)  # noise must not extrapolate far
    return math.exp(x - y / slope)


def quick_times(configs: Mapping[str, RunConfig], device: torch.device, threads: int | None = None) -> dict[str, Times]:
    """Step times, measured alternately; empty if a model is compiled, warming up takes long, or memory is too small."""
    compiles = any(resolve_auto(config, device).train.compile for config in configs.values())
    if compiles or estimate_seconds(configs, device, threads=threads) > SECONDS_TO_SPARE:
        return {}
    try:
        return step_seconds(configs, device, threads=threads, seconds=SECONDS_EACH * len(configs))
    except UserError:
        return {}
