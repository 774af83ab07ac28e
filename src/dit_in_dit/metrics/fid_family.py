"""Standard metrics from stored features: FID, sFID, Inception Score, KID, precision, recall, density, coverage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.metrics import feature_distances
from dit_in_dit.metrics.score import Score
from dit_in_dit.runs import shards

SPLITS = 10  # of the Inception Score
SUBSET = 1000  # images in a subset of KID
NEIGHBOURS = 5  # of density and coverage
MOST_COMPARED = 10_000  # images on each side of precision and recall (as in ADM's evaluator), density and coverage


@dataclass(frozen=True)
class Features:
    """Stored features of `count` images, in chunks of `batch`."""

    folder: Path
    count: int
    batch: int

    def read(self, name: str) -> Iterator[NDArray[Any]]:
        """Features of one kind, chunk by chunk in index order."""
        return shards.read_chunks(self.folder, self.count, self.batch, name)

    def whole(self, name: str) -> NDArray[Any]:
        """All features of one kind, (count, d)."""
        return np.concatenate(list(self.read(name)))


def feature_scores(
    network: str, samples: Features, real: Features, statistics: feature_distances.ReferenceStatistics | None
) -> dict[str, Score]:
    """Every standard metric of a network's features, by name.

    Args:
        network: inception or dinov2.
        statistics: Inception statistics that replace those of the real images in Frechet distances.
    """
    scores: dict[str, Score] = {}
    for kind in ("pool", "spatial") if network == "inception" else ("pool",):
        moments = statistics.moments[kind] if statistics else feature_distances.feature_moments(real.read(kind))
        smaller = samples.count if statistics else min(samples.count, real.count)
        distance = feature_distances.frechet(feature_distances.feature_moments(samples.read(kind)), moments)
        scores[feature_distances.frechet_name(network, kind, smaller)] = Score(distance)
    if network != "inception":
        return scores
    if samples.count >= SPLITS:
        scores |= _with_deviation("IS", feature_distances.inception_score(samples.whole("logits"), SPLITS))
    pool, real_pool = samples.whole("pool"), real.whole("pool")
    size = min(SUBSET, len(pool), len(real_pool))
    name = "KID" if size == SUBSET else f"KID (subsets of {size})"
    scores |= _with_deviation(name, feature_distances.kernel_distance(real_pool, pool, size=size))
    pool, real_pool = pool[:MOST_COMPARED], real_pool[:MOST_COMPARED]
    if min(len(pool), len(real_pool)) > NEIGHBOURS:
        precision, recall = feature_distances.precision_recall(real_pool, pool)
        density, coverage = feature_distances.density_coverage(real_pool, pool, NEIGHBOURS)
        scores |= {"precision": Score(precision), "recall": Score(recall)}
        scores |= {"density": Score(density), "coverage": Score(coverage)}
    return scores


def _with_deviation(name: str, result: tuple[float, float]) -> dict[str, Score]:
    """Two scores: the mean, and the deviation over subsets or splits. The deviation is not an error of the mean."""
    return {name: Score(result[0]), f"{name} deviation": Score(result[1])}
