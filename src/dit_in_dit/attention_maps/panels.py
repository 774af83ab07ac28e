"""Parts that the figures share: panels of images, overlays, titles and colour bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange

from dit_in_dit.attention_maps.plan import evenly_chosen
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.data.picture import Array
from dit_in_dit.reporting.images import to_pixels
from dit_in_dit.reporting.plots import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NARROWEST, TITLE_LINE = 5.0, 0.19  # inches: least width of a figure, and height of a line of its title
PANEL = 1.25  # inches per panel
MOST_COLUMNS, MOST_ROWS = 5, 6  # most times, and most images or layers, in a figure
WEIGHT_COLOURS = "GnBu"  # colour map; small values are light


def grid(
    rows: int, columns: int, title: str, *, model: ModelConfig | None = None, size: float = PANEL, right: float = 0.9
) -> tuple[Figure, Any]:
    """A figure of panels without ticks, and its axes (rows, columns).

    Panels are `size` inches wide, with the proportions of the model's images (square without a model), and leave
    `right` inches at the right for a colour bar.
    """
    aspect = model.image_size[0] / model.image_size[1] if model else 1.0
    fig, axes = figure(rows, columns, width=size, height=size * aspect)
    width, height = fig.get_size_inches()
    fig.set_size_inches(width + right + 0.3, height + 0.6)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    set_title(fig, title)
    return fig, axes


def set_title(fig: Figure, text: str) -> None:
    """Add a wrapped title, and enlarge the figure for it."""
    width, height = fig.get_size_inches()
    lines = fill(text, int(10.5 * max(width, NARROWEST)))
    fig.set_size_inches(max(width, NARROWEST), height + TITLE_LINE * lines.count("\n"))
    fig.suptitle(lines)


def set_times(axes: Any, times: Sequence[float], form: str = "g", **style: Any) -> None:
    """Write a time above each panel of a row."""
    for axis, t in zip(axes, times, strict=True):
        axis.set_title(f"t = {t:{form}}", **style)


def show_image(axis: Any, image: Array) -> None:
    """Show an image (C, H, W) in [-1, 1]."""
    pixels = to_pixels(torch.from_numpy(image[None]))[0]
    axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255)


def overlay(axis: Any, values: Array, image: Array, low: float, high: float) -> Any:
    """Show values (rows, columns) over a pale image (C, H, W); returns the colour scale, from `low` to `high`."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    height, width = image.shape[1:]
    scale = ScalarMappable(Normalize(low, high), colormaps[WEIGHT_COLOURS])
    cells = [np.arange(side) * count // side for side, count in ((height, values.shape[0]), (width, values.shape[1]))]
    colours = scale.to_rgba(values)[np.ix_(*cells)][..., :3]
    grey = to_pixels(torch.from_numpy(image[None]))[0].mean(-1) / 255
    axis.imshow(colours * (0.7 + 0.3 * grey)[..., None])  # pale: a factor of 0.7 to 1
    return scale


def overlay_rows(fig: Figure, axes: Any, images: Array, values: Array, limits: tuple[float, float], text: str) -> None:
    """Show a row for each image (N, C, H, W): the image, then its values (N, K, rows, columns) over it, one by one.
    A colour bar shows the limits."""
    for line, image, of_image in zip(axes, images, values, strict=True):
        show_image(line[0], image)
        for axis, shown in zip(line[1:], of_image, strict=True):
            scale = overlay(axis, shown, image, *limits)
    colour_bar(fig, scale, axes, text)


def image_of_patches(values: Array, model: ModelConfig) -> Array:
    """Arrange values (..., T, S) of sub-patches, or (..., T, 1) of patches, as in the image, (..., rows, columns)."""
    (h, w), i = model.grid, math.isqrt(values.shape[-1])
    return rearrange(values, "... (h w) (i j) -> ... (h i) (w j)", h=h, i=i, w=w, j=i)


def colour_bar(fig: Figure, scale: Any, axes: Any, text: str) -> None:
    """Add a colour bar to the right of some axes."""
    fig.colorbar(scale, ax=axes, shrink=0.6, aspect=30, label=text)


def evenly_spaced(length: int, most: int) -> list[int]:
    """At most `most` numbers below `length`, evenly spaced, both ends included."""
    return list(evenly_chosen(range(length), most))


def plot_below(fig: Figure, axes: Any) -> Any:
    """Replace the last two rows of panels by one plot."""
    for axis in axes[-2:].flat:
        axis.remove()
    plot = fig.add_subplot(axes[0, 0].get_gridspec()[-2:, :])
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    return plot
