"""Figures of attention weights at both levels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dit_in_dit.attention_maps import panels
from dit_in_dit.attention_maps.attention import LevelAttention
from dit_in_dit.attention_maps.panels import evenly_spaced
from dit_in_dit.attention_maps.record import Maps
from dit_in_dit.reporting.plots import COLOURS, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_inside_patches(maps: Maps, level: LevelAttention) -> Figure:
    """Plot the weights inside a patch (mean over images and patches): one small map at the position of each query."""
    side = maps.config.model.sub_grid
    blocks, heads = evenly_spaced(len(level.blocks), 4), evenly_spaced(level.average.shape[2], 2)
    rows = [(layer, head) for layer in blocks for head in heads]
    columns = evenly_spaced(len(maps.views.times), panels.MOST_COLUMNS)
    title = "Who sees whom inside a patch: each small square is what the sub-patch at its place looks at"
    fig, axes = panels.grid(len(rows), len(columns), title, size=1.7)
    fig.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr, call-arg]
    weights = np.stack([level.average[columns, layer, head] for layer, head in rows])
    for (layer, head), line, values in zip(rows, axes, weights, strict=True):
        for axis, matrix in zip(line, values, strict=True):
            squares = matrix.reshape(side, side, side, side).transpose(0, 2, 1, 3)  # query row, key row, ...
            padded = np.pad(squares, ((0, 0), (0, 1), (0, 0), (0, 1)), constant_values=np.nan)
            image = padded.reshape(side * (side + 1), -1)[:-1, :-1]
            shown = axis.imshow(image, panels.WEIGHT_COLOURS, vmin=0, vmax=weights.max())
        line[0].set_ylabel(f"{level.blocks[layer]}\nhead {head}", fontsize=8)
    panels.set_times(axes[0], [maps.views.times[k] for k in columns])
    if weights.max() > 0:
        panels.colour_bar(fig, shown, axes, f"weight (all alike: {1 / level.tokens.length:.3g})")
    return fig


def draw_received(maps: Maps, level: LevelAttention) -> Figure:
    """Plot over the images the weight that each sub-patch receives in the last recorded layer (mean over heads)."""
    plan = maps.plan
    rows = evenly_spaced(len(plan.images), panels.MOST_ROWS)
    columns = evenly_spaced(len(plan.times), panels.MOST_COLUMNS)
    title = f"What inner attention looks at: {level.blocks[level.plan.layers[-1]]}, mean over heads"
    fig, axes = panels.grid(len(rows), len(columns) + 1, title, model=maps.config.model)
    values = level.received[rows][:, columns, -1].mean(2)
    limits = 0, max(float(np.quantile(values, 0.999)), 1.0)
    images = maps.views.images[[plan.images[n] for n in rows]]
    weights = values.reshape(*values.shape[:2], *level.tokens.grid)
    panels.overlay_rows(fig, axes, images, weights, limits, "weight received (mean 1)")
    panels.set_times(axes[0, 1:], [maps.views.times[plan.times[k]] for k in columns])
    return fig


def draw_over_time(maps: Maps) -> Figure:
    """Plot each layer's entropy, weight of a query on itself, and distance over t; thin lines are single heads."""
    levels = [(name, level) for name, level in (("inner", maps.inner), ("outer", maps.outer)) if level]
    fig, axes = figure(len(levels), 3, width=3.6, height=2.8)
    times, mark = maps.views.times, "-" if len(maps.views.times) > 1 else "o"
    for (name, level), line in zip(levels, axes, strict=True):
        token, length = ("sub-patch" if name == "inner" else "patch"), level.tokens.length
        for axis, values, even, text in (
            (line[0], level.entropy, 1.0, f"{name} entropy / log {length}"),
            (line[1], level.own, 1 / length, f"{name}: weight on itself"),
            (line[2], level.distance, level.tokens.even_distance, f"{name}: mean distance / {token}es"),
        ):
            curves = values.mean((0, 4))  # K layers heads
            for layer, colour in zip(evenly_spaced(len(level.blocks), len(COLOURS)), COLOURS, strict=False):
                mean, label = curves[:, layer].mean(1), f"block {layer}"
                axis.plot(times, curves[:, layer], mark, color=colour, alpha=0.3, linewidth=0.8)
                axis.plot(times, mean, mark, color=colour, label=label, linewidth=2)
            axis.axhline(even, color="0.4", linestyle=":", label="all alike")
            axis.set(xlabel="time t (1: noise)", ylabel=text, xlim=(0, 1))
            axis.set_ylim(0, None)
        line[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    panels.set_title(fig, "Attention over t, mean over images and patches; thin: single heads")
    return fig


def draw_outer(maps: Maps) -> Figure:
    """Plot outer attention by layer and time, mean over heads: that of the middle patch or, if only summaries are
    kept, the weight that each patch receives."""
    from matplotlib.patches import Rectangle

    model, plan, level = maps.config.model, maps.plan, maps.outer
    (h, w), side, has_reach = model.grid, model.patch_size, bool(level.reach.size)
    layers = evenly_spaced(len(level.plan.layers), panels.MOST_ROWS)
    columns = evenly_spaced(len(plan.times), panels.MOST_COLUMNS)
    looks = "Where the middle patch looks at the outer level, mean over heads"
    title = looks if has_reach else "What outer attention looks at, mean over heads and patches"
    fig, axes = panels.grid(len(layers), len(columns) + 1, title, model=model)
    values = level.reach[0, :, :, :, h // 2 * w + w // 2].mean(2) if has_reach else level.received[0].mean(2)
    shown = values[columns][:, layers].swapaxes(0, 1).reshape(len(layers), len(columns), h, w)
    images = maps.views.images[[plan.images[0]] * len(layers)]
    text = f"weight (all alike: {1 / level.tokens.length:.3g})"
    panels.overlay_rows(fig, axes, images, shown, (0, float(values.max())), text)
    for layer, line in zip(layers, axes, strict=True):
        line[0].set_ylabel(level.blocks[level.plan.layers[layer]], fontsize=8)
    for axis in axes.flat if has_reach else ():
        corner = w // 2 * side - 0.5, h // 2 * side - 0.5
        axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=COLOURS[1], linewidth=1.5))
    panels.set_times(axes[0, 1:], [maps.views.times[plan.times[k]] for k in columns])
    return fig
