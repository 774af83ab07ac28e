"""The forest plot of a study: differences between arms with their intervals, metric by metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dit_in_dit.metrics.metric import direction
from dit_in_dit.reporting.plots import figure, figure_png
from dit_in_dit.study import formatting
from dit_in_dit.study.figures import picture_label, verdict_colour
from dit_in_dit.study.plan import Arm
from dit_in_dit.study.results import StudyResults
from dit_in_dit.study.statistics import Difference

MOST_METRICS, MOST_ROWS = 8, 32  # of a plot that fits a screen
LEAST_METRICS = 3  # fewer beside the primary metric would be a selection without a reason
ROW, HEAD = 0.2, 1.0  # inches: a line of the plot; title and axis


def draw_forest(study: StudyResults) -> bytes:
    """Plot each arm's difference with both of its intervals, below each other for each metric that `forest_metrics`
    lists, in percent; in the metric's own unit if the primary metric has no percent."""
    rows: list[tuple[str, Arm | None]] = []
    for metric in forest_metrics(study):
        rows += [(metric, None), *((metric, arm) for arm in study.drawn)]
    changes = {(metric, arm.name): study.difference(arm, metric) for metric, arm in rows if arm}
    percent = _in_percent(study, study.primary)
    units = {key: (formatting.scale(key[0], change) if percent else None) or 1.0 for key, change in changes.items()}
    page, axes = figure(1, 1, width=7.6, height=HEAD + ROW * len(rows))
    axis, places = axes[0, 0], [-float(at) for at in range(len(rows))]
    edge = _edge(study.primary, changes, units)
    for at, (metric, arm) in zip(places, rows, strict=True):
        if arm is None:
            axis.axhspan(at - 0.5, at + 0.5, color="#eef2f4", zorder=0)
        elif math.isfinite((change := changes[metric, arm.name]).mean):
            _draw_row(axis, at, change, units[metric, arm.name], edge, verdict_colour(metric, change))
    axis.axvline(0, color="black", linewidth=0.8)
    axis.grid(visible=False, axis="y")
    axis.set(yticks=places, ylim=(0.6 - len(rows), 0.5), xlim=(-edge, edge))
    for text, (_, arm) in zip(
        axis.set_yticklabels([_row_name(study, *row) for row in rows], fontsize=9), rows, strict=True
    ):
        text.set_fontweight("normal" if arm else "bold")
    axis.tick_params(axis="y", length=0)
    control = picture_label(study.plan.control.name)
    axis.set_xlabel(f"difference to {control}, percent" if percent else f"difference to {control}, in its own unit")
    page.suptitle(_title(study), fontsize=9)
    return figure_png(page, colours=256)


def forest_metrics(study: StudyResults) -> list[str]:
    """The primary metric, and those of all groups whose differences are percentages, the first of each group by turns.

    Their number is such that the plot fits a screen; their order is that of the report.
    """
    if not _in_percent(study, study.primary):
        return [study.primary]
    groups = [
        [name for name in names if direction(name) != "listed" and _in_percent(study, name)]
        for names in study.metrics.values()
    ]
    turns = [name for turn in range(MOST_METRICS) for names in groups for name in names[turn : turn + 1]]
    most = min(MOST_METRICS, MOST_ROWS // (1 + len(study.drawn)))
    shown = turns[: most if most >= LEAST_METRICS else 1]
    return [name for names in groups for name in names if name in shown]


def _in_percent(study: StudyResults, metric: str) -> bool:
    """Whether every difference of the metric is a percentage; equal arms and arms without numbers do not count."""
    changes = [study.difference(arm, metric) for arm in study.drawn]
    unequal = [change for change in changes if math.isfinite(change.mean) and not change.equal]
    return all(formatting.scale(metric, change) for change in unequal)


def _row_name(study: StudyResults, metric: str, arm: Arm | None) -> str:
    if arm is None:
        return f"{picture_label(metric)} ({direction(metric)} is better)".replace("zero is", "nearer to zero is")
    against = "" if arm.against == study.plan.control.name else f" against {picture_label(arm.against, 24)}"
    return picture_label(arm.name) + against


def _title(study: StudyResults) -> str:
    many = len(study.compared)
    if len(study.plan.study.seeds) < 2:
        return "one seed: no intervals, no claim"
    lines = f"thick: 95% interval; thin: for all {many} comparisons together" if many > 1 else "line: 95% interval"
    return f"{lines}\nexcludes zero: blue better, orange worse; grey: no difference seen"


def _edge(primary: str, changes: Mapping[tuple[str, str], Difference], units: Mapping[tuple[str, str], float]) -> float:
    """The axis limit. It covers all means, and of the primary metric the 95% intervals, and wide intervals up to 8
    times its largest mean. Intervals of noisier metrics would leave no room for its own."""

    def reach(*ends: str, metric: str = "") -> float:
        keys = [key for key in changes if metric in ("", key[0])]
        values = np.array([[getattr(changes[key], end) for end in ends] for key in keys], float)  # None: NaN
        sizes = np.abs(values) * np.array([units[key] for key in keys])[:, None]
        return float(sizes.max(initial=0.0, where=np.isfinite(sizes)))

    intervals = reach("low", "high", metric=primary)
    wide = min(reach("wide_low", "wide_high", metric=primary), 8 * reach("mean", metric=primary))
    return 1.1 * max(reach("mean"), intervals, wide) or 1.0


def _draw_row(axis: Any, at: float, change: Difference, unit: float, edge: float, colour: str) -> None:
    for low, high, thick in ((change.wide_low, change.wide_high, 1.2), (change.low, change.high, 4.5)):
        if low is None or high is None:
            continue
        axis.hlines(at, max(low * unit, -edge), min(high * unit, edge), color=colour, linewidth=thick, alpha=0.75)
    for end, side in ((change.wide_low, -edge), (change.wide_high, edge)):
        if end is not None and abs(end * unit) > edge and (end < 0) == (side < 0):
            axis.plot(0.985 * side, at, "<" if side < 0 else ">", color=colour, markersize=5)
    axis.plot(change.mean * unit, at, "o", color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.6)
