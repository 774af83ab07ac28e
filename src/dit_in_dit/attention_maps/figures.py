"""Maps as PNG figures with file names. A model has only the figures of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dit_in_dit.attention_maps import attention_figures as attention
from dit_in_dit.attention_maps import inner_figures as inner
from dit_in_dit.attention_maps.findings import missing_parts
from dit_in_dit.attention_maps.record import Maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures(maps: Maps, classes: tuple[str, ...]) -> Iterator[tuple[str, str, Figure]]:
    """File name, description and figure of each map that this model has."""
    if maps.inner:
        if maps.inner.tokens.per_patch > 1:
            shows = "who sees whom inside a patch, averaged"
            yield "inner-attention.png", shows, attention.draw_inside_patches(maps, maps.inner)
        shows = "what inner attention looks at, over the images"
        yield "inner-attention-images.png", shows, attention.draw_received(maps, maps.inner)
    yield "attention-over-t.png", "entropy and locality of every layer and head over t", attention.draw_over_time(maps)
    yield "outer-attention.png", "where the middle patch looks at the outer level", attention.draw_outer(maps)
    if "aggregation" not in missing_parts(maps.config.model):
        yield "aggregation.png", "what each sub-patch weighs when a patch's token is made", inner.draw_aggregation(maps)
    if maps.contribution:
        yield "contribution.png", "the inner path's share of every patch, over t", inner.draw_contribution(maps)
    if maps.without is not None:
        shows = "the image estimate with and without the inner path, over t"
        yield "inner-draws.png", shows, inner.draw_estimates(maps)
        shows = "samples of the same noise with and without the inner path"
        yield "inner-on-off.png", shows, inner.draw_sample_pairs(maps, classes)
    yield "trajectories.png", "from noise to images: x_t and the image estimate", inner.draw_trajectories(maps, classes)
