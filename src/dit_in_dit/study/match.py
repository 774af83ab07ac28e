"""Twins of equal cost: the outer transformer of a model, changed until the model costs what another one does.

First the number of outer blocks, then the outer width, then the MLP's hidden width. The inner transformer is what
studies ask about: it stays as it is, also where its width was the outer one.
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
from dit_in_dit.config.program import MOST_BLOCKS, format_stages
from dit_in_dit.config.run import ModelConfig, RunConfig
from dit_in_dit.config.schema import Section, keys
from dit_in_dit.inspection import cost
from dit_in_dit.inspection.trace import inspect

By = Literal["macs", "time", "params"]
Count = Callable[[ModelConfig], float]
COST_NAMES = {"macs": "MACs", "time": "time", "params": "parameters"}
SPAN = 4  # with a width or an MLP so many times larger or smaller it is another model and no twin
NEAR = 1 / 8  # a width further off changes more than an MLP that makes up for a gap of so much
TRIES = 6  # models measured in a search by time
SECONDS_EACH = 2.5  # to measure a model for
SECONDS_TO_SPARE = 15.0  # times that nobody asked for are measured if warming up takes no longer


@dataclass(frozen=True)
class Twin:
    """A model of wanted cost.

    Attributes:
        changed: config keys that differ from the model it was made of, each with the value before and after.
        gap: relative difference to the wanted cost; above 0 costs more.
        seconds: of a training step, its own and that of the model it is like, where these were measured.
    """

    model: ModelConfig
    changed: dict[str, tuple[Any, Any]]
    gap: float
    seconds: tuple[float, float] | None = None


class NoTwin(UserError):
    """No change of the outer transformer comes within the tolerance; `nearest` is the best."""

    def __init__(self, nearest: Twin, what: str, tolerance: float) -> None:
        outer, blocks = nearest.model.outer, nearest.model.blocks("outer")
        too_much = nearest.gap > 0 and nearest.model.blocks("inner")
        way_out = "shrink its inner transformer" if too_much else "free more of depth, outer.width, outer.mlp_ratio"
        super().__init__(
            f"no twin within {100 * tolerance:g}% in {what}: the nearest, {blocks} outer blocks {outer.width} wide, "
            f"is {nearest.gap:+.1%} off; raise the tolerance, or {way_out}"
        )
        self.nearest = nearest


# ------------------------------------------------------------------------------------------- counts


def forward_macs(model: ModelConfig) -> int:
    """MACs of a forward pass per image."""
    return cost.macs(model)["total"]


def count_parameters(model: ModelConfig) -> int:
    """Trainable numbers; blocks of one level have equally many, so a model of few blocks tells."""
    few = replace(model, stages=format_stages(tuple((level, 1) for level, _ in model.program)), depth=None)
    total, each = _parameters_of_few(few)
    return total + sum((model.blocks(level) - few.blocks(level)) * number for level, number in each.items())


@lru_cache(maxsize=4096)
def _parameters_of_few(few: ModelConfig) -> tuple[int, dict[str, int]]:
    parts = cost.parameters(few)
    return parts["total"], {
        level: parts[f"{level}_blocks"] // few.blocks(level) for level in ("outer", "inner") if few.blocks(level)
    }


def costs(config: RunConfig) -> dict[str, float]:
    """`macs` and `params`, and `activation_bytes` that a forward pass of one image keeps for the backward pass."""
    kept = inspect(config.model, 1, config.train.recompute)["activation_bytes"]["total"]
    return {**{by: float(count(config.model)) for by, count in COUNTS.items()}, "activation_bytes": float(kept)}


COUNTS: dict[str, Count] = {"macs": forward_macs, "params": count_parameters}

# ------------------------------------------------------------------------------------------- search


def twin(
    model: ModelConfig, target: float, count: Count, *, tolerance: float = 0.01, fixed: Collection[str] = ()
) -> Twin:
    """The least change of the outer transformer that brings `count` within `tolerance` of `target`.

    The number of outer blocks alone where that is enough; else the nearest width with its best number of blocks (heads
    stay as many, and their size even if it was); else, before widths that are far off, another `mlp_ratio` with what is
    nearest in cost so far. Outer stages of a program keep their proportions. A named order becomes a program with the
    same inner blocks, unless its `depth_ratio` is fixed: then these follow the depth.

    Args:
        count: the cost of a model; grows with depth, width and mlp_ratio of the outer transformer.
        fixed: dotted keys that stay, or groups of them. `model.stages` fixes the order, not the number of blocks.

    Raises:
        NoTwin: there is none.
    """
    found = _nearest(model, target, count, tolerance, fixed)
    if abs(found.gap) > tolerance:
        raise NoTwin(found, "cost", tolerance)
    return found


def _nearest(model: ModelConfig, target: float, count: Count, tolerance: float, fixed: Collection[str]) -> Twin:
    """The twin, or what comes nearest to one."""
    fewest, most = _depths(model, fixed)
    width, heads, blocks = model.outer.width, model.outer.num_heads, model.blocks("outer")
    step = math.lcm(4, heads * math.gcd(2, width // heads))  # kernels are slow on heads of odd size

    def made(after: ModelConfig) -> Twin:
        return Twin(after, changes(model, after), count(after) / target - 1)

    def with_best_depth(start: ModelConfig) -> Twin:
        return made(_closest(lambda n: _with_depth(start, n, fixed), fewest, most, target, count))

    def widths(sign: int) -> Iterator[Twin]:
        """Narrower (-1) or wider models, as far as some number of blocks can make up for it."""
        for other in range(width + sign * step, SPAN * width if sign > 0 else width // SPAN, sign * step):
            start = _with_outer(model, width=other)
            yield with_best_depth(start)
            end = _with_depth(start, fewest if sign > 0 else most, fixed)
            if sign * (count(end) / target - 1) > tolerance:
                return

    def with_best_mlp(found: Twin) -> Twin:
        if _is_fixed("model.outer.mlp_ratio", fixed):
            return found
        wide = found.model.outer.width
        hidden = int(wide * found.model.outer.mlp_ratio)
        smallest, largest = math.ceil(max(hidden / SPAN, wide / 100)), min(hidden * SPAN, 64 * wide)  # as config allows
        return made(_closest(lambda n: _with_hidden(found.model, n), smallest, largest, target, count))

    best = made(model)
    if abs(best.gap) <= tolerance:
        return best
    sides = () if _is_fixed("model.outer.width", fixed) else (widths(-1), widths(1))
    for pair in chain([[with_best_depth(model)]], zip_longest(*sides)):
        tried = [t for t in pair if t]
        if near := [t for t in tried if abs(t.gap) <= tolerance]:
            return min(near, key=lambda t: (abs(t.model.blocks("outer") - blocks), abs(t.gap)))
        best = min([best, *tried], key=lambda t: abs(t.gap))
        is_far = any(abs(t.model.outer.width / width - 1) > NEAR for t in tried)
        if is_far and abs(best.gap) < NEAR and abs((finer := with_best_mlp(best)).gap) <= tolerance:
            return finer
    return with_best_mlp(best)


def changes(before: ModelConfig, after: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two models differ, with both values."""
    pairs = zip(keys(before, "model."), keys(after, "model."), strict=True)
    return {name: (a, b) for (name, _, a), (_, _, b) in pairs if a != b and not isinstance(a, Section)}


def _is_fixed(name: str, fixed: Collection[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in fixed)


def _with_outer(model: ModelConfig, **values: float) -> ModelConfig:
    return replace(model, outer=replace(model.outer, **values))  # type: ignore[arg-type]


def _with_hidden(model: ModelConfig, hidden: int) -> ModelConfig:
    """The model whose MLPs have so many hidden units."""
    width = model.outer.width
    ratio = hidden / width
    whole = int(ratio * width) == hidden  # or rounding lost a unit
    return _with_outer(model, mlp_ratio=ratio if whole else math.nextafter(ratio, math.inf))


def _closest(make: Callable[[int], ModelConfig], low: int, high: int, target: float, count: Count) -> ModelConfig:
    """Of make(low) to make(high), whose cost grows, the one nearest to the target; guesses along straight lines."""
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


def _follows(model: ModelConfig, fixed: Collection[str]) -> bool:
    """Whether inner blocks follow the depth."""
    return model.depth is not None and model.use_inner and _is_fixed("model.inner.depth_ratio", fixed)


def _depths(model: ModelConfig, fixed: Collection[str]) -> tuple[int, int]:
    """Fewest and most outer blocks that the model may have."""
    if _is_fixed("model.depth", fixed):
        return model.blocks("outer"), model.blocks("outer")
    if not _follows(model, fixed):
        return sum(level == "outer" for level, _ in model.program), MOST_BLOCKS
    ratio = model.inner.depth_ratio
    fewest = math.ceil(2 / ratio) if model.stages == "both" else 1
    return fewest, min(MOST_BLOCKS, int(MOST_BLOCKS / ratio) if ratio else MOST_BLOCKS)


def _with_depth(model: ModelConfig, blocks: int, fixed: Collection[str]) -> ModelConfig:
    """The model with so many outer blocks, shared among its outer stages."""
    if blocks == model.blocks("outer"):
        return model
    if _follows(model, fixed):
        return replace(model, depth=blocks)
    shares = iter(_apportion(blocks, [number for level, number in model.program if level == "outer"]))
    program = tuple((level, next(shares) if level == "outer" else number) for level, number in model.program)
    return replace(model, stages=format_stages(program), depth=None)


def _apportion(total: int, weights: list[int]) -> list[int]:
    """Whole shares in proportion to the weights by largest remainder, at least one each."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [max(1, int(share)) for share in exact]
    places = range(len(weights))
    while sum(shares) < total:
        shares[max(places, key=lambda i: exact[i] - shares[i])] += 1
    while sum(shares) > total:
        shares[min((i for i in places if shares[i] > 1), key=lambda i: exact[i] - shares[i])] -= 1
    return shares


# ------------------------------------------------------------------------------------- runs and time


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
    """The twin of a run's model that costs what another run's does; unchanged where it does already.

    By time, models of other MACs are tried until a training step takes as long; `gap` is then from a measurement of its
    own, made after the search.

    Args:
        fixed, tolerance: as in `twin`.
        device, threads: where time is measured.

    Raises:
        NoTwin: there is none.
        UserError: their images or classes differ.
    """
    _check_alike(config.model, like.model)
    if by == "time":
        return _match_time(config, like, tolerance, fixed, device or torch.device("cpu"), threads)
    found = _nearest(config.model, COUNTS[by](like.model), COUNTS[by], tolerance, fixed)
    if abs(found.gap) > tolerance:
        raise NoTwin(found, COST_NAMES[by], tolerance)
    return found


def _check_alike(model: ModelConfig, like: ModelConfig) -> None:
    """UserError unless both models are of the same images and classes: costs are counted for an image."""
    pairs = {name: (getattr(model, name), getattr(like, name)) for name in ("image_size", "channels", "num_classes")}
    unlike = [f"model.{name}={json.dumps(wanted)}" for name, (own, wanted) in pairs.items() if own != wanted]
    if unlike:
        raise UserError(
            f"costs compare for the same images and classes, but the model to match has {', '.join(unlike)}: "
            "set the same here, or match another"
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
        gap = times["this"].over(times["like"]) - 1
        return Twin(model, changes(config.model, model), gap, (times["this"].seconds, times["like"].seconds))

    seen: dict[ModelConfig, float] = {}
    model = best = config.model
    for _ in range(TRIES):
        found = measured(model, 2 * SECONDS_EACH)
        if abs(found.gap) <= tolerance / 2 or model in seen:
            found = measured(model, 4 * SECONDS_EACH)
            if abs(found.gap) <= tolerance:
                return found
        seen[model] = found.gap
        best = min(seen, key=lambda m: abs(math.log1p(seen[m])))
        # From the best, and no finer than it is far: at equal MACs another shape takes another time.
        step = max(tolerance, abs(math.log1p(seen[best]))) / 4
        model = _nearest(best, _macs_of_equal_time(seen), forward_macs, step, fixed).model
    found = measured(best, 4 * SECONDS_EACH)
    if abs(found.gap) > tolerance:
        raise NoTwin(found, COST_NAMES["time"], tolerance)
    return found


def _macs_of_equal_time(seen: Mapping[ModelConfig, float]) -> float:
    """MACs at which the gap in time would be none, by a line through the two nearest models in logarithms."""
    points = sorted(((math.log(forward_macs(m)), math.log1p(gap)) for m, gap in seen.items()), key=lambda p: abs(p[1]))
    x, y = points[0]
    slope = 1.0
    if len(points) > 1 and points[1][0] != x:
        slope = min(max((points[1][1] - y) / (points[1][0] - x), 0.5), 2.0)  # noise must not throw it far
    return math.exp(x - y / slope)


def quick_times(configs: Mapping[str, RunConfig], device: torch.device, threads: int | None = None) -> dict[str, Times]:
    """Step times in turns, or none where they would take more than half a minute or much memory."""
    compiles = any(config.train.compile for config in configs.values())
    if compiles or estimate_seconds(configs, device, threads=threads) > SECONDS_TO_SPARE:
        return {}
    try:
        return step_seconds(configs, device, threads=threads, seconds=SECONDS_EACH * len(configs))
    except UserError:
        return {}
