"""Memorising and repeating: distances of samples to training images, and to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dit_in_dit.data.summary import nearest
from dit_in_dit.metrics.score import Float64Array, Score, summary_score

NEAR = 0.01  # "too near": within the distance at which this share of unseen real images has a training image
LOUD = 0.05  # share of samples that are too near, above which a warning is given
DETAILED = 0.5  # samples with less than this share of real detail are blurred: blurred images are near to all others


@dataclass(frozen=True)
class Neighbours:
    """Nearest neighbours of samples and real images. A distance is a root mean square over pixels of range 2."""

    train: Float64Array  # of each sample to its nearest training image
    number: NDArray[np.int64]  # of that training image
    other: Float64Array  # of each sample to its nearest other sample
    unseen_train: Float64Array  # as `train`, but of unseen real images
    unseen_other: Float64Array  # as `other`, but of real images
    detail: float  # median rms difference of neighbouring pixels: of samples, divided by that of training images

    @property
    def too_near_train(self) -> float:
        """Distance within which one in a hundred unseen real images has a training image."""
        return float(np.quantile(self.unseen_train, NEAR))

    @property
    def too_near_other(self) -> float:
        """Distance within which one in a hundred real images has another real image."""
        return float(np.quantile(self.unseen_other, NEAR))

    def scores(self) -> dict[str, Score]:
        """`nearest.train`: median distance to the nearest training image; `memorised` and `repeated`: shares of samples
        that are too near to a training image, or to another sample. The floor is the score of unseen real images."""
        return {
            "nearest.train": _score(self.train, self.unseen_train, np.median),
            "memorised": _score(self.train <= self.too_near_train, self.unseen_train <= self.too_near_train, np.mean),
            "repeated": _score(self.other <= self.too_near_other, self.unseen_other <= self.too_near_other, np.mean),
        }

    def warnings(self, *, guided: bool) -> list[str]:
        """Warnings of memorising and repeating.

        Args:
            guided: whether samples were generated with guidance: only then less guidance is advised.
        """
        scores = self.scores()
        standing_out = [name for name in ("memorised", "repeated") if _stands_out(scores[name])]
        if standing_out and self.detail < DETAILED:
            return [
                f"the samples have {self.detail:.0%} of the detail of training images: how near they come to these and "
                f"to each other ({', '.join(standing_out)}) says nothing yet; train longer"
            ]
        messages = {
            "memorised": f"MEMORISING: {scores['memorised'].value:.0%} of the samples are nearer to a training image "
            f"than {1 - NEAR:.0%} of unseen real images are (look at nearest.png): "
            "train on more data or for fewer steps",
            "repeated": f"REPEATING: {scores['repeated'].value:.0%} of the samples are nearer to another sample than "
            f"{1 - NEAR:.0%} of real images are to another: {'less guidance, or ' if guided else ''}more varied data",
        }
        return [messages[name] for name in standing_out]


def _stands_out(score: Score) -> bool:
    return score.value > LOUD and score.low is not None and score.floor is not None and score.low > score.floor


def _score(each: NDArray[Any], real: NDArray[Any], summary: Callable[[NDArray[Any]], Any]) -> Score:
    """A summary over samples with its bootstrap interval; the floor is the summary over real images."""
    return summary_score(len(each), lambda numbers: float(summary(each[numbers])), float(summary(real)))


def neighbours(samples: Tensor, train: Tensor, unseen: Tensor | None, *, mirrored: bool = False) -> Neighbours:
    """Nearest neighbours among all training images; each set as `thumbnails` (N, C, h, w).

    Args:
        unseen: real images that are not training images. If None, training images are used instead, and each is
            compared with all other training images.
        mirrored: training showed mirror images too (data.flip): the mirror image of a sample is searched for as well.
    """
    base = train.flatten(1)
    real = train[: len(samples)]  # as many as there are samples: more would lie closer together
    distance, number = _either_way(samples, base, mirrored=mirrored)
    if unseen is None:
        unseen_train, _ = _either_way(real, base, mirrored=mirrored, itself=True)
    else:
        unseen_train, _ = _either_way(unseen, base, mirrored=mirrored)
    others, real_others = (nearest(rows, rows, itself=True)[0] for rows in (samples.flatten(1), real.flatten(1)))
    detail = float(np.median(_steps(samples)) / max(np.median(_steps(train)), 1e-12))
    return Neighbours(distance, number, others, unseen_train, real_others, detail)


def _steps(images: Tensor) -> Float64Array:
    """Root mean square of the differences between neighbouring pixels, down and across, of each image (N, C, h, w)."""
    squares = [images.diff(dim=axis).double().square().flatten(1).sum(1) for axis in (2, 3)]
    count = sum(images[0].diff(dim=axis).numel() for axis in (1, 2))
    return ((squares[0] + squares[1]) / max(count, 1)).sqrt().numpy()


def _either_way(
    images: Tensor, base: Tensor, *, mirrored: bool, itself: bool = False
) -> tuple[Float64Array, NDArray[np.int64]]:
    """`nearest` of images (N, C, h, w), or of their mirror images if the mirror images are nearer."""
    distance, number = nearest(images.flatten(1), base, itself=itself)
    if mirrored:
        flipped, flipped_number = nearest(images.flip(-1).flatten(1), base, itself=itself)
        distance, number = np.minimum(distance, flipped), np.where(flipped < distance, flipped_number, number)
    return distance, number
