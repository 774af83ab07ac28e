"""Scores of samples by a classifier of the real images: accuracy, and the Frechet distance of features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.config.errors import UserError
from dit_in_dit.metrics.classifier import Classifier, LabelledImages, balanced_accuracy
from dit_in_dit.metrics.feature_distances import feature_moments, frechet
from dit_in_dit.metrics.score import DRAWS, ReferenceHalves, Score, bootstrap_score, summary_score
from dit_in_dit.runtime.seeding import generator

MANY = 20  # classes from which the five likeliest count too
REDRAWN, HALVES = 25, 4  # resamples of the bootstrap, and halves of the real images in each

Features = NDArray[np.float32]


def classifier_scores(classifier: Classifier, samples: LabelledImages, held_out: LabelledImages) -> dict[str, Score]:
    """Scores of samples (N, H, W, C), whose labels are the classes they were sampled for.

    - `classifier.accuracy`: the share of samples that are recognised as their class, the mean over classes; from 20
      classes on also `classifier.top5`, with the class among the five likeliest. The floor is that of held-out images.
    - `classifier.frechet`: Frechet distance between Gaussians of the features (before the last layer) of samples and
      of held-out images. Half of the held-out images are compared at a time, so that the floor, the distance of one
      half to the other, has the same number of images and the same bias.

    UserError: there are fewer than four held-out images or samples.
    """
    features, logits = classifier.classify(samples.images)
    real_features, real_logits = classifier.classify(held_out.images)
    scores = {"classifier.accuracy": _accuracy(logits, samples.labels, real_logits, held_out.labels, 1)}
    if logits.shape[1] >= MANY:
        scores["classifier.top5"] = _accuracy(logits, samples.labels, real_logits, held_out.labels, 5)
    scores["classifier.frechet"] = _frechet_score(features, real_features)
    return scores


def _accuracy(
    logits: Features, labels: NDArray[np.int64], real: Features, real_labels: NDArray[np.int64], top: int
) -> Score:
    hits, real_hits = _among(logits, labels, top), _among(real, real_labels, top)
    return summary_score(
        len(labels), lambda rows: balanced_accuracy(hits[rows], labels[rows]), balanced_accuracy(real_hits, real_labels)
    )


def _among(logits: Features, labels: NDArray[np.int64], top: int) -> NDArray[np.bool_]:
    """Whether the label (N,) is among the `top` largest logits."""
    return (logits > np.take_along_axis(logits, labels[:, None], 1)).sum(1) < top


def _frechet_score(features: Features, real: Features) -> Score:
    halves, draw = ReferenceHalves.of(len(real)), generator(0, "evaluation", DRAWS["resamples"])
    size = min(halves.first.shape[1], len(features))
    if size < 2:
        raise UserError(f"the classifier's distance needs at least 4 real images and 2 samples: got {len(real)}")

    pairs = [
        [feature_moments([real[rows[:size]]]) for rows in pair]
        for pair in zip(halves.first, halves.second, strict=True)
    ]

    def mean_distance(own: Features, count: int) -> float:
        parts = [feature_moments([own[draw.permutation(len(own))[:size]]]) for _ in range(count)]
        return float(np.mean([frechet(part, half) for part, (half, _) in zip(parts, pairs[:count], strict=True)]))

    drawn = [features[draw.integers(len(features), size=len(features))] for _ in range(REDRAWN)]
    resampled = [mean_distance(rows, HALVES) for rows in drawn]
    floors = [frechet(second, first) for first, second in pairs]
    return bootstrap_score(mean_distance(features, len(pairs)), resampled, floors)
