"""Maps as PNG figures. Every function gives a matplotlib figure."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from dit_in_dit.attention_maps.attention import LevelAttention
from dit_in_dit.attention_maps.findings import missing_parts
from dit_in_dit.attention_maps.plan import evenly
from dit_in_dit.attention_maps.record import Maps
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.data.picture import Array
from dit_in_dit.metrics.pixels import Spectrum
from dit_in_dit.model.aggregate import AGGREGATORS
from dit_in_dit.reporting.images import to_pixels
from dit_in_dit.reporting.plots import COLOURS, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NARROWEST, TITLE_LINE = 5.0, 0.19  # inches: a figure's width, and a line of its title
CELL = 1.25  # inches of a picture
COLUMNS, ROWS = 9, 6  # most pictures in a figure
WEIGHTS = "GnBu"  # light is little


def figures(maps: Maps, classes: tuple[str, ...]) -> Iterator[tuple[str, str, Figure]]:
    """Every figure that this model has: file name, what it shows, figure."""
    why = missing_parts(maps.config.model)
    if maps.inner:
        if maps.inner.tokens.per_patch > 1:
            yield "inner-attention.png", "who sees whom inside a patch, averaged", average(maps, maps.inner)
        yield "inner-attention-images.png", "what inner attention looks at, over the images", received(maps, maps.inner)
    yield "attention-over-t.png", "entropy and locality of every layer and head over t", over_time(maps)
    yield "outer-attention.png", "where the middle patch looks at the outer level", outer(maps)
    if "aggregation" not in why:
        yield "aggregation.png", "what each sub-patch weighs when a patch's token is made", aggregation(maps)
    if maps.contribution:
        yield "contribution.png", "the inner path's share of every patch, over t", contribution(maps)
    if maps.without is not None:
        yield "inner-draws.png", "the image estimate with and without the inner path, over t", draws(maps)
        yield "inner-on-off.png", "samples of the same noise with and without the inner path", on_off(maps, classes)
    yield "trajectories.png", "from noise to images: x_t and the image estimate", trajectories(maps, classes)


# ----------------------------------------------------------------------------------------- helpers


def _panels(rows: int, columns: int, size: float = CELL, aspect: float = 1.0, right: float = 0.9) -> tuple[Figure, Any]:
    """A figure of bare pictures; aspect is height over width, `right` inches stay for a colour bar."""
    made, axes = figure(rows, columns, width=size, height=size * aspect)
    width, height = made.get_size_inches()
    made.set_size_inches(width + right + 0.3, height + 0.6)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    return made, axes


def _title(made: Figure, text: str) -> None:
    """A title with room of its own: one picture is narrower than its words."""
    width, height = made.get_size_inches()
    lines = fill(text, int(10.5 * max(width, NARROWEST)))
    made.set_size_inches(max(width, NARROWEST), height + TITLE_LINE * lines.count("\n"))
    made.suptitle(lines)


def _aspect(model: ModelConfig) -> float:
    return model.image_size[0] / model.image_size[1]


def _show(axis: Any, image: Array) -> None:
    """An image (C, H, W) in [-1, 1]."""
    pixels = to_pixels(torch.from_numpy(image[None]))[0]
    axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255)


def _over(axis: Any, values: Array, image: Array, low: float, high: float) -> Any:
    """Values (rows, columns) laid over an image in light grey; gives the colour scale."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    height, width = image.shape[1:]
    scale = ScalarMappable(Normalize(low, high), colormaps[WEIGHTS])
    cells = [np.arange(side) * count // side for side, count in ((height, values.shape[0]), (width, values.shape[1]))]
    colours = scale.to_rgba(values)[np.ix_(*cells)][..., :3]
    axis.imshow(colours * pale(image)[..., None])
    return scale


def pale(image: Array) -> NDArray[np.float64]:
    """Brightness (H, W) from 0.7 to 1, to be multiplied with a map's colours."""
    grey = to_pixels(torch.from_numpy(image[None]))[0].mean(-1) / 255
    return 0.7 + 0.3 * grey


def image_of_patches(values: Array, model: ModelConfig) -> Array:
    """(T,) or (T, S) -> (rows, columns) of patches or sub-patches."""
    (h, w), i = model.grid, model.sub_grid
    if values.ndim == 1:
        return values.reshape(h, w)
    return rearrange(values, "(h w) (i j) -> (h i) (w j)", h=h, i=i, j=i)


def _bar(made: Figure, scale: Any, axes: Any, text: str) -> None:
    made.colorbar(scale, ax=axes, shrink=0.6, aspect=30, label=text)


def _spread(length: int, most: int) -> tuple[int, ...]:
    return evenly(tuple(range(length)), most)


def _plot_below(made: Figure, axes: Any) -> Any:
    """One plot in place of the last two rows of pictures."""
    for axis in axes[-2:].flat:
        axis.remove()
    plot = made.add_subplot(axes[0, 0].get_gridspec()[-2:, :])
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    return plot


# --------------------------------------------------------------------------------------- attention


def average(maps: Maps, level: LevelAttention) -> Figure:
    """Weights inside a patch, mean over images and patches: a small map for each looking sub-patch, at its place."""
    side = maps.config.model.sub_grid
    rows = [(layer, head) for layer in _spread(len(level.blocks), 4) for head in _spread(level.average.shape[2], 2)]
    columns = _spread(len(maps.views.times), 5)
    made, axes = _panels(len(rows), len(columns), 1.7)
    made.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr, call-arg]
    shown = np.stack([level.average[list(columns), layer, head] for layer, head in rows])
    for (layer, head), line, values in zip(rows, axes, shown, strict=True):
        for k, axis, weights in zip(columns, line, values, strict=True):
            small = weights.reshape(side, side, side, side).transpose(0, 2, 1, 3)  # place down, key down, ...
            padded = np.pad(small, ((0, 0), (0, 1), (0, 0), (0, 1)), constant_values=np.nan)
            drawn = axis.imshow(padded.reshape(side * (side + 1), -1)[:-1, :-1], WEIGHTS, vmin=0, vmax=shown.max())
            if (layer, head) == rows[0]:
                axis.set_title(f"t = {maps.views.times[k]:g}")
        line[0].set_ylabel(f"{level.blocks[layer]}\nhead {head}", fontsize=8)
    if shown.max() > 0:
        _bar(made, drawn, axes, f"weight (all alike: {1 / level.tokens.length:.3g})")
    _title(made, "Who sees whom inside a patch: each small square is what the sub-patch at its place looks at")
    return made


def received(maps: Maps, level: LevelAttention) -> Figure:
    """What a sub-patch gets from all that see it, over the images; the last layer that is kept, mean over heads."""
    model, plan = maps.config.model, maps.plan
    rows, columns = _spread(len(plan.images), ROWS), _spread(len(plan.times), COLUMNS - 4)
    made, axes = _panels(len(rows), len(columns) + 1, aspect=_aspect(model))
    values = level.received[list(rows)][:, list(columns), -1].mean(2)
    high = max(float(np.quantile(values, 0.999)), 1.0)
    for n, line, maps_of_image in zip(rows, axes, values, strict=True):
        image = maps.views.images[plan.images[n]]
        _show(line[0], image)
        for k, axis, weights in zip(columns, line[1:], maps_of_image, strict=True):
            scale = _over(axis, weights.reshape(level.tokens.grid), image, 0, high)
            if n == rows[0]:
                axis.set_title(f"t = {maps.views.times[plan.times[k]]:g}")
    _bar(made, scale, axes, "weight received (mean 1)")
    _title(made, f"What inner attention looks at: {level.blocks[level.plan.layers[-1]]}, mean over heads")
    return made


def over_time(maps: Maps) -> Figure:
    """Entropy, weight on itself and distance of every layer over t; thin lines are single heads."""
    levels = [(name, level) for name, level in (("inner", maps.inner), ("outer", maps.outer)) if level]
    made, axes = figure(len(levels), 3, width=3.6, height=2.8)
    times, mark = maps.views.times, "-" if len(maps.views.times) > 1 else "o"
    for (name, level), line in zip(levels, axes, strict=True):
        token, seen = ("sub-patch" if name == "inner" else "patch"), level.tokens.length
        for axis, values, even, text in (
            (line[0], level.entropy, 1.0, f"{name} entropy / log {seen}"),
            (line[1], level.own, 1 / seen, f"{name}: weight on itself"),
            (line[2], level.distance, level.tokens.even_distance, f"{name}: mean distance / {token}es"),
        ):
            curves = values.mean((0, 4))  # K layers heads
            layers = _spread(len(level.blocks), len(COLOURS))
            for layer, colour in zip(layers, COLOURS, strict=False):
                mean, label = curves[:, layer].mean(1), f"block {layer}"
                axis.plot(times, curves[:, layer], mark, color=colour, alpha=0.3, linewidth=0.8)
                axis.plot(times, mean, mark, color=colour, label=label, linewidth=2)
            axis.axhline(even, color="0.4", linestyle=":", label="all alike")
            axis.set(xlabel="time t (1: noise)", ylabel=text, xlim=(0, 1))
            axis.set_ylim(0, None)
        line[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    _title(made, "Attention over t, mean over images and patches; thin: single heads")
    return made


def outer(maps: Maps) -> Figure:
    """Outer attention from one patch in the middle, mean over heads, by layer and time."""
    model, plan, level = maps.config.model, maps.plan, maps.outer
    (h, w), p = model.grid, model.patch_size
    patch = h // 2 * w + w // 2
    layers, columns = _spread(len(level.plan.layers), ROWS), _spread(len(plan.times), 5)
    made, axes = _panels(len(layers), len(columns) + 1, aspect=_aspect(model))
    _title(
        made,
        "Where the middle patch looks at the outer level, mean over heads"
        if level.reach.size
        else "What outer attention looks at, mean over heads and patches",
    )
    image = maps.views.images[plan.images[0]]
    values = level.reach[0, :, :, :, patch].mean(2) if level.reach.size else level.received[0].mean(2)
    high = float(values.max())
    for layer, line in zip(layers, axes, strict=True):
        _show(line[0], image)
        line[0].set_ylabel(level.blocks[level.plan.layers[layer]], fontsize=8)
        for k, axis in zip(columns, line[1:], strict=True):
            scale = _over(axis, values[k, layer].reshape(h, w), image, 0, high)
            if layer == layers[0]:
                axis.set_title(f"t = {maps.views.times[plan.times[k]]:g}")
        for axis in line if level.reach.size else ():
            corner = (patch % w * p - 0.5, patch // w * p - 0.5)
            axis.add_patch(_outline(corner, p))
    _bar(made, scale, axes, f"weight (all alike: {1 / level.tokens.length:.3g})")
    return made


def _outline(corner: tuple[float, float], side: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, side, side, fill=False, edgecolor=COLOURS[1], linewidth=1.5)


# ------------------------------------------------------------------------------------ the inner path


def aggregation(maps: Maps) -> Figure:
    """What each sub-patch weighs in its patch: by position and head, and over the images."""
    model = maps.config.model
    name, found = list(maps.aggregation.items())[-1]
    columns = _spread(len(maps.views.times), 5)
    if (
        AGGREGATORS[model.inner.aggregate].weights_depend_on == "position"
    ):  # learned: alike in all patches, images and times
        made, axes = _panels(1, 1, 3)
        weights = found.position[0, 0].reshape(model.sub_grid, -1)
        _bar(made, axes[0, 0].imshow(weights, WEIGHTS), axes, f"weight (starts at {1 / model.sub_patches:.3g})")
        _title(made, f"{name}: learned weights\nof the sub-patch positions")
        return made
    heads, images = _spread(found.position.shape[1], 4), _spread(len(maps.views.images), ROWS)
    made, axes = _panels(len(heads) + len(images), len(columns) + 1, aspect=_aspect(model))
    positions, values = found.position[list(columns)][:, list(heads)], found.maps[list(images)][:, list(columns)]
    for j, head in enumerate(heads):
        axes[j, 0].text(
            0.5, 0.5, f"head {head},\nmean over\npatches", ha="center", va="center", transform=axes[j, 0].transAxes
        )
        for axis, weights in zip(axes[j, 1:], positions[:, j], strict=True):
            drawn = axis.imshow(
                weights.reshape(model.sub_grid, -1), WEIGHTS, vmin=positions.min(), vmax=positions.max()
            )
    _bar(made, drawn, axes[: len(heads)], "weight")
    for n, line, of_image in zip(images, axes[len(heads) :], values, strict=True):
        _show(line[0], maps.views.images[n])
        for axis, weights in zip(line[1:], of_image, strict=True):
            scale = _over(axis, image_of_patches(weights, model), maps.views.images[n], 0, float(values.max()))
    _bar(made, scale, axes[len(heads) :], f"weight (all alike: {1 / model.sub_patches:.3g})")
    for k, axis in zip(columns, axes[0, 1:], strict=True):
        axis.set_title(f"t = {maps.views.times[k]:g}")
    _title(made, f"{name} ({model.inner.aggregate}): what each sub-patch weighs; over images: mean over heads")
    return made


def contribution(maps: Maps) -> Figure:
    """The inner path's share of every patch, as maps and over t."""
    model = maps.config.model
    name, shares = list(maps.contribution.items())[-1]
    images, columns = _spread(len(maps.views.images), ROWS), _spread(len(maps.views.times), 5)
    made, axes = _panels(len(images) + 2, len(columns) + 1, aspect=_aspect(model))
    values = shares[list(images)][:, list(columns)]
    limits = float(values.min()), float(values.max()) + 1e-6
    for n, line, of_image in zip(images, axes, values, strict=False):
        _show(line[0], maps.views.images[n])
        for k, axis, share in zip(columns, line[1:], of_image, strict=True):
            scale = _over(axis, image_of_patches(share, model), maps.views.images[n], *limits)
            if n == images[0]:
                axis.set_title(f"t = {maps.views.times[k]:g}")
    _bar(made, scale, axes[: len(images)], "share of the norm")
    plot = _plot_below(made, axes)
    for (place, share), colour in zip(list(maps.contribution.items())[-len(COLOURS) :], COLOURS, strict=False):
        plot.plot(maps.views.times, share.mean((0, 2)), color=colour, marker="o", markersize=3, label=place)
        low, high = np.quantile(share, (0.1, 0.9), axis=(0, 2))
        plot.fill_between(maps.views.times, low, high, color=colour, alpha=0.15, linewidth=0)
    plot.set(xlabel="time t (1: noise)", ylabel="share of the norm", xlim=(0, 1), ylim=(0, 1))
    plot.legend(fontsize=8)
    _title(made, f"The inner path's share of each patch ({name}); curve: mean and middle 80% of the patches")
    return made


def draws(maps: Maps) -> Figure:
    """Image estimates at the same x_t with the inner path on and off, their difference, and its power spectrum."""
    assert maps.without is not None
    images, columns = _spread(len(maps.views.images), 2), _spread(len(maps.views.times), 5)
    made, axes = _panels(4 * len(images) + 2, len(columns), aspect=_aspect(maps.config.model), right=0)
    for row, n in enumerate(images):
        for line, text, pictures in (
            (axes[4 * row], "noisy $x_t$", maps.noisy),
            (axes[4 * row + 1], "estimate", maps.estimate),
            (axes[4 * row + 2], "inner off", maps.without),
            (axes[4 * row + 3], "difference", maps.estimate - maps.without),
        ):
            line[0].set_ylabel(text, fontsize=8)
            for k, axis in zip(columns, line, strict=True):
                _show(axis, pictures[n, k])
    for k, axis in zip(columns, axes[0], strict=True):
        axis.set_title(f"t = {maps.views.times[k]:g}")
    plot = _plot_below(made, axes)
    frequency, power = spectra(maps.estimate - maps.without)
    for k in columns:
        shade = str(round(0.75 * maps.views.times[k], 3))
        plot.plot(frequency, power[k], color=shade, label=f"difference, t = {maps.views.times[k]:g}")
    plot.plot(frequency, spectra(maps.views.images[:, None])[1][0], color=COLOURS[1], label="the images themselves")
    _spectrum_axes(plot)
    _title(made, "What the inner path draws: the image estimate with it on and off (grey: no difference)")
    return made


def on_off(maps: Maps, classes: tuple[str, ...]) -> Figure:
    """Samples with the inner path on and off, their difference, and the power spectra."""
    found = maps.draws
    assert found.off is not None
    columns = _spread(len(found.on), 8)
    made, axes = _panels(5, max(len(columns), 4), aspect=_aspect(maps.config.model), right=0)
    for line, text, pictures in (
        (axes[0], "inner on", found.on),
        (axes[1], "inner off", found.off),
        (axes[2], "difference", found.on - found.off),
    ):
        line[0].set_ylabel(text)
        for i, axis in zip(columns, line, strict=False):
            _show(axis, pictures[i])
    for i, axis in zip(columns, axes[0], strict=False):
        axis.set_title(_name(found.labels[i], classes), fontsize=8)
    plot = _plot_below(made, axes)
    for (text, pictures), colour in zip(
        (("on", found.on), ("off", found.off), ("difference", found.on - found.off)), COLOURS, strict=False
    ):
        frequency, power = spectra(pictures[:, None])
        plot.plot(frequency, power[0], color=colour, label=f"inner {text}" if text != "difference" else text)
    _spectrum_axes(plot)
    _title(made, "The same noise with the inner path on and off (grey: no difference)")
    return made


def spectra(images: Array) -> tuple[Array, Array]:
    """Radial frequencies in cycles a pixel (bins,), and mean power of images (N, K, C, H, W) at each, (K, bins)."""
    spectrum = Spectrum(*images.shape[-2:])
    powers = [spectrum(images[:, k]).mean(0) for k in range(images.shape[1])]
    return spectrum.frequency.astype(np.float32), np.stack(powers).astype(np.float32)


def _spectrum_axes(plot: Any) -> None:
    plot.set(xlabel="frequency / cycles a pixel", ylabel="power", yscale="log")
    plot.legend(fontsize=7, loc="upper right", ncols=2)


def _name(number: int, classes: tuple[str, ...]) -> str:
    return classes[number] if number < len(classes) else ""


def trajectories(maps: Maps, classes: tuple[str, ...]) -> Figure:
    """The way of some samples: x_t above, the image that the prediction amounts to below."""
    found = maps.draws
    columns = _spread(len(found.times), COLUMNS)
    made, axes = _panels(2 * found.noisy.shape[1], len(columns), aspect=_aspect(maps.config.model), right=0)
    for i in range(found.noisy.shape[1]):
        for call, above, below in zip(columns, axes[2 * i], axes[2 * i + 1], strict=True):
            _show(above, found.noisy[call, i])
            _show(below, found.estimate[call, i])
        axes[2 * i, 0].set_ylabel(f"{_name(found.labels[i], classes)}\n$x_t$", fontsize=8)
        axes[2 * i + 1, 0].set_ylabel("estimate", fontsize=8)
    for call, axis in zip(columns, axes[0], strict=True):
        axis.set_title(f"t = {found.times[call]:.2f}", fontsize=8)
    how = maps.config.sample
    _title(made, f"From noise to images: {how.sampler}, {how.steps} steps, guidance {how.guidance:g}")
    return made
