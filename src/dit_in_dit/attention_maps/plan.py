"""Choice of the images, times, layers and heads whose attention is kept in full, to bound the size of the page.

Statistics always cover all images, times, layers and heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from dit_in_dit.config.run import ModelConfig
from dit_in_dit.model.aggregate import AGGREGATORS
from dit_in_dit.model.mixers import MIXERS

MOST_BYTES = 3_000_000  # of the page's arrays and pictures; base64 adds a third
PICTURE_PIXELS = 96  # longer side of a picture in the page


@dataclass(frozen=True)
class LevelPlan:
    """Recordings kept for one level."""

    layers: tuple[int, ...]  # numbers of the layers
    heads: bool = True  # whether heads are kept one by one, or as their mean
    matrices: bool = True  # whether weights are kept, or only their summaries


@dataclass(frozen=True)
class MapsPlan:
    """Recordings kept: numbers of the images and times, and a plan for each level."""

    images: tuple[int, ...]
    times: tuple[int, ...]
    inner: LevelPlan
    outer: LevelPlan


def evenly_chosen(items: Sequence[int], most: int) -> tuple[int, ...]:
    """At most `most` of the items, evenly spaced; the first and the last are included if `most` is above 1."""
    if len(items) <= most:
        return tuple(items)
    return tuple(items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(most))


def plan_maps(model: ModelConfig, images: int, times: int, most: int = MOST_BYTES) -> MapsPlan:
    """Keep all recordings, or cut recordings until the page fits into `most` bytes.

    Cuts are made one by one; the least important recordings are cut first (`_CUTS`). If all do not suffice, the cuts
    are repeated without the weights of the inner level, then without the weights of both levels.
    """
    mixer = MIXERS[model.inner.mixer]
    attends = mixer is not None and mixer.length(model) > 0
    full = MapsPlan(
        tuple(range(images)),
        tuple(range(times)),
        LevelPlan(tuple(range(model.blocks("inner") if attends else 0))),
        LevelPlan(tuple(range(model.blocks("outer")))),
    )
    summarised = _cut(full, "inner", "matrices")
    for start in (full, summarised, _cut(summarised, "outer", "matrices")):
        plan = start
        for cut in _CUTS:
            if size(model, plan) <= most:
                return plan
            plan = _cut(plan, *cut)
    return plan


_CUTS: tuple[tuple[str, int | str], ...] = (
    *(("images", 12), ("times", 12), ("images", 6), ("times", 9), ("outer", "heads"), ("inner", "heads")),
    *(("outer", 4), ("inner", 4), ("times", 5), ("images", 3), ("times", 3), ("outer", 2), ("inner", 2)),
    *(("images", 2), ("images", 1)),
)


def _cut(plan: MapsPlan, name: str, to: int | str) -> MapsPlan:
    """The plan with at most `to` images, times or layers of a level, or without a level's heads or matrices."""
    kept: Any = getattr(plan, name)
    if isinstance(to, str):
        kept = replace(kept, **{to: False})
    elif isinstance(kept, LevelPlan):
        kept = replace(kept, layers=evenly_chosen(kept.layers, to))
    else:
        kept = evenly_chosen(kept, to)
    return replace(plan, **{name: kept})


def size(model: ModelConfig, plan: MapsPlan) -> int:
    """Bytes in the page under a plan: one per weight, four per statistic, and the pictures."""
    patches, sub = model.patches, model.sub_patches
    mixer = MIXERS[model.inner.mixer]
    reach = mixer.length(model) if mixer else 0
    inner = _level(plan.inner, model.inner.num_heads, patches, sub, reach)
    outer = _level(plan.outer, model.outer.num_heads, patches, 1, patches)
    scale = min(1, PICTURE_PIXELS / max(model.image_size))
    pictures = 3 * 3 * round(model.image_size[0] * scale) * round(model.image_size[1] * scale)
    pooled = sub if AGGREGATORS[model.inner.aggregate].weights_depend_on == "tokens" else 0
    joins = len(joining(model)) * patches * (4 + pooled)
    return len(plan.images) * len(plan.times) * (inner + outer + pictures + joins)


def joining(model: ModelConfig) -> list[str]:
    """Places where inner tokens join the outer tokens or the image, named as in `watch_contribution`."""
    levels = [level for level, _ in model.program]
    aggregates = sum(pair == ("inner", "outer") for pair in pairwise(levels))
    return [f"aggregates.{i}" for i in range(aggregates)] + ["inner_head"] * (levels[-1] == "inner")


def _level(plan: LevelPlan, heads: int, patches: int, sub: int, reach: int) -> int:
    per_patch = sub + 12  # weight received by each token; entropy, weight on itself and distance as float32
    if plan.matrices:
        per_patch += (sub**2 if sub > 1 else 0) + (reach if reach > sub else 0)
    return len(plan.layers) * (heads if plan.heads else 1) * patches * per_patch


def left_out_sentences(model: ModelConfig, plan: MapsPlan, images: int, times: int) -> list[str]:
    """Sentences on what the plan leaves out."""
    sentences = []
    for name, kept, all_ in (("images", plan.images, images), ("times", plan.times, times)):
        if len(kept) < all_:
            sentences.append(f"{len(kept)} of {all_} {name} are shown.")
    for name, level in (("inner", plan.inner), ("outer", plan.outer)):
        heads = getattr(model, name).num_heads
        if not level.layers:
            continue
        if len(level.layers) < model.blocks(name):
            sentences.append(f"{len(level.layers)} of {model.blocks(name)} {name} layers are shown patch by patch.")
        if not level.heads and heads > 1:
            sentences.append(f"The {heads} {name} heads are averaged.")
        if not level.matrices:
            sentences.append(f"The weights of the {name} level are too large for a page: only their summary is shown.")
    return sentences
