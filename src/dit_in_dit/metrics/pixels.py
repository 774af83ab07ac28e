"""Distances between two sets of images that need no network, each beside what real images score against real ones.

Sets are float arrays (N, C, H, W) in [-1, 1]. Two kinds of metric: a *statistic* is a vector per image, sets are told
apart by its mean; a *sliced Wasserstein distance* compares clouds of small patches, one per level of a Laplacian
pyramid. None of them is ever called FID.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dit_in_dit.runtime.seeding import generator

Float64Array = NDArray[np.float64]
FloatImages = NDArray[np.float32]
Compare = Callable[[Float64Array, Float64Array], dict[str, float]]

NEIGHBOURHOOD = 7  # side of the patches of the sliced Wasserstein distance (Karras et al. 2018, section 5)
SMALLEST_LEVEL = 8  # shorter side of the pyramid's last level, in pixels
POINTS = 16384  # patches per set and level
MOST_PATCHES = 128  # per image, as Karras et al.
PROJECTIONS = 64
RESAMPLED_PROJECTIONS = 16  # that the bootstrap looks at
FLOOR_SPLITS = 64  # halvings of the reference that the floor is averaged over
SLICED_SPLITS = 8  # the same for sliced Wasserstein distances, which are slow and vary less
RESAMPLES = 100  # of the bootstrap
DRAWS = {"halves": 0, "resamples": 1, "projections": 2, "order": 3, "subsets": 4}  # streams of the purpose "evaluation"
PATCH_DRAWS = 1000  # and on: one stream an image


@dataclass(frozen=True)
class Score:
    """A number, its 95% interval, and what real images score against real ones; None where it is not known."""

    value: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None


@dataclass(frozen=True)
class Halves:
    """Disjoint halves of the reference, `first` and `second` each (SPLITS, M), as positions."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]

    @classmethod
    def of(cls, count: int) -> Halves:
        """Random halves of `count` images, an odd one left out."""
        draw, half = generator(0, "evaluation", DRAWS["halves"]), count // 2
        orders = np.stack([draw.permutation(count) for _ in range(FLOOR_SPLITS)])
        return cls(orders[:, :half], orders[:, half : 2 * half])


def score(images: FloatImages, real: FloatImages, periods: tuple[int, ...] = ()) -> dict[str, Score]:
    """Every distance of M images to a half of 2M real ones; the floor is that of the other half.

    Args:
        images: (M, C, H, W).
        real: (2M, C, H, W), M at least 2.
        periods: patch and sub-patch sizes, whose seams are looked for; each but the first is measured within
            the patches of the first.
    """
    if len(real) != 2 * len(images) or len(images) < 2:
        raise ValueError(f"real must be twice as many images, at least 4: got {len(real)} for {len(images)}")
    halves = Halves.of(len(real))
    scores: dict[str, Score] = {}
    for statistic, compare in statistics(images.shape[1:], periods):
        scores |= _statistic_scores(statistic(images), statistic(real), compare, halves)
    return sliced_wasserstein(images, real, halves) | scores


def resamples(count: int) -> Iterator[tuple[Float64Array, Float64Array]]:
    """Weights (count,) of mean one, for the images and for the reference, as drawing with replacement gives them."""
    draw = generator(0, "evaluation", DRAWS["resamples"])
    even = np.full(count, 1 / count)
    for _ in range(RESAMPLES):
        yield draw.multinomial(count, even).astype(float), draw.multinomial(count, even).astype(float)


def _make_score(value: float, resampled: list[float], floors: list[float]) -> Score:
    """The interval is the value +- 1.96 bootstrap deviations: percentiles of a distance would all lie above it,
    because resampling adds a distance of its own."""
    deviation = float(np.std(resampled, ddof=1))
    return Score(value, value - 1.96 * deviation, value + 1.96 * deviation, float(np.mean(np.abs(floors))))


# ------------------------------------------------------------------------------------------ statistics


def statistics(
    shape: tuple[int, ...], periods: tuple[int, ...]
) -> list[tuple[Callable[[FloatImages], Float64Array], Compare]]:
    """Per-image statistics of images (C, H, W), each with the distances between two sets' means."""
    spectrum = Spectrum(shape[1], shape[2])
    found: list[tuple[Callable[[FloatImages], Float64Array], Compare]] = [
        (spectrum, spectrum.compare),
        (channel_moments, compare_moments),
    ]
    for period in periods:
        seams = Seams(period, 0 if period == periods[0] else periods[0])
        if seams.exist(shape):
            found.append((seams, seams.compare))
    return found


def _statistic_scores(images: Float64Array, real: Float64Array, compare: Compare, halves: Halves) -> dict[str, Score]:
    """Scores from per-image statistics (M, K) and (2M, K)."""
    first = real[halves.first[0]]
    values = compare(images.mean(0), first.mean(0))
    floors = [compare(real[b].mean(0), real[a].mean(0)) for a, b in zip(halves.first, halves.second, strict=True)]
    again = [compare((u @ images) / len(u), (v @ first) / len(v)) for u, v in resamples(len(images))]
    return {n: _make_score(values[n], [s[n] for s in again], [f[n] for f in floors]) for n in values}


class Spectrum:
    """Power over radial frequency, Hann-windowed, summed over channels; compared in decibels.

    `spectrum` is the root mean square over the radial bins; `spectrum.1/4` is the signed difference of the octave
    from 1/4 to 1/2 cycles a pixel (and the corners above), `spectrum.1/8` that of the next, and so on: negative
    means that detail is missing.
    """

    def __init__(self, height: int, width: int) -> None:
        fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
        radius, self.step = np.hypot(fy, fx), 1 / max(height, width)
        self.window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
        # A column of the half plane stands for its mirror image too.
        twice = np.where((fx == 0) | (fx == 0.5), 1.0, 2.0)
        bins = np.maximum(np.round(radius / self.step).astype(int) - 1, 0).ravel()
        used = (radius > 0).ravel()
        self.average = np.zeros((bins.max() + 1, bins.size))
        self.average[bins[used], np.flatnonzero(used)] = twice.ravel()[used]
        self.average /= self.average.sum(1, keepdims=True)
        frequency = (np.arange(bins.max() + 1) + 1) * self.step
        self.frequency = frequency
        octaves = np.clip(np.floor(-np.log2(frequency)), 1, None).astype(int)  # 1: from 1/4 to 1/2 and above
        self.octaves = {f"1/{2 ** (o + 1)}": octaves == o for o in range(1, octaves.max() + 1)}

    def __call__(self, images: FloatImages) -> Float64Array:
        """(N, C, H, W) -> power (N, bins)."""
        powers = []
        for block in _blocks(images):
            centred = block - block.mean((2, 3), keepdims=True)
            power = np.abs(np.fft.rfft2(centred * self.window)) ** 2
            powers.append(power.sum(1).reshape(len(block), -1) @ self.average.T)
        return np.concatenate(powers)

    def compare(self, images: Float64Array, real: Float64Array) -> dict[str, float]:
        """Distances in decibels between mean powers (bins,)."""
        tiny = 1e-12 * real.max() + np.finfo(float).tiny  # constant images have no power at all
        decibels = 10 * np.log10((images + tiny) / (real + tiny))
        values = {"spectrum": float(np.sqrt(np.mean(decibels**2)))}
        return values | {f"spectrum.{name}": float(decibels[bins].mean()) for name, bins in self.octaves.items()}


def channel_moments(images: FloatImages) -> Float64Array:
    """Raw moments per image: x, x^2, x^3, x^4 of each channel, then products of each pair; (N, 4C + C(C-1)/2)."""
    found = []
    for block in _blocks(images):
        powers = [np.mean(block**k, axis=(2, 3)) for k in (1, 2, 3, 4)]
        pairs = [np.mean(block[:, i] * block[:, j], axis=(1, 2)) for i, j in combinations(range(block.shape[1]), 2)]
        found.append(np.column_stack([*powers, *pairs]))
    return np.concatenate(found)


def compare_moments(images: Float64Array, real: Float64Array) -> dict[str, float]:
    """The largest difference over channels in mean, deviation, skewness, kurtosis and correlation of channels."""
    a, b = _central(images), _central(real)
    return {f"moments.{name}": float(np.max(np.abs(a[name] - b[name]))) for name in a if a[name].size}


def _central(raw: Float64Array) -> dict[str, Float64Array]:
    """Central moments from raw ones."""
    channels = next(c for c in range(1, len(raw) + 1) if 4 * c + c * (c - 1) // 2 == len(raw))
    m1, m2, m3, m4 = raw[: 4 * channels].reshape(4, channels)
    variance = np.maximum(m2 - m1**2, 1e-12)
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    i, j = np.array(list(combinations(range(channels), 2)), int).reshape(-1, 2).T
    covariance = raw[4 * channels :] - m1[i] * m1[j]
    return {
        "mean": m1,
        "deviation": np.sqrt(variance),
        "skewness": third / variance**1.5,
        "kurtosis": fourth / variance**2,
        "correlation": covariance / np.sqrt(variance[i] * variance[j]),
    }


class Seams:
    """Where a grid of `period` pixels prints itself into the image.

    The mean difference between neighbouring pixels, folded by its place in the period, per axis: real images are
    nearly even over the places, a model that draws patch by patch is not. `seam.P` is the root mean square, over
    places and axes, of what a profile's excess over its own mean has more than the real images' excess has, in
    units of the real mean. Differences across the borders of a coarser grid `skip` are left out.
    """

    def __init__(self, period: int, skip: int = 0) -> None:
        self.period, self.skip = period, skip

    def exist(self, shape: tuple[int, ...]) -> bool:
        """Whether images (C, H, W) have seams of this period."""
        return 1 < self.period < max(shape[1:]) and self.period != self.skip

    def __call__(self, images: FloatImages) -> Float64Array:
        """(N, C, H, W) -> mean |difference| by place, down and across: (N, 2 * period)."""
        return np.concatenate([np.column_stack([self._fold(b, 2), self._fold(b, 3)]) for b in _blocks(images)])

    def _fold(self, images: FloatImages, axis: int) -> Float64Array:
        """Profile (N, period) along one axis; the last place is the border. Axes of one period have none: zeros."""
        steps = np.abs(np.diff(images, axis=axis)).mean(axis=(1, 5 - axis), dtype=np.float64)  # N, length - 1
        place = np.arange(steps.shape[1])
        kept = (place + 1) % self.skip != 0 if self.skip else np.full(len(place), True)
        if steps.shape[1] < self.period:
            return np.zeros((len(images), self.period))
        return np.column_stack([steps[:, kept & (place % self.period == k)].mean(1) for k in range(self.period)])

    def compare(self, images: Float64Array, real: Float64Array) -> dict[str, float]:
        """The distance between mean profiles (2 * period,)."""
        return {f"seam.{self.period}": float(np.sqrt(np.mean(self.deviation(images, real) ** 2)))}

    def deviation(self, images: Float64Array, real: Float64Array) -> Float64Array:
        """What the profile exceeds the real one by at each place, (2, period): down and across."""
        a, b = (x.reshape(2, self.period) for x in (images, real))
        tiny = 1e-6  # of a range of 2: real images without any edge
        return ((a - a.mean(1, keepdims=True)) - (b - b.mean(1, keepdims=True))) / (b.mean(1, keepdims=True) + tiny)


def _blocks(images: FloatImages, most: int = 2**24) -> Iterator[FloatImages]:
    """The images in blocks of bounded size: temporaries are several times as large."""
    size = max(1, most // max(1, images[0].size))
    for start in range(0, len(images), size):
        yield images[start : start + size]


# -------------------------------------------------------------------------- sliced Wasserstein distance


def laplacian_pyramid(images: FloatImages) -> list[FloatImages]:
    """Band-pass levels from fine to coarse and the low-pass rest (Burt & Adelson 1983); images are their sum,
    each level brought up to full size."""
    levels = []
    while min(images.shape[2:]) >= 2 * SMALLEST_LEVEL and not any(side % 2 for side in images.shape[2:]):
        smaller = _smooth(images)[..., ::2, ::2]
        levels.append(images - enlarge(smaller))
        images = smaller
    return [*levels, images]


def enlarge(images: FloatImages) -> FloatImages:
    """Twice the size: zeros between the pixels, smoothed."""
    spread = np.zeros((*images.shape[:2], 2 * images.shape[2], 2 * images.shape[3]), images.dtype)
    spread[..., ::2, ::2] = 4 * images
    return _smooth(spread)


def _smooth(images: FloatImages) -> FloatImages:
    """The binomial filter 1 4 6 4 1 along both axes, mirrored at the border."""
    for axis in (2, 3):
        pad = [(0, 0)] * 4
        pad[axis] = (2, 2)
        wide, size = np.pad(images, pad, mode="reflect"), images.shape[axis]
        taps = ((k, np.take(wide, range(k, k + size), axis)) for k in range(5))
        images = sum(np.float32((1, 4, 6, 4, 1)[k] / 16) * tap for k, tap in taps)  # type: ignore[assignment]
    return images


def sliced_wasserstein(images: FloatImages, real: FloatImages, halves: Halves) -> dict[str, Score]:
    """Sliced Wasserstein-1 distance per level, `swd.SIDE` with the level's shorter side in pixels.

    7x7 patches, as Karras et al. 2018 (section 5), but in deviations of the real patches rather than each set's
    own: a set that lost its contrast must not be forgiven it.
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
        mine, theirs = (x.reshape(PROJECTIONS, -1, per_image) for x in projected)
        scores[f"swd.{min(level.shape[2:])}"] = _wasserstein_score(mine, theirs, halves)
    return scores


def _patches(level: FloatImages, count: int, first: int) -> FloatImages:
    """`count` random patches of each image, (N, count, C, 49); which ones depends on the image's number alone."""
    side = min(NEIGHBOURHOOD, *level.shape[2:])
    windows = sliding_window_view(level, (side, side), axis=(2, 3))  # N C y x side side
    places = windows.shape[2] * windows.shape[3]
    draws = [
        generator(0, "evaluation", PATCH_DRAWS + first + i).integers(places, size=count) for i in range(len(level))
    ]
    y, x = np.divmod(np.stack(draws), windows.shape[3])
    return windows[np.arange(len(level))[:, None], :, y, x].reshape(len(level), count, level.shape[1], -1)


def _wasserstein_score(images: FloatImages, real: FloatImages, halves: Halves) -> Score:
    """Score of projected patches (PROJECTIONS, M, count) against (PROJECTIONS, 2M, count)."""

    def distance(a: FloatImages, b: FloatImages) -> float:
        a, b = (np.sort(x.reshape(len(x), -1)) for x in (a, b))
        return float(np.mean(np.abs(a - b), dtype=np.float64))

    first = real[:, halves.first[0]]
    splits = zip(halves.first[:SLICED_SPLITS], halves.second, strict=False)
    floors = [distance(real[:, b], real[:, a]) for a, b in splits]
    again = resampled_wasserstein(images[:RESAMPLED_PROJECTIONS], first[:RESAMPLED_PROJECTIONS])
    return _make_score(distance(images, first), list(again), floors)


def resampled_wasserstein(a: FloatImages, b: FloatImages) -> Iterator[float]:
    """Distances between (projections, M, count) each when images are drawn again with replacement: the area between
    two weighted distribution functions, whose order is found once for all resamples."""
    projections, images, count = a.shape
    both = np.concatenate([a, b], axis=1).reshape(projections, -1)
    order = np.argsort(both)
    gaps = np.diff(np.take_along_axis(both, order, axis=1))
    owner = (order // count)[:, :-1]
    for u, v in resamples(images):
        weights = np.concatenate([u, -v]).astype(np.float32) / np.float32(images * count)
        between = np.cumsum(weights[owner], axis=1)
        yield float(np.einsum("ij,ij->", np.abs(between, out=between), gaps)) / projections
