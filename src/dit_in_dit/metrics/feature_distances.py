"""Distances between two sets of features of any network, in float64."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.config.errors import UserError
from dit_in_dit.metrics.score import DRAWS, Float64Array
from dit_in_dit.runs.integrity import file_sha256
from dit_in_dit.runtime.seeding import generator

ENOUGH = 2048  # fewest images on each side for which a Frechet distance has the name of a published metric
DISTANCE_NAMES = {("inception", "pool"): "FID", ("inception", "spatial"): "sFID", ("dinov2", "pool"): "FD-DINOv2"}
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # arrays of ADM's layout
ROWS = 512  # rows summed by one matrix product
BLOCK = 2**23  # most distances in memory


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and unbiased covariance (d, d) of `count` rows; `count` is None if unknown, as in a file."""

    count: int | None
    mean: Float64Array
    covariance: Float64Array


def feature_moments(chunks: Iterable[NDArray[Any]]) -> Moments:
    """Moments of features in chunks (n, d); the size of the chunks changes no bit of the result.

    The first row is subtracted before summing: squares of a large mean would lose a small covariance to rounding.

    Raises:
        UserError: fewer than two rows.
    """
    count, origin, total, squares = 0, np.zeros(0), np.zeros(0), np.zeros((0, 0))
    for rows in _blocks(chunks):
        if not count:
            origin = rows[0]
            total, squares = np.zeros_like(origin), np.zeros((origin.size, origin.size))
        moved = rows - origin
        count, total = count + len(moved), total + moved.sum(0)
        squares += moved.T @ moved
    if count < 2:
        raise UserError(f"a covariance needs at least 2 images: got {count}")
    covariance = (squares - np.outer(total, total) / count) / (count - 1)
    return Moments(count, origin + total / count, covariance)


def _blocks(chunks: Iterable[NDArray[Any]]) -> Iterator[Float64Array]:
    """The rows of all chunks in blocks of `ROWS`, so that the size of the chunks changes no bit of the sums."""
    rows = chain.from_iterable(chunks)
    while block := list(islice(rows, ROWS)):
        yield np.array(block, np.float64)


def frechet(a: Moments, b: Moments) -> float:
    """Frechet (2-Wasserstein) distance, squared, of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2. The last trace is the sum of the singular values of R1' R2 with
    S = R R', which are exact to rounding. Square roots of the eigenvalues of S1 S2 are not exact: with fewer images
    than dimensions, each empty dimension adds an error of the square root of rounding.

    Raises:
        UserError: the features have different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"statistics must be of the same features: got {a.mean.size} and {b.mean.size} dimensions; "
            "compute both with the same network"
        )
    apart = a.mean - b.mean
    shared = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    return max(float(apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared), 0.0)


def _root(covariance: Float64Array) -> Float64Array:
    """R (d, rank) with R R' = S, from the eigenvalues above rounding."""
    values, vectors = np.linalg.eigh(covariance)
    positive = values > values.max(initial=0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, positive] * np.sqrt(values[positive])


def frechet_name(network: str, features: str, count: int) -> str:
    """Name of a Frechet distance: FID, sFID or FD-DINOv2 only if both sets have at least 2,048 images.

    With fewer images, the bias of the distance exceeds the differences between models.
    """
    name = DISTANCE_NAMES[network, features]
    if count >= ENOUGH:
        return name
    which = {"FID": "", "sFID": "spatial, ", "FD-DINOv2": "DINOv2, "}[name]
    return f"Frechet distance ({which}N={count})"


def kernel_distance(
    real: NDArray[Any], generated: NDArray[Any], subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Squared kernel distance (KID; Binkowski et al. 2018, section 4): mean and deviation over random subsets.

    The estimate is unbiased, with the kernel (x.y / d + 1)^3, and may be negative. Subsets are drawn without
    replacement.

    Raises:
        UserError: a set has fewer than `size` images.
    """
    if min(len(real), len(generated)) < size or size < 2:
        raise UserError(
            f"the kernel distance takes subsets of {size} images (at least 2): "
            f"got {len(real)} real and {len(generated)} generated; take smaller subsets or more images"
        )
    draw = generator(seed, "evaluation", DRAWS["subsets"])

    def subset(rows: NDArray[Any]) -> Float64Array:
        return rows[draw.choice(len(rows), size, replace=False)].astype(np.float64)

    distances = [_discrepancy(subset(real), subset(generated)) for _ in range(subsets)]
    return float(np.mean(distances)), float(np.std(distances))


def _discrepancy(x: Float64Array, y: Float64Array) -> float:
    """Unbiased squared maximum mean discrepancy of two samples of one size (Gretton et al. 2012, eq. 3)."""
    size, dimension = x.shape
    within = 0.0
    for rows in (x, y):
        kernel = (rows @ rows.T / dimension + 1) ** 3
        within += kernel.sum() - np.trace(kernel)  # without pairs of a row with itself
    return float(within / (size * (size - 1)) - 2 * ((x @ y.T / dimension + 1) ** 3).mean())


def precision_recall(real: NDArray[Any], generated: NDArray[Any], k: int = 3) -> tuple[float, float]:
    """Precision: share of generated images near the real ones. Recall: share of real images near the generated ones.

    An image is near a set if it lies in a ball around some image of the set. The ball's radius is the distance from
    that image to its k-th neighbour in the set (Kynkaanniemi et al. 2019, eq. 2).

    Raises:
        UserError: a set has k images or fewer.
    """
    real_radii, generated_radii = _radii(real, k), _radii(generated, k)
    among_real, among_generated = np.zeros(len(generated), bool), np.zeros(len(real), bool)
    for start, distances in _squared_distances(generated, real):
        rows = slice(start, start + len(distances))
        among_real[rows] = (distances <= real_radii).any(1)
        among_generated |= (distances <= generated_radii[rows, None]).any(0)
    return float(among_real.mean()), float(among_generated.mean())


def density_coverage(real: NDArray[Any], generated: NDArray[Any], k: int = 5) -> tuple[float, float]:
    """Density: mean number of balls that hold a generated image, divided by k. Coverage: share of balls that hold any.

    A ball around a real image reaches to its k-th real neighbour, which is outside the ball, as in the authors' code
    (Naeem et al. 2020, eqs. 3 and 4).

    Raises:
        UserError: there are k real images or fewer.
    """
    radii = _radii(real, k) * (1 - 1e-9)  # the border is outside in spite of rounding
    covered, balls = np.zeros(len(real), bool), 0
    for _, distances in _squared_distances(generated, real):
        inside = distances < radii
        covered |= inside.any(0)
        balls += int(inside.sum())
    return balls / (k * len(generated)), float(covered.mean())


def _radii(rows: NDArray[Any], k: int) -> Float64Array:
    """Squared distance (n,) of each row to its k-th neighbour among the others."""
    if len(rows) <= k:
        raise UserError(f"the {k} nearest neighbours need more than {k} images: got {len(rows)}")
    radii = np.empty(len(rows))
    for start, distances in _squared_distances(rows, rows):
        own = np.arange(len(distances))
        distances[own, start + own] = np.inf
        radii[start : start + len(own)] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii


def _squared_distances(a: NDArray[Any], b: NDArray[Any]) -> Iterator[tuple[int, Float64Array]]:
    """Squared distances of rows of `a` to all rows of `b`, in blocks of at most `BLOCK`: (first row, block)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    centre = b.mean(0)  # else the expanded square loses digits to the common part of the norms
    a, b = a - centre, b - centre
    norms_a, norms_b = np.square(a).sum(1), np.square(b).sum(1)
    step = max(1, BLOCK // len(b))
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        norms = norms_a[part, None] + norms_b
        distances = norms - 2 * (a[part] @ b.T)
        yield start, np.where(distances > 1e-12 * norms, distances, 0.0)  # equal rows: 0 in spite of rounding


def inception_score(logits: NDArray[Any], splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Mean and deviation over splits of exp E KL(p(y|x) | p(y)) (Salimans et al. 2016, section 4).

    Rows are shuffled first: splits of images sorted by class would have few classes each.

    Args:
        logits: (N, classes), without bias, as in the original graph.

    Raises:
        UserError: fewer images than splits.
    """
    count = len(logits)
    if count < splits:
        raise UserError(f"the Inception Score needs at least {splits} images, one per split: got {count}")
    logits = logits[generator(seed, "evaluation", DRAWS["order"]).permutation(count)].astype(np.float64)
    logits = logits - logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    scores = []
    for split in range(splits):
        part = logs[split * count // splits : (split + 1) * count // splits]
        marginal = np.logaddexp.reduce(part, axis=0) - np.log(len(part))
        scores.append(np.exp((np.exp(part) * (part - marginal)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


@dataclass(frozen=True)
class ReferenceStatistics:
    """Published statistics of a set of real images: `moments` by kind of feature."""

    path: Path
    sha256: str
    moments: dict[str, Moments]


def read_reference(path: Path) -> ReferenceStatistics:
    """Statistics from a `.npz` of ADM's layout (Dhariwal & Nichol 2021).

    `mu`, `sigma` are of the pooled Inception features, `mu_s`, `sigma_s` of the spatial ones. Other arrays (`arr_0`:
    images) are not read.

    Raises:
        UserError: the file cannot be read, or lacks one of these arrays.
    """
    arrays = _read_npz(path)
    if missing := set(STATISTICS) - set(arrays):
        raise UserError(f"{path} must hold {', '.join(STATISTICS)}: it lacks {', '.join(sorted(missing))}")
    moments = {
        "pool": _checked(path, arrays["mu"], arrays["sigma"], "sigma"),
        "spatial": _checked(path, arrays["mu_s"], arrays["sigma_s"], "sigma_s"),
    }
    return ReferenceStatistics(path, file_sha256(path), moments)


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of STATISTICS that a `.npz` file holds; UserError if the file cannot be read."""
    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.lib.npyio.NpzFile):
            with arrays:
                return {name: arrays[name] for name in STATISTICS if name in arrays}
    except FileNotFoundError:
        raise UserError(f"no such file of statistics: {path}") from None
    except (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {path} as a .npz of numbers: {str(error)[:80]}") from None
    raise UserError(f"{path} must be a .npz of ADM's layout: it holds a single array")


def _checked(path: Path, mean: Any, covariance: Any, name: str) -> Moments:
    """The two arrays as moments; UserError if the arrays are not a mean (d,) and its covariance (d, d)."""
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise UserError(f"{path}: statistics must be floats: {name} and its mean are {covariance.dtype}, {mean.dtype}")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
        raise UserError(f"{path}: {name} must be (d, d) for a mean (d,): got {covariance.shape} for {mean.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: {name} and its mean must be finite: there are NaN or infinite values")
    if np.abs(covariance - covariance.T).max() > 1e-5 * np.abs(covariance).max():
        raise UserError(f"{path}: {name} must be symmetric, as covariances are")
    return Moments(None, mean, covariance)
