"""Figures of the inner path: aggregation weights, contribution, and images with the inner path on and off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dit_in_dit.attention_maps import panels
from dit_in_dit.attention_maps.panels import evenly_spaced, show_image
from dit_in_dit.attention_maps.record import Maps
from dit_in_dit.data.picture import Array
from dit_in_dit.metrics.pixels import Spectrum
from dit_in_dit.model.aggregate import AGGREGATORS
from dit_in_dit.reporting.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CALLS = 9  # most steps of a trajectory in a figure


def draw_aggregation(maps: Maps) -> Figure:
    """Plot the sub-patch weights of the last aggregation: by position and head, and as overlays on the images."""
    model = maps.config.model
    name, weights = list(maps.aggregation.items())[-1]
    if AGGREGATORS[model.inner.aggregate].weights_depend_on == "position":  # equal in all patches, images and times
        fig, axes = panels.grid(1, 1, f"{name}: learned weights\nof the sub-patch positions", size=3)
        shown = axes[0, 0].imshow(weights.position[0, 0].reshape(model.sub_grid, -1), panels.WEIGHT_COLOURS)
        panels.colour_bar(fig, shown, axes, f"weight (starts at {1 / model.sub_patches:.3g})")
        return fig
    columns = evenly_spaced(len(maps.views.times), panels.MOST_COLUMNS)
    heads = evenly_spaced(weights.position.shape[1], 4)
    images = evenly_spaced(len(maps.views.images), panels.MOST_ROWS)
    title = f"{name} ({model.inner.aggregate}): what each sub-patch weighs; over images: mean over heads"
    fig, axes = panels.grid(len(heads) + len(images), len(columns) + 1, title, model=model)
    positions, values = weights.position[columns][:, heads], weights.maps[images][:, columns]
    spread = max(float(positions.max() - positions.min()), 1e-3 / model.sub_patches)  # rounding shows no colours
    limits = {"vmin": positions.min(), "vmax": positions.min() + spread}
    for j, head in enumerate(heads):
        text = f"head {head},\nmean over\npatches"
        axes[j, 0].text(0.5, 0.5, text, ha="center", va="center", transform=axes[j, 0].transAxes)
        for axis, of_position in zip(axes[j, 1:], positions[:, j], strict=True):
            shown = axis.imshow(of_position.reshape(model.sub_grid, -1), panels.WEIGHT_COLOURS, **limits)
    panels.colour_bar(fig, shown, axes[: len(heads)], "weight")
    below, text = axes[len(heads) :], f"weight (all alike: {1 / model.sub_patches:.3g})"
    arranged = panels.image_of_patches(values, model)
    panels.overlay_rows(fig, below, maps.views.images[images], arranged, (0, float(values.max())), text)
    panels.set_times(axes[0, 1:], [maps.views.times[k] for k in columns])
    return fig


def draw_contribution(maps: Maps) -> Figure:
    """Plot the inner path's share of every patch: as maps, and as a curve over t."""
    model, times = maps.config.model, maps.views.times
    name, shares = list(maps.contribution.items())[-1]
    images = evenly_spaced(len(maps.views.images), panels.MOST_ROWS)
    columns = evenly_spaced(len(times), panels.MOST_COLUMNS)
    title = f"The inner path's share of each patch ({name}); curve: mean and middle 80% of the patches"
    fig, axes = panels.grid(len(images) + 2, len(columns) + 1, title, model=model)
    values = panels.image_of_patches(shares[images][:, columns, :, None], model)
    limits = float(values.min()), float(values.max()) + 1e-6
    panels.overlay_rows(fig, axes[: len(images)], maps.views.images[images], values, limits, "share of the norm")
    panels.set_times(axes[0, 1:], [times[k] for k in columns])
    plot = panels.plot_below(fig, axes)
    for (place, share), colour in zip(list(maps.contribution.items())[-len(COLOURS) :], COLOURS, strict=False):
        plot.plot(times, share.mean((0, 2)), color=colour, marker="o", markersize=3, label=place)
        low, high = np.quantile(share, (0.1, 0.9), axis=(0, 2))
        plot.fill_between(times, low, high, color=colour, alpha=0.15, linewidth=0)
    plot.set(xlabel="time t (1: noise)", ylabel="share of the norm", xlim=(0, 1), ylim=(0, 1))
    plot.legend(fontsize=8)
    return fig


def draw_estimates(maps: Maps) -> Figure:
    """Plot image estimates at the same x_t with the inner path on and off, their difference, and power spectra."""
    assert maps.without is not None
    images = evenly_spaced(len(maps.views.images), 2)
    columns = evenly_spaced(len(maps.views.times), panels.MOST_COLUMNS)
    times = [maps.views.times[k] for k in columns]
    title = "What the inner path draws: the image estimate with it on and off (grey: no difference)"
    fig, axes = panels.grid(4 * len(images) + 2, len(columns), title, model=maps.config.model, right=0)
    change = maps.estimate - maps.without
    kinds = {"noisy $x_t$": maps.noisy, "estimate": maps.estimate, "inner off": maps.without, "difference": change}
    for row, n in enumerate(images):
        for (text, pictures), line in zip(kinds.items(), axes[len(kinds) * row :], strict=False):
            line[0].set_ylabel(text, fontsize=8)
            for k, axis in zip(columns, line, strict=True):
                show_image(axis, pictures[n, k])
    panels.set_times(axes[0], times)
    plot = panels.plot_below(fig, axes)
    frequency, power = spectra(change)
    for k, t in zip(columns, times, strict=True):
        plot.plot(frequency, power[k], color=str(round(0.75 * t, 3)), label=f"difference, t = {t:g}")
    plot.plot(frequency, spectra(maps.views.images[:, None])[1][0], color=COLOURS[1], label="the images themselves")
    _label_spectrum(plot)
    return fig


def draw_sample_pairs(maps: Maps, classes: tuple[str, ...]) -> Figure:
    """Plot samples with the inner path on and off, their difference, and power spectra."""
    samples = maps.draws
    assert samples.off is not None
    columns = evenly_spaced(len(samples.on), 8)
    title = "The same noise with the inner path on and off (grey: no difference)"
    fig, axes = panels.grid(5, max(len(columns), 4), title, model=maps.config.model, right=0)
    kinds = {"inner on": samples.on, "inner off": samples.off, "difference": samples.on - samples.off}
    for (text, pictures), line in zip(kinds.items(), axes, strict=False):
        line[0].set_ylabel(text)
        for i, axis in zip(columns, line, strict=False):
            show_image(axis, pictures[i])
    for i, axis in zip(columns, axes[0], strict=False):
        axis.set_title(_class_name(samples.labels[i], classes), fontsize=8)
    plot = panels.plot_below(fig, axes)
    for (text, pictures), colour in zip(kinds.items(), COLOURS, strict=False):
        frequency, power = spectra(pictures[:, None])
        plot.plot(frequency, power[0], color=colour, label=text)
    _label_spectrum(plot)
    return fig


def spectra(images: Array) -> tuple[Array, Array]:
    """Radial frequencies (bins,) in cycles per pixel, and mean power (K, bins) of images (N, K, C, H, W)."""
    spectrum = Spectrum(*images.shape[-2:])
    powers = [spectrum(images[:, k]).mean(0) for k in range(images.shape[1])]
    return spectrum.frequency.astype(np.float32), np.stack(powers).astype(np.float32)


def _label_spectrum(plot: Any) -> None:
    plot.set(xlabel="frequency / cycles a pixel", ylabel="power", yscale="log")
    plot.legend(fontsize=7, loc="upper right", ncols=2)


def _class_name(number: int, classes: tuple[str, ...]) -> str:
    return classes[number] if number < len(classes) else ""


def draw_trajectories(maps: Maps, classes: tuple[str, ...]) -> Figure:
    """Plot the sampling steps of some images: x_t above, the image estimate below."""
    samples, settings = maps.draws, maps.config.sample
    columns = evenly_spaced(len(samples.times), MOST_CALLS)
    title = f"From noise to images: {settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g}"
    fig, axes = panels.grid(2 * samples.noisy.shape[1], len(columns), title, model=maps.config.model, right=0)
    for i, (above, below) in enumerate(zip(axes[::2], axes[1::2], strict=True)):
        for line, pictures in ((above, samples.noisy), (below, samples.estimate)):
            for call, axis in zip(columns, line, strict=True):
                show_image(axis, pictures[call, i])
        above[0].set_ylabel(f"{_class_name(samples.labels[i], classes)}\n$x_t$", fontsize=8)
        below[0].set_ylabel("estimate", fontsize=8)
    panels.set_times(axes[0], [samples.times[call] for call in columns], ".2f", fontsize=8)
    return fig
