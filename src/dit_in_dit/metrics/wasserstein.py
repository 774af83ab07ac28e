"""Sliced Wasserstein distance between clouds of small patches, one per level of a Laplacian pyramid."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dit_in_dit.metrics.score import DRAWS, ReferenceHalves, Score, bootstrap_score, bootstrap_weights
from dit_in_dit.runtime.seeding import generator

FloatImages = NDArray[np.float32]

NEIGHBOURHOOD = 7  # side of a patch (Karras et al. 2018, section 5)
SMALLEST_LEVEL = 8  # shorter side of the pyramid's last level, in pixels
POINTS = 16384  # patches per set and level
MOST_PATCHES = 128  # patches per image, as in Karras et al.
PROJECTIONS = 64
RESAMPLED_PROJECTIONS = 16  # of the bootstrap
SLICED_SPLITS = 8  # the floor is the mean over this many halvings: this distance is slow and varies little
PATCH_DRAWS = 1000  # stream of the first image's patches; each further image has the next


def laplacian_pyramid(images: FloatImages) -> list[FloatImages]:
    """Band-pass levels from fine to coarse, then the low-pass rest (Burt & Adelson 1983); an image is the sum of
    all levels, each enlarged to full size."""
    levels = []
    while min(images.shape[2:]) >= 2 * SMALLEST_LEVEL and not any(side % 2 for side in images.shape[2:]):
        smaller = _smooth(images)[..., ::2, ::2]
        levels.append(images - enlarge(smaller))
        images = smaller
    return [*levels, images]


def enlarge(images: FloatImages) -> FloatImages:
    """Images of twice the size: zeros between the pixels, smoothed."""
    zeros = np.zeros((*images.shape[:2], 2 * images.shape[2], 2 * images.shape[3]), images.dtype)
    zeros[..., ::2, ::2] = 4 * images
    return _smooth(zeros)


def _smooth(images: FloatImages) -> FloatImages:
    """Filter by the binomial 1 4 6 4 1 along both axes, mirrored at the border."""
    for axis in (2, 3):
        pad = [(0, 0)] * 4
        pad[axis] = (2, 2)
        padded, size = np.pad(images, pad, mode="reflect"), images.shape[axis]
        taps = ((k, np.take(padded, range(k, k + size), axis)) for k in range(5))
        images = sum(np.float32((1, 4, 6, 4, 1)[k] / 16) * tap for k, tap in taps)  # type: ignore[assignment]
    return images


def sliced_wasserstein(images: FloatImages, real: FloatImages, halves: ReferenceHalves) -> dict[str, Score]:
    """Sliced Wasserstein-1 distance per level, `swd.SIDE` with the level's shorter side in pixels.

    Patches are 7x7 pixels, as in Karras et al. 2018 (section 5). But both sets are scaled by the deviation of the real
    patches, because a loss of contrast would not count if each set were scaled by its own deviation.
    """
    scores = {}
    per_image = min(MOST_PATCHES, max(1, POINTS // len(images)))
    for level, real_level in zip(laplacian_pyramid(images), laplacian_pyramid(real), strict=True):
        a, b = _patches(level, per_image, 0), _patches(real_level, per_image, len(images))
        mean, deviation = b.mean((0, 1, 3), keepdims=True), b.std((0, 1, 3), keepdims=True) + 1e-6
        draw = generator(0, "evaluation", DRAWS["projections"])
        directions = draw.standard_normal((PROJECTIONS, a.shape[2] * a.shape[3]), np.float32)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        projected = (directions @ ((x - mean) / deviation).reshape(-1, directions.shape[1]).T for x in (a, b))
        points, real_points = (x.reshape(PROJECTIONS, -1, per_image) for x in projected)
        scores[f"swd.{min(level.shape[2:])}"] = _wasserstein_score(points, real_points, halves)
    return scores


def _patches(level: FloatImages, count: int, first: int) -> FloatImages:
    """`count` random patches of each image, (N, count, C, 49); the image's number (`first` and on) seeds the draw."""
    side = min(NEIGHBOURHOOD, *level.shape[2:])
    windows = sliding_window_view(level, (side, side), axis=(2, 3))  # N C y x side side
    places = windows.shape[2] * windows.shape[3]
    numbers = range(first, first + len(level))
    draws = [generator(0, "evaluation", PATCH_DRAWS + n).integers(places, size=count) for n in numbers]
    y, x = np.divmod(np.stack(draws), windows.shape[3])
    return windows[np.arange(len(level))[:, None], :, y, x].reshape(len(level), count, level.shape[1], -1)


def _wasserstein_score(images: FloatImages, real: FloatImages, halves: ReferenceHalves) -> Score:
    """Score of projected patches (PROJECTIONS, M, count) against (PROJECTIONS, 2M, count)."""

    def distance(a: FloatImages, b: FloatImages) -> float:
        a, b = (np.sort(x.reshape(len(x), -1)) for x in (a, b))
        return float(np.mean(np.abs(a - b), dtype=np.float64))

    first = real[:, halves.first[0]]
    splits = zip(halves.first[:SLICED_SPLITS], halves.second, strict=False)
    floors = [distance(real[:, b], real[:, a]) for a, b in splits]
    resampled = resampled_wasserstein(images[:RESAMPLED_PROJECTIONS], first[:RESAMPLED_PROJECTIONS])
    return bootstrap_score(distance(images, first), list(resampled), floors)


def resampled_wasserstein(a: FloatImages, b: FloatImages) -> Iterator[float]:
    """Bootstrap distances between two sets (projections, M, count): the area between two weighted distribution
    functions, whose points are sorted once for all resamples."""
    projections, images, count = a.shape
    both = np.concatenate([a, b], axis=1).reshape(projections, -1)
    order = np.argsort(both)
    gaps = np.diff(np.take_along_axis(both, order, axis=1))
    owner = (order // count)[:, :-1]
    for u, v in bootstrap_weights(images):
        weights = np.concatenate([u, -v]).astype(np.float32) / np.float32(images * count)
        between = np.cumsum(weights[owner], axis=1)
        yield float(np.einsum("ij,ij->", np.abs(between, out=between), gaps)) / projections
