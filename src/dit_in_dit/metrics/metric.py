"""Table of the metrics: group, direction in which values get better, and the functions of a user's metrics."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.config.errors import UserError, did_you_mean, truncate
from dit_in_dit.metrics.score import ReferenceHalves, Score

Direction = Literal["lower", "higher", "zero", "listed"]
Images = NDArray[np.uint8]
Compute = Callable[[Images, Images], float | Score]

WORDS: dict[Direction, str] = {
    "lower": "lower is better",
    "higher": "higher is better",
    "zero": "nearer to zero is better: sizes are compared, without the sign",
    "listed": "listed, not ranked",
}
TITLES = {  # of groups, in the order of a report; any other group is its own title and comes after these
    "held_out": "Held-out error",
    "pixels": "Distances without a network",
    "detail": "Known detail of mosaics",
    "classifier": "By a classifier of the real images",
    "standard": "Standard metrics",
    "listed": "Memorising and repeating (listed, not ranked)",
}


@dataclass(frozen=True)
class Metric:
    """A score, or a family of scores.

    Attributes:
        name: of the score in metrics.json; a `*` matches the part that differs within a family, such as the level of
            `swd.*`.
        group: key of TITLES, or a title of the user's own.
        direction: which values are better; `listed` scores are not ranked.
        compute: a function of samples and as many real images, both uint8 (N, H, W, C). It returns a finite number, or
            a Score with an interval. The floor of a number is the score of other real images. None: the package
            computes the score.

    Raises:
        UserError: the direction is unknown, or `compute` is no function of two arguments.
    """

    name: str
    group: str
    direction: Direction
    compute: Compute | None = None

    def __post_init__(self) -> None:
        known = get_args(Direction)
        if self.direction not in known:
            raise UserError(
                f"metric {self.name}: unknown direction {self.direction!r}{did_you_mean(str(self.direction), known)}"
            )
        if self.compute is not None:
            _check_signature(self.name, self.compute)

    def ranked(self, value: float) -> float:
        """The value that is compared: the absolute value if nearer to zero is better."""
        return abs(value) if self.direction == "zero" else value

    def better(self, change: float) -> bool:
        """Whether a change of the compared value is an improvement."""
        return change > 0 if self.direction == "higher" else change < 0


def _check_signature(name: str, compute: object) -> None:
    """Raise UserError if `compute` cannot be called with samples and real images."""
    if not callable(compute):
        raise UserError(
            f"metric {name}: compute must be a function of samples and real images: got {truncate(repr(compute), 40)}; "
            "give a function"
        )
    try:
        signature = inspect.signature(compute)
    except (TypeError, ValueError):  # a function written in C may have none
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise UserError(
            f"metric {name}: compute must take two arguments, samples and real images: got {truncate(signature, 60)}; "
            "change its arguments"
        ) from None


METRICS: dict[str, Metric] = {  # the first match counts; the order is that of a report, within each group
    metric.name: metric
    for metric in (
        Metric("held_out.*", "held_out", "lower"),
        Metric("swd.*", "pixels", "lower"),
        Metric("spectrum", "pixels", "lower"),
        Metric("spectrum.*", "pixels", "zero"),  # octaves, in decibels
        Metric("moments.*", "pixels", "lower"),
        Metric("seam.*", "pixels", "lower"),
        Metric("detail.*", "detail", "higher"),
        Metric("classifier.frechet", "classifier", "lower"),
        Metric("classifier.*", "classifier", "higher"),
        Metric("* deviation", "listed", "listed"),  # deviation over splits or subsets: no error of the mean
        Metric("memorised", "listed", "listed"),  # closeness to training images may be good or bad
        Metric("nearest.train", "listed", "listed"),
        Metric("repeated", "listed", "listed"),
        Metric("FD-DINOv2", "standard", "lower"),
        Metric("FID", "standard", "lower"),
        Metric("Frechet distance (*)", "standard", "lower"),
        Metric("IS", "standard", "higher"),
        Metric("KID", "standard", "zero"),  # an unbiased estimate
        Metric("KID (*)", "standard", "zero"),
        Metric("coverage", "standard", "higher"),
        Metric("density", "standard", "higher"),
        Metric("precision", "standard", "higher"),
        Metric("recall", "standard", "higher"),
        Metric("sFID", "standard", "lower"),
    )
}


def metric_of(score: str) -> Metric:
    """The metric that a score's name belongs to; for an unknown name, a metric that is listed and not ranked."""
    matches = (metric for name, metric in METRICS.items() if fnmatchcase(score, name))
    return METRICS.get(score) or next(matches, Metric(score, "listed", "listed"))


def direction(score: str) -> Direction:
    """Which values of a score are better."""
    return metric_of(score).direction


def group_metrics(metrics: Iterable[str], primary: str) -> dict[str, list[str]]:
    """Metrics by group, in the order of TITLES; the primary metric and its group first."""
    first, places = metric_of(primary).group, list(METRICS)

    def order(score: str) -> tuple[bool, int, list[tuple[int, str]]]:
        name = metric_of(score).name
        return score != primary, places.index(name) if name in places else len(places), _parts(score)

    groups: dict[str, list[str]] = {first: [], **{name: [] for name in TITLES}}
    for score in sorted(metrics, key=order):
        groups.setdefault(metric_of(score).group, []).append(score)
    return {name: members for name, members in groups.items() if members}


def _parts(metric: str) -> list[tuple[int, str]]:
    """A sort key that puts `swd.8` before `swd.16`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.findall(r"[0-9]+|[^0-9]+", metric)]


def explain_directions(metrics: Iterable[str]) -> list[str]:
    """A sentence for each direction that occurs; it lists the metrics of this direction."""
    directions = {metric: direction(metric) for metric in metrics}
    members = {word: [m for m, found in directions.items() if found == name] for name, word in WORDS.items()}
    return [f"{', '.join(names)}: {word}." for word, names in members.items() if names]


def plugin_metrics() -> dict[str, Metric]:
    """The user's metrics: those that have a `compute`."""
    return {name: metric for name, metric in METRICS.items() if metric.compute}


def plugin_scores(images: Images, real: Images) -> dict[str, Score]:
    """The user's metrics of M images against one half of 2M real images. The floor is the score of the other half.

    Raises:
        UserError: a metric raises an error, or returns neither a finite number nor a Score of finite numbers.
    """
    halves = ReferenceHalves.of(len(real))
    first, second = real[halves.first[0]], real[halves.second[0]]
    images = images.view()
    for array in (images, first, second):
        array.flags.writeable = False  # a metric that writes into its arrays must not change the next metric's
    scores = {}
    for name, metric in plugin_metrics().items():
        score = _compute(name, metric, images, first)
        if score.low is None and score.floor is None:
            floor = _compute(name, metric, second, first).value
            score = Score(score.value, floor=metric.ranked(floor))
        scores[name] = score
    return scores


def _compute(name: str, metric: Metric, images: Images, real: Images) -> Score:
    """The checked score of a user's metric."""
    assert metric.compute is not None
    try:
        result = metric.compute(images, real)
    except (Exception, SystemExit) as error:
        problem = f"{type(error).__name__}: {truncate(error, 100)}"
        raise UserError(f"metric {name} failed with {problem}; fix its compute") from error
    try:
        numbers = astuple(result) if isinstance(result, Score) else (result, None, None, None)
        score = Score(float(numbers[0]), *(None if number is None else float(number) for number in numbers[1:]))
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"metric {name} must return a number or a Score: got {truncate(repr(result), 60)}; fix its compute"
        ) from None
    if not all(number is None or math.isfinite(number) for number in astuple(score)):
        got = score if isinstance(result, Score) else score.value
        raise UserError(f"metric {name} must return finite numbers: got {got}; fix its compute")
    if (score.low is None) != (score.high is None) or (score.low or 0) > (score.high or 0):
        raise UserError(
            f"metric {name} must return an interval with low <= high, or none: got {score}; fix its compute"
        )
    return score
