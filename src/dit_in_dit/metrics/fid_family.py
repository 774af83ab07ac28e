"""The field's standard numbers from stored features: FID, sFID, Inception Score, KID, precision and the rest."""

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
SUBSET = 1000  # images of a subset of KID
NEIGHBOURS = 5  # of density and coverage
MOST_COMPARED = 10_000  # features of each side for precision and recall (as ADM's evaluator), density and coverage


@dataclass(frozen=True)
class Features:
    """Features of `count` images in chunks of `batch`."""

    folder: Path
    count: int
    batch: int

    def read(self, name: str) -> Iterator[NDArray[Any]]:
        """One kind of feature, chunk by chunk in index order."""
        return shards.read_chunks(self.folder, self.count, self.batch, name)

    def whole(self, name: str) -> NDArray[Any]:
        """All rows of one kind."""
        return np.concatenate(list(self.read(name)))


def feature_scores(
    network: str, mine: Features, theirs: Features, statistics: feature_distances.ReferenceStatistics | None
) -> dict[str, Score]:
    """Every number that the features of samples (`mine`) and of real images give, by name.

    Args:
        network: inception or dinov2.
        statistics: Inception statistics in place of the real images' for the Frechet distances.
    """
    found: dict[str, Score] = {}
    for kind in ("pool", "spatial") if network == "inception" else ("pool",):
        real = statistics.moments[kind] if statistics else feature_distances.feature_moments(theirs.read(kind))
        smaller = mine.count if statistics else min(mine.count, theirs.count)
        distance = feature_distances.frechet(feature_distances.feature_moments(mine.read(kind)), real)
        found[feature_distances.frechet_name(network, kind, smaller)] = Score(distance)
    if network != "inception":
        return found
    if mine.count >= SPLITS:
        found |= _with_deviation("IS", feature_distances.inception_score(mine.whole("logits"), SPLITS))
    samples, real_ones = mine.whole("pool"), theirs.whole("pool")
    size = min(SUBSET, len(samples), len(real_ones))
    name = "KID" if size == SUBSET else f"KID (subsets of {size})"
    found |= _with_deviation(name, feature_distances.kernel_distance(real_ones, samples, size=size))
    samples, real_ones = samples[:MOST_COMPARED], real_ones[:MOST_COMPARED]
    if min(len(samples), len(real_ones)) > NEIGHBOURS:
        precision, recall = feature_distances.precision_recall(real_ones, samples)
        density, coverage = feature_distances.density_coverage(real_ones, samples, NEIGHBOURS)
        found |= {"precision": Score(precision), "recall": Score(recall)}
        found |= {"density": Score(density), "coverage": Score(coverage)}
    return found


def _with_deviation(name: str, found: tuple[float, float]) -> dict[str, Score]:
    """A mean, and under a name of its own the deviation over subsets or splits, which is not its error."""
    return {name: Score(found[0]), f"{name} deviation": Score(found[1])}
