"""Which images, times, layers and heads keep their attention in full: the page must stay small enough to send.

Statistics are taken over everything, whatever is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from dit_in_dit.config.run import ModelConfig
from dit_in_dit.model.aggregate import AGGREGATORS
from dit_in_dit.model.mixers import MIXERS

MOST_BYTES = 3_000_000  # of the page's arrays and pictures; a third more when written as text
PICTURE_PIXELS = 96  # pixels of the longer side of a picture in the page


@dataclass(frozen=True)
class LevelPlan:
    """Which layers are kept, their heads one by one or as a mean, and whether who sees whom or its summary alone."""

    layers: tuple[int, ...]
    heads: bool = True
    matrices: bool = True


@dataclass(frozen=True)
class MapsPlan:
    """Positions of the images, times and layers that are kept."""

    images: tuple[int, ...]
    times: tuple[int, ...]
    inner: LevelPlan
    outer: LevelPlan


def evenly(items: tuple[int, ...], most: int) -> tuple[int, ...]:
    """At most `most` of the items, evenly spread, the first and the last among them where `most` is above one."""
    if len(items) <= most:
        return items
    return tuple(items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(most))


def plan_maps(model: ModelConfig, images: int, times: int, most: int = MOST_BYTES) -> MapsPlan:
    """Everything if it fits into `most` bytes; else without what is missed least, one thing after another; where that
    is not enough, without who sees whom: first at the inner level, then at both."""
    mixer = MIXERS[model.inner.mixer]
    attends = mixer is not None and mixer.length(model) > 0
    whole = MapsPlan(
        tuple(range(images)),
        tuple(range(times)),
        LevelPlan(tuple(range(model.blocks("inner") if attends else 0))),
        LevelPlan(tuple(range(model.blocks("outer")))),
    )
    plan = whole
    for start in (whole, _inner(matrices=False)(whole), _outer(matrices=False)(_inner(matrices=False)(whole))):
        plan = start
        for cut in _CUTS:
            if size(model, plan) <= most:
                return plan
            plan = cut(plan)
    return plan


def _images(most: int) -> Callable[[MapsPlan], MapsPlan]:
    return lambda plan: replace(plan, images=evenly(plan.images, most))


def _times(most: int) -> Callable[[MapsPlan], MapsPlan]:
    return lambda plan: replace(plan, times=evenly(plan.times, most))


def _inner(most: int = 1000, **changes: bool) -> Callable[[MapsPlan], MapsPlan]:
    return lambda plan: replace(plan, inner=replace(plan.inner, layers=evenly(plan.inner.layers, most), **changes))


def _outer(most: int = 1000, **changes: bool) -> Callable[[MapsPlan], MapsPlan]:
    return lambda plan: replace(plan, outer=replace(plan.outer, layers=evenly(plan.outer.layers, most), **changes))


_CUTS = (
    *(_images(12), _times(12), _images(6), _times(9)),
    *(_outer(heads=False), _inner(heads=False), _outer(4), _inner(4), _times(5)),
    *(_images(3), _times(3), _outer(2), _inner(2), _images(2), _images(1)),
)


def size(model: ModelConfig, plan: MapsPlan) -> int:
    """Bytes of what the plan keeps: a byte a weight, four a statistic, and the pictures."""
    patches, sub = model.patches, model.sub_patches
    mixer = MIXERS[model.inner.mixer]
    reach = mixer.length(model) if mixer else 0
    inner = _level(plan.inner, model.inner.num_heads, patches, sub, reach)
    outer = _level(plan.outer, model.outer.num_heads, patches, 1, patches)
    scale = min(1, PICTURE_PIXELS / max(model.image_size))
    pictures = 3 * 3 * round(model.image_size[0] * scale) * round(model.image_size[1] * scale)
    drawn = sub if AGGREGATORS[model.inner.aggregate].weights_depend_on == "tokens" else 0
    joins = len(joining(model)) * patches * (4 + drawn)
    return len(plan.images) * len(plan.times) * (inner + outer + pictures + joins)


def joining(model: ModelConfig) -> list[str]:
    """Where inner tokens join the outer ones or the image, by the names of `watch_contribution`."""
    levels = [level for level, _ in model.program]
    aggregates = sum(pair == ("inner", "outer") for pair in pairwise(levels))
    return [f"aggregates.{i}" for i in range(aggregates)] + ["inner_head"] * (levels[-1] == "inner")


def _level(plan: LevelPlan, heads: int, patches: int, sub: int, reach: int) -> int:
    per_patch = sub + 12  # what its tokens receive; its entropy, weight on itself and distance
    if plan.matrices:
        per_patch += (sub**2 if sub > 1 else 0) + (reach if reach > sub else 0)
    return len(plan.layers) * (heads if plan.heads else 1) * patches * per_patch


def left_out_sentences(model: ModelConfig, plan: MapsPlan, images: int, times: int) -> list[str]:
    """What the plan leaves out, a sentence each."""
    said = []
    for name, kept, all_ in (("images", plan.images, images), ("times", plan.times, times)):
        if len(kept) < all_:
            said.append(f"{len(kept)} of {all_} {name} are shown.")
    for name, level, heads in (
        ("inner", plan.inner, model.inner.num_heads),
        ("outer", plan.outer, model.outer.num_heads),
    ):
        if not level.layers:
            continue
        if len(level.layers) < model.blocks(name):
            said.append(f"{len(level.layers)} of {model.blocks(name)} {name} layers are shown patch by patch.")
        if not level.heads and heads > 1:
            said.append(f"The {heads} {name} heads are averaged.")
        if not level.matrices:
            said.append(f"Who sees whom is too large for a page at the {name} level: only its summary is shown.")
    return said
