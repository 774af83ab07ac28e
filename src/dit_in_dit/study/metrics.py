"""Metrics by group and by direction, as a report shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dit_in_dit.metrics.metric import METRICS, TITLES, WORDS, direction, metric_of


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
