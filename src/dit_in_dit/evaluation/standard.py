"""The field's standard numbers from stored features: FID, sFID, Inception Score, KID, precision and the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.evaluation import chunks, distances
from dit_in_dit.evaluation.features import Network
from dit_in_dit.evaluation.pixels import Score

MOST_COMPARED = 10_000  # features of each side for precision and recall (as ADM's evaluator), density and coverage


@dataclass(frozen=True)
class Features:
    """Features of `count` images in chunks of `batch`."""

    folder: Path
    count: int
    batch: int

    def read(self, name: str) -> Iterator[NDArray[Any]]:
        """One kind of feature, chunk by chunk in index order."""
        return chunks.read(self.folder, self.count, self.batch, name)

    def first(self, name: str, most: int | None = None) -> NDArray[Any]:
        """The first rows of one kind."""
        return np.concatenate(list(self.read(name)))[:most]


def scores(
    network: Network, mine: Features, theirs: Features, statistics: distances.Reference | None
) -> dict[str, Score]:
    """Every number that a network's features give, by name."""
    return {}
