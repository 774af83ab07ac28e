"""What is better: the direction of each metric, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Direction = Literal["lower", "higher", "zero", "listed"]

HIGHER = ("IS", "precision", "recall", "density", "coverage", "detail")
LISTED = ("nearest", "memorised", "repeated")  # near to training images is neither good nor bad by itself
WORDS = {
    "lower": "lower is better",
    "higher": "higher is better",
    "zero": "nearer to zero is better: sizes are compared, without the sign",
    "listed": "listed, not ranked",
}
TITLES = {
    "held_out": "Held-out error",
    "pixels": "Distances without a network",
    "detail": "Known detail of mosaics",
    "standard": "Standard metrics",
    "listed": "Memorising and repeating (listed, not ranked)",
}
PIXELS = ("swd", "spectrum", "moments", "seam")


def direction(metric: str) -> Direction:
    """Which values of a metric are better; what is not known is an error or a distance, where lower is."""
    first = metric.split(".", 1)[0]
    if first in LISTED or metric.endswith(" deviation"):  # over splits or subsets, which is no error of the mean
        return "listed"
    if metric.startswith("spectrum.") or metric.startswith("KID"):  # octaves in decibels; an unbiased estimate
        return "zero"
    return "higher" if first in HIGHER else "lower"


def ranked(metric: str, value: float) -> float:
    """The value that is compared: its size where nearer to zero is better."""
    return abs(value) if direction(metric) == "zero" else value


def better(metric: str, change: float) -> bool:
    """Whether a change of the compared value is for the better."""
    return change > 0 if direction(metric) == "higher" else change < 0


def group(metric: str) -> str:
    """The key of TITLES under which a metric stands."""
    first = metric.split(".", 1)[0]
    if direction(metric) == "listed":
        return "listed"
    if first in ("held_out", "detail"):
        return first
    return "pixels" if first in PIXELS else "standard"


def grouped(metrics: Iterable[str], primary: str) -> dict[str, list[str]]:
    """Metrics by group, in the order of TITLES; the primary one and its group first."""
    order = sorted(TITLES, key=lambda name: name != group(primary))
    found: dict[str, list[str]] = {name: [] for name in order}
    for metric in sorted(metrics, key=lambda name: (name != primary, _kind(name), _parts(name))):
        found[group(metric)].append(metric)
    return {name: members for name, members in found.items() if members}


def _kind(metric: str) -> int:
    """The place of a metric's kind in PIXELS."""
    first = metric.split(".", 1)[0]
    return PIXELS.index(first) if first in PIXELS else 0


def _parts(metric: str) -> list[tuple[int, str]]:
    """Sorts `swd.8` before `swd.16`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.findall(r"[0-9]+|[^0-9]+", metric)]


def explain(metrics: Iterable[str]) -> list[str]:
    """For each direction that occurs, the metrics that have it."""
    found: dict[str, list[str]] = {word: [] for word in WORDS.values()}
    for metric in metrics:
        found[WORDS[direction(metric)]].append(metric)
    return [f"{', '.join(members)}: {word}." for word, members in found.items() if members]
