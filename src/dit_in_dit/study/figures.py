"""The pictures of a study of named arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dit_in_dit.config.errors import UserError
from dit_in_dit.metrics.metric import WORDS, direction, metric_of
from dit_in_dit.reporting import images as pictures
from dit_in_dit.reporting.document import Picture
from dit_in_dit.reporting.plots import COLOURS, figure, figure_png
from dit_in_dit.runs import atomic
from dit_in_dit.study import formatting
from dit_in_dit.study.results import StudyResults
from dit_in_dit.study.statistics import Difference
from dit_in_dit.study.tables import BESIDE, training_seconds

BETTER, WORSE, UNSEEN = COLOURS[0], COLOURS[1], "#8a97a3"
MARKERS = "osD^vP*X"
LONGEST = 56  # characters of an arm's name in a picture
WIDEST = 800  # pixels of a row of samples
SAMPLES = 16
SAMPLE_PIXELS = 96  # least side of a sample in a picture: images of 32 pixels are enlarged 3 times


def picture_label(name: str, most: int = LONGEST) -> str:
    """A name for a picture, cut to `most` characters; characters with a meaning in matplotlib are escaped."""
    short = name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"
    return short.replace("$", r"\$").removeprefix("_") or "arm"


def save_picture(out: Path, name: str, png: bytes, caption: str) -> Picture:
    """Write a PNG into the study's folder of figures; returns it as a part of the report."""
    path = out / "figures" / f"{name}.png"
    atomic.write_atomic(path, png)
    return Picture(path, caption)


def verdict_colour(metric: str, change: Difference) -> str:
    if not change.marked:
        return UNSEEN
    return BETTER if metric_of(metric).better(change.mean) else WORSE


def draw_matrix(study: StudyResults) -> bytes:
    """Plot every arm's difference in every ranked metric; a cell is coloured if the interval excludes zero."""
    from matplotlib.patches import Rectangle

    metrics, arms = study.ranked, study.drawn
    page, axes = figure(1, 1, width=2.4 + 0.55 * len(arms), height=1.9 + 0.24 * len(metrics))
    axis = axes[0, 0]
    axis.grid(visible=False)
    for row, metric in enumerate(metrics):
        for column, arm in enumerate(arms):
            change = study.difference(arm, metric)
            ground = {BETTER: "#bcdcf0", WORSE: "#f6cfae"}.get(verdict_colour(metric, change), "#f3f5f6")
            corner = column - 0.48, row - 0.46
            axis.add_patch(Rectangle(corner, 0.96, 0.92, facecolor=ground, edgecolor="none"))
            text = formatting.format_difference(metric, change).replace(" %", "")
            weight = "bold" if change.marked else "normal"
            ink = "black" if change.marked else "#66737e"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, weight=weight, color=ink)
    axis.set(xlim=(-0.5, len(arms) - 0.5), ylim=(len(metrics) - 0.5, -0.5))
    turned = {"rotation": 45, "ha": "left"} if len(arms) > 2 else {}
    axis.set_xticks(range(len(arms)), [picture_label(arm.name) for arm in arms], fontsize=8, **turned)
    axis.xaxis.tick_top()
    signs = {"lower": "%", "higher": "%, higher is better", "zero": "to 0"}
    heads = [f"{metric}  ({signs[direction(metric)]})" for metric in metrics]
    axis.set_yticks(range(len(metrics)), heads, fontsize=8)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return figure_png(page, colours=256)


def draw_pareto(study: StudyResults) -> bytes:
    """Plot the primary metric and its intervals, once against MACs and once against step time."""
    arms = [arm for arm in study.shown if study.estimate(arm.name, study.primary) is not None]
    panels: dict[str, list[float | None]] = {
        "million MACs per image (forward)": [arm.cost["macs"] / 1e6 for arm in arms]
    }
    spent = [training_seconds(study, arm.name) for arm in arms]
    if all("time" in arm.cost for arm in arms):
        step_time = "milliseconds of a training step, as measured when planned"
        panels[step_time] = [1e3 * arm.cost["time"] for arm in arms]
    elif any(seconds is not None for seconds in spent):
        panels[f"training, seconds ({BESIDE})"] = spent
    page, axes = figure(1, len(panels), width=5.2, height=3.6 + 0.1 * len(arms))
    for axis, (name, costs) in zip(axes[0], panels.items(), strict=True):
        known = [x for x in costs if x]
        wide = bool(known) and max(known) > 3 * min(known)
        if wide:
            axis.set_xscale("log")
        elif known:
            axis.ticklabel_format(axis="x", useOffset=False)
            middle, half = (max(known) + min(known)) / 2, 0.56 * _span(costs)
            axis.set_xlim(middle - half, middle + half)
        for number, (arm, x) in enumerate(zip(arms, costs if wide else _apart(costs), strict=True)):
            estimate = study.estimate(arm.name, study.primary)
            if estimate is None or x is None or not math.isfinite(estimate.mean):
                continue
            colour = COLOURS[number % len(COLOURS)]
            if estimate.low is not None and estimate.high is not None:
                axis.vlines(x, estimate.low, estimate.high, color=colour, alpha=0.35, linewidth=2)
            control = arm.name == study.plan.control.name
            looks: dict[str, Any] = {"markersize": 10, "markeredgecolor": "black"} if control else {"markersize": 6}
            marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
            axis.plot(x, estimate.mean, marker, color=colour, label=picture_label(arm.name), linestyle="none", **looks)
        axis.set_xlabel(name)
    axes[0, 0].set_ylabel(f"{study.primary}\n({WORDS[direction(study.primary)].split(':')[0]})")
    lines, names = axes[0, 0].get_legend_handles_labels()
    columns = max(1, min(3, 72 * len(panels) // (8 + max(map(len, names), default=0))))  # characters that fit
    page.legend(lines, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    kind = "mean over seeds; line: 95% interval" if len(study.plan.study.seeds) > 1 else "one seed"
    page.suptitle(f"{kind}; points of one cost are drawn a little apart", fontsize=8)
    return figure_png(page, colours=256)


def _span(costs: Sequence[float | None]) -> float:
    """The range of a cost axis: at least a tenth of the largest cost, so that matched arms do not look far apart."""
    known = [x for x in costs if x is not None]
    return max(max(known) - min(known), 0.1 * max(known)) if known else 1.0


def _apart(costs: Sequence[float | None]) -> list[float | None]:
    """The costs, with nearly equal costs moved apart so that every point is visible."""
    step = 0.016 * _span(costs)
    moved, left = list(costs), sorted((x, i) for i, x in enumerate(costs) if x is not None)
    while left:
        near = [(x, i) for x, i in left if x - left[0][0] < step]
        for place, (x, i) in enumerate(near):
            moved[i] = x + (place - (len(near) - 1) / 2) * step
        left = left[len(near) :]
    return moved


def draw_samples(rows: dict[str, Path]) -> bytes:
    """Plot a row of real images, then a row of samples for each named `drawn.npz`. A column has one noise and class.

    Raises:
        UserError: a file does not hold images.
    """
    drawn = [(name, *_drawn(file)) for name, file in rows.items()]
    _, images, real = drawn[0]
    scale = max(1, -(-SAMPLE_PIXELS // max(images.shape[1:3])))
    cell = images.shape[2] * scale + 2
    columns = min(SAMPLES, len(images), max(4, WIDEST // cell))
    strips = [("real images", pictures.image_grid(real[:columns], columns, scale=scale))] if len(real) else []
    strips += [
        (picture_label(name, 48).replace(r"\$", "$"), pictures.image_grid(images[:columns], columns, scale=scale))
        for name, images, _ in drawn
    ]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = 16 + int(max(ruler.textlength(name, font_size=14) for name, _ in strips))
    height = sum(strip.height for _, strip in strips) + 10
    sheet = Image.new("RGB", (margin + max(strip.width for _, strip in strips), height), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for name, strip in strips:
        draw.text((8, top + strip.height // 2), name, fill="black", font_size=14, anchor="lm")
        sheet.paste(strip, (margin, top))
        top += strip.height + (10 if top == 0 else 0)
    return pictures.image_png(sheet)


def _drawn(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, real = arrays["images"], arrays["real"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} does not hold the samples of a trial: {error}") from None
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        raise UserError(f"{file} must hold uint8 images (n, H, W, C): got {images.dtype} {images.shape}")
    return images, real
