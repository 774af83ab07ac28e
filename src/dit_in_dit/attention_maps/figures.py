"""Maps as PNG figures with file names. A model has only the figures of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dit_in_dit.attention_maps.attention_figures import draw_inside_patches, draw_outer, draw_over_time, draw_received
from dit_in_dit.attention_maps.findings import missing_parts
from dit_in_dit.attention_maps.inner_figures import (
    draw_aggregation,
    draw_contribution,
    draw_estimates,
    draw_sample_pairs,
    draw_trajectories,
)
from dit_in_dit.attention_maps.record import Maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures(maps: Maps, classes: tuple[str, ...]) -> Iterator[tuple[str, str, Figure]]:
    """File name, description and figure of each map that this model has."""
    why = missing_parts(maps.config.model)
    if maps.inner:
        if maps.inner.tokens.per_patch > 1:
            shows = "who sees whom inside a patch, averaged"
            yield "inner-attention.png", shows, draw_inside_patches(maps, maps.inner)
        shows = "what inner attention looks at, over the images"
        yield "inner-attention-images.png", shows, draw_received(maps, maps.inner)
    yield "attention-over-t.png", "entropy and locality of every layer and head over t", draw_over_time(maps)
    yield "outer-attention.png", "where the middle patch looks at the outer level", draw_outer(maps)
    if "aggregation" not in why:
        yield "aggregation.png", "what each sub-patch weighs when a patch's token is made", draw_aggregation(maps)
    if maps.contribution:
        yield "contribution.png", "the inner path's share of every patch, over t", draw_contribution(maps)
    if maps.without is not None:
        yield "inner-draws.png", "the image estimate with and without the inner path, over t", draw_estimates(maps)
        shows = "samples of the same noise with and without the inner path"
        yield "inner-on-off.png", shows, draw_sample_pairs(maps, classes)
    yield "trajectories.png", "from noise to images: x_t and the image estimate", draw_trajectories(maps, classes)
