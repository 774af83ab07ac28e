"""How much detail of a mosaic an image shows: the texture of each region, and the layout of the regions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.data.formats.mosaic import Mosaic, Region, Truth
from dit_in_dit.metrics.score import Float64Array, Score, summary_score

Image = NDArray[np.float32]

PERIODS = np.geomspace(2.1, 12, 36)  # search grid, in pixels: steps of 5%
DIRECTIONS = np.arange(0, np.pi, np.pi / 36)  # search grid: steps of 5 degrees
RIGHT_PERIOD = 0.1  # largest relative error of a recovered period
RIGHT_DIRECTION = np.pi / 18  # largest error of a recovered direction: ten degrees
SMALLEST_REGION = 48  # visible pixels: a few waves of any texture
MOST_PIXELS = 1024  # most pixels of a region that are analysed: those nearest to its centroid
REACH = 2  # a pixel is assigned to a region by (2 REACH + 1)^2 pixels around it


@dataclass(frozen=True)
class Detail:
    """Detail of one image of R visible regions."""

    period: Float64Array  # (R,), 1 where the period is recovered, else 0
    direction: Float64Array  # (R,), 1 where the direction is recovered, else 0
    contrast: Float64Array  # (R,), share of the true contrast
    layout: float  # share of pixels whose surroundings fit the texture of their own region best


def detail(mosaic: Mosaic, truth: Truth, image: Image) -> Detail:
    """Compare an image (3, H, W) with the regions of mosaic number `truth.index`."""
    owner = region_map(mosaic, truth)
    textures = []
    for number, region in enumerate(truth.regions):
        pixels = np.argwhere(owner == number)
        if len(pixels) >= SMALLEST_REGION:
            textures.append(_texture(region, pixels, image))
    period, direction, contrast = np.array(textures, float).reshape(-1, 3).T
    return Detail(period, direction, contrast, _layout(mosaic, truth, owner, image))


def region_map(mosaic: Mosaic, truth: Truth) -> NDArray[np.int64]:
    """Number of the region that each pixel shows (H, W); -1 if an edge mixes two regions."""
    owner = np.zeros(mosaic.size, np.int64)
    for number, region in enumerate(truth.regions):
        cover = mosaic.mask(truth, region)
        owner = np.where(cover == 1, number, np.where(cover > 0, -1, owner))
    return owner


def _texture(region: Region, pixels: NDArray[np.int64], image: Image) -> tuple[bool, bool, float]:
    """Whether period and direction are recovered, and the share of the contrast at the true wave."""
    middle = pixels.mean(0)
    pixels = pixels[np.argsort(np.sum((pixels - middle) ** 2, 1), kind="stable")[:MOST_PIXELS]]
    y, x = pixels.T + 0.5
    dark, light = (np.asarray(c, float) for c in region.colours)
    axis = (light - dark) / np.sum((light - dark) ** 2)
    wave = np.tensordot(axis, image[:, pixels[:, 0], pixels[:, 1]], 1) - axis @ dark  # from 0 (dark) to 1 (light)
    power = np.array([_powers(wave, x * np.cos(d) + y * np.sin(d)) for d in DIRECTIONS])
    best_direction, best_period = np.unravel_index(np.argmax(power), power.shape)
    angle = abs(DIRECTIONS[best_direction] - region.direction)
    along = x * np.cos(region.direction) + y * np.sin(region.direction)
    phase = 2 * np.pi * along / region.period + region.phase
    parts = np.column_stack([np.ones_like(phase), np.sin(phase), np.cos(phase)])
    amplitude = np.linalg.lstsq(parts, wave, rcond=None)[0][1]  # in phase with the true wave
    return (
        abs(PERIODS[best_period] / region.period - 1) < RIGHT_PERIOD,
        min(angle, np.pi - angle) < RIGHT_DIRECTION,
        float(amplitude / (0.5 * region.contrast)),
    )


def _powers(wave: Float64Array, along: Float64Array) -> Float64Array:
    """Power of the wave at each of PERIODS, along one direction."""
    angle = 2 * np.pi * along / PERIODS[:, None]
    centred = wave - wave.mean()
    return (np.cos(angle) @ centred) ** 2 + (np.sin(angle) @ centred) ** 2


def _layout(mosaic: Mosaic, truth: Truth, owner: NDArray[np.int64], image: Image) -> float:
    """Share of pixels whose surroundings fit the texture of their own region best."""
    misfits = []
    for region in truth.regions:
        wave = mosaic.x * np.cos(region.direction) + mosaic.y * np.sin(region.direction)
        mix = 0.5 + 0.5 * region.contrast * np.sin(2 * np.pi * wave / region.period + region.phase)
        dark, light = (np.asarray(c)[:, None, None] for c in region.colours)
        misfits.append(_surroundings(np.square(image - (dark + (light - dark) * mix)).sum(0)))
    unmixed = owner >= 0
    return float(np.mean(np.argmin(misfits, axis=0)[unmixed] == owner[unmixed]))


def _surroundings(values: Float64Array) -> Float64Array:
    """Mean over the (2 REACH + 1)^2 pixels around each pixel, mirrored at the border."""
    padded = np.pad(values, REACH, mode="reflect")
    return np.lib.stride_tricks.sliding_window_view(padded, (2 * REACH + 1,) * 2).mean((2, 3))


def detail_scores(details: list[Detail], real: list[Detail]) -> dict[str, Score]:
    """Scores `detail.period`, `detail.direction`, `detail.contrast` and `detail.layout`: means over all regions of all
    images. The floor is the score of the real images."""
    scores = {}
    for name in ("period", "direction", "contrast", "layout"):
        each, true = ([np.atleast_1d(getattr(d, name)) for d in ds] for ds in (details, real))
        scores[f"detail.{name}"] = summary_score(len(each), partial(_mean, each), _mean(true, range(len(true))))
    return scores


def _mean(parts: list[Float64Array], numbers: Iterable[int]) -> float:
    """Mean over all values of the parts with these numbers."""
    return float(np.mean(np.concatenate([parts[i] for i in numbers])))
