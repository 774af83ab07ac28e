"""Scores in groups, as a report shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dit_in_dit.metrics.metric import METRICS, TITLES, WORDS, direction, metric_of


def grouped(metrics: Iterable[str], primary: str) -> dict[str, list[str]]:
    """Scores by group, in the order of TITLES; the primary one and its group first."""
    first, place = metric_of(primary).group, list(METRICS)

    def order(score: str) -> tuple[bool, int, list[tuple[int, str]]]:
        name = metric_of(score).name
        return score != primary, place.index(name) if name in place else len(place), _parts(score)

    found: dict[str, list[str]] = {first: [], **{name: [] for name in TITLES}}
    for score in sorted(metrics, key=order):
        found.setdefault(metric_of(score).group, []).append(score)
    return {name: members for name, members in found.items() if members}


def _parts(metric: str) -> list[tuple[int, str]]:
    """Sorts `swd.8` before `swd.16`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.findall(r"[0-9]+|[^0-9]+", metric)]


def explain(metrics: Iterable[str]) -> list[str]:
    """For each direction that occurs, the metrics that have it."""
    found: dict[str, list[str]] = {word: [] for word in WORDS.values()}
    for metric in metrics:
        found[WORDS[direction(metric)]].append(metric)
    return [f"{', '.join(members)}: {word}." for word, members in found.items() if members]
