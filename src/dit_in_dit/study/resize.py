"""Change the depth, width or MLP of a model's outer transformer; the inner transformer stays unchanged."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from dit_in_dit.config.program import MOST_BLOCKS, format_stages
from dit_in_dit.config.run import ModelConfig


def is_fixed(name: str, fixed: Collection[str]) -> bool:
    """Whether `fixed` holds the dotted key, or a group that contains the key."""
    return any(name == key or name.startswith(f"{key}.") for key in fixed)


def with_outer(model: ModelConfig, **values: float) -> ModelConfig:
    """The model with other values of `model.outer`."""
    return replace(model, outer=replace(model.outer, **values))  # type: ignore[arg-type]


def with_hidden(model: ModelConfig, hidden: int) -> ModelConfig:
    """The model with `hidden` units in each outer MLP."""
    width = model.outer.width
    ratio = hidden / width
    exact = int(ratio * width) == hidden  # False: rounding lost a unit
    return with_outer(model, mlp_ratio=ratio if exact else math.nextafter(ratio, math.inf))


def _follows(model: ModelConfig, fixed: Collection[str]) -> bool:
    """Whether the number of inner blocks changes with the number of outer blocks."""
    return model.depth is not None and model.use_inner and is_fixed("model.inner.depth_ratio", fixed)


def depth_limits(model: ModelConfig, fixed: Collection[str]) -> tuple[int, int]:
    """The fewest and the most outer blocks that the model may have."""
    if is_fixed("model.depth", fixed):
        return model.blocks("outer"), model.blocks("outer")
    if not _follows(model, fixed):
        return sum(level == "outer" for level, _ in model.program), MOST_BLOCKS
    ratio = model.inner.depth_ratio
    fewest = math.ceil(2 / ratio) if model.stages == "both" else 1
    return fewest, min(MOST_BLOCKS, int(MOST_BLOCKS / ratio) if ratio else MOST_BLOCKS)


def with_depth(model: ModelConfig, blocks: int, fixed: Collection[str]) -> ModelConfig:
    """The model with `blocks` outer blocks, divided among its outer stages."""
    if blocks == model.blocks("outer"):
        return model
    if _follows(model, fixed):
        return replace(model, depth=blocks)
    shares = iter(_apportion(blocks, [number for level, number in model.program if level == "outer"]))
    program = tuple((level, next(shares) if level == "outer" else number) for level, number in model.program)
    return replace(model, stages=format_stages(program), depth=None)


def _apportion(total: int, weights: list[int]) -> list[int]:
    """Divide `total` into integers in proportion to the weights, each at least 1 (largest-remainder method)."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [max(1, int(share)) for share in exact]
    places = range(len(weights))
    while sum(shares) < total:
        shares[max(places, key=lambda i: exact[i] - shares[i])] += 1
    while sum(shares) > total:
        shares[min((i for i in places if shares[i] > 1), key=lambda i: exact[i] - shares[i])] -= 1
    return shares
