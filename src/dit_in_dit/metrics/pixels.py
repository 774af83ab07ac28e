"""Distances, without a network, between two sets of images; each has a floor: real images against real ones.

Sets are float arrays (N, C, H, W) in [-1, 1]. Two kinds of metric: a *statistic* is a vector per image, and sets are
compared by its mean; `wasserstein` compares clouds of small patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np

from dit_in_dit.metrics.score import Float64Array, ReferenceHalves, Score, bootstrap_score, bootstrap_weights
from dit_in_dit.metrics.wasserstein import FloatImages, sliced_wasserstein

Statistic = Callable[[FloatImages], Float64Array]
Compare = Callable[[Float64Array, Float64Array], dict[str, float]]


def score(images: FloatImages, real: FloatImages, periods: tuple[int, ...] = ()) -> dict[str, Score]:
    """Every distance between M images and one half of 2M real images; the floor is the distance between the two halves.

    Args:
        images: (M, C, H, W).
        real: (2M, C, H, W), M at least 2.
        periods: patch and sub-patch sizes whose seams are measured; seams of all but the first are measured within the
            patches of the first.
    """
    if len(real) != 2 * len(images) or len(images) < 2:
        raise ValueError(f"real must hold twice as many images, at least 4: got {len(real)} for {len(images)}")
    halves = ReferenceHalves.of(len(real))
    scores: dict[str, Score] = {}
    for statistic, compare in statistics(images.shape[1:], periods):
        scores |= _statistic_scores(statistic(images), statistic(real), compare, halves)
    return sliced_wasserstein(images, real, halves) | scores


# ------------------------------------------------------------------------------------------ statistics


def statistics(shape: tuple[int, ...], periods: tuple[int, ...]) -> list[tuple[Statistic, Compare]]:
    """Statistics of an image (C, H, W), each with a function from two sets' means to their distances."""
    spectrum = Spectrum(shape[1], shape[2])
    seams = (Seams(period, 0 if period == periods[0] else periods[0]) for period in periods)
    found = [(each, each.compare) for each in seams if each.exist(shape)]
    return [(spectrum, spectrum.compare), (channel_moments, compare_moments), *found]


def _statistic_scores(
    images: Float64Array, real: Float64Array, compare: Compare, halves: ReferenceHalves
) -> dict[str, Score]:
    """Scores from per-image statistics (M, K) and (2M, K)."""
    first = real[halves.first[0]]
    values = compare(images.mean(0), first.mean(0))
    floors = [compare(real[b].mean(0), real[a].mean(0)) for a, b in zip(halves.first, halves.second, strict=True)]
    resampled = [compare((u @ images) / len(u), (v @ first) / len(v)) for u, v in bootstrap_weights(len(images))]
    return {n: bootstrap_score(values[n], [s[n] for s in resampled], [f[n] for f in floors]) for n in values}


class Spectrum:
    """Power over radial frequency, Hann-windowed, summed over channels; compared in decibels.

    `spectrum` is the root mean square over the radial bins. `spectrum.1/4` is the signed difference of the octave
    from 1/4 to 1/2 cycles a pixel (and the corners above), `spectrum.1/8` that of the octave below, and so on. A
    negative difference means missing detail.
    """

    def __init__(self, height: int, width: int) -> None:
        fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
        radius, self.step = np.hypot(fy, fx), 1 / max(height, width)
        self.window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
        # A column of the half plane also counts for its mirror image.
        twice = np.where((fx == 0) | (fx == 0.5), 1.0, 2.0)
        bins = np.maximum(np.round(radius / self.step).astype(int) - 1, 0).ravel()
        not_mean = (radius > 0).ravel()
        self.average = np.zeros((bins.max() + 1, bins.size))
        self.average[bins[not_mean], np.flatnonzero(not_mean)] = twice.ravel()[not_mean]
        self.average /= self.average.sum(1, keepdims=True)
        self.frequency = (np.arange(bins.max() + 1) + 1) * self.step
        octaves = np.clip(np.floor(-np.log2(self.frequency)), 1, None).astype(int)  # 1: from 1/4 to 1/2 and above
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
        tiny = 1e-12 * real.max() + np.finfo(float).tiny  # constant images have no power
        decibels = 10 * np.log10((images + tiny) / (real + tiny))
        values = {"spectrum": float(np.sqrt(np.mean(decibels**2)))}
        return values | {f"spectrum.{name}": float(decibels[bins].mean()) for name, bins in self.octaves.items()}


def channel_moments(images: FloatImages) -> Float64Array:
    """Raw moments (N, 4C + C(C-1)/2) of images: x, x^2, x^3, x^4 of each channel, then the product of each pair."""
    moments = []
    for block in _blocks(images):
        powers = [np.mean(block**k, axis=(2, 3)) for k in (1, 2, 3, 4)]
        pairs = [np.mean(block[:, i] * block[:, j], axis=(1, 2)) for i, j in combinations(range(block.shape[1]), 2)]
        moments.append(np.column_stack([*powers, *pairs]))
    return np.concatenate(moments)


def compare_moments(images: Float64Array, real: Float64Array) -> dict[str, float]:
    """The largest difference over channels in mean, deviation, skewness, kurtosis and correlation of channels."""
    a, b = _central(images), _central(real)
    return {f"moments.{name}": float(np.max(np.abs(a[name] - b[name]))) for name in a if a[name].size}


def _central(raw: Float64Array) -> dict[str, Float64Array]:
    """Central moments by name, from raw ones."""
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
    """Visible borders between patches of `period` pixels.

    A profile is the mean |difference| between neighbouring pixels by its place in the period, per axis. The profile is
    nearly even for real images, and uneven for a model that draws patch by patch. The excess is the profile minus its
    mean, in units of the real mean. `seam.P` is the root mean square, over places and axes, of the difference between
    the excess of the images and of real images. Borders of a coarser grid `skip` are left out.
    """

    def __init__(self, period: int, skip: int = 0) -> None:
        self.period, self.skip = period, skip

    def exist(self, shape: tuple[int, ...]) -> bool:
        """Whether images (C, H, W) have seams of this period."""
        return 1 < self.period < max(shape[1:]) and self.period != self.skip

    def __call__(self, images: FloatImages) -> Float64Array:
        """Profiles (N, 2 * period), down and across, of images (N, C, H, W)."""
        return np.concatenate([np.column_stack([self._fold(b, 2), self._fold(b, 3)]) for b in _blocks(images)])

    def _fold(self, images: FloatImages, axis: int) -> Float64Array:
        """Profile (N, period) along one axis; the last place is the border. Zeros for an axis of a single period."""
        steps = np.abs(np.diff(images, axis=axis)).mean(axis=(1, 5 - axis), dtype=np.float64)  # N, length - 1
        place = np.arange(steps.shape[1])
        measured = (place + 1) % self.skip != 0 if self.skip else np.full(len(place), True)
        if steps.shape[1] < self.period:
            return np.zeros((len(images), self.period))
        return np.column_stack([steps[:, measured & (place % self.period == k)].mean(1) for k in range(self.period)])

    def compare(self, images: Float64Array, real: Float64Array) -> dict[str, float]:
        """The distance between mean profiles (2 * period,)."""
        return {f"seam.{self.period}": float(np.sqrt(np.mean(self.deviation(images, real) ** 2)))}

    def deviation(self, images: Float64Array, real: Float64Array) -> Float64Array:
        """Excess of images minus excess of real images at each place, (2, period): down and across."""
        a, b = (x.reshape(2, self.period) for x in (images, real))
        tiny = 1e-6  # pixels have range 2; for real images without any edge
        return ((a - a.mean(1, keepdims=True)) - (b - b.mean(1, keepdims=True))) / (b.mean(1, keepdims=True) + tiny)


def _blocks(images: FloatImages, most: int = 2**24) -> Iterator[FloatImages]:
    """The images in blocks of at most `most` values: temporaries are several times as large."""
    size = max(1, most // max(1, images[0].size))
    for start in range(0, len(images), size):
        yield images[start : start + size]
