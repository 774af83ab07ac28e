"""Each arm's held-out error during training, relative to the arm that it is compared with."""

from __future__ import annotations

from textwrap import fill

import numpy as np

from dit_in_dit.curves.convergence import ERROR_BANDS
from dit_in_dit.curves.logs import Curve, Floats
from dit_in_dit.reporting.plots import COLOURS, figure_png, panel_grid
from dit_in_dit.study.figures import picture_label
from dit_in_dit.study.results import StudyResults

COLUMNS = 4


def relative(curve: Curve, other: Curve, at: tuple[float, str]) -> tuple[Floats, Floats]:
    """Compare a run's held-out errors with another run's held-out errors at equal training MACs.

    The other run's error is interpolated log-log between its evaluations. The run's evaluations outside the
    other run's range of MACs are left out.

    Returns:
        training MACs (V,) of the run's evaluations, and percent (V,) by which the run's errors are above the other's.
    """
    macs, error = curve.macs(curve.evaluated), curve.held_out.get(at, np.empty(0))
    other_macs, other_error = other.macs(other.evaluated), other.held_out.get(at, np.empty(0))
    if not len(error) or not len(other_error):
        return np.empty(0), np.empty(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.interp(np.log(macs), np.log(other_macs), np.log(other_error), left=np.nan, right=np.nan)
        change = 100 * (error / np.exp(between) - 1)
    known = np.isfinite(change)
    return macs[known], change[known]


def draw_relative(study: StudyResults) -> bytes | None:
    """Plot each arm's error relative to the arm it is compared with: a panel for each arm, a line for each seed.

    The error is the primary metric or, if that is no held-out error, the first that was logged; None without any.
    """
    at = _time_and_band(study)
    panels = []
    for arm in study.drawn:
        pairs = [(study.logs.get((arm.name, s)), study.logs.get((arm.against, s))) for s in study.plan.study.seeds]
        compared = [relative(curve, other, at) for curve, other in pairs if curve and other and at]
        lines = [line for line in compared if len(line[0])]
        if lines:
            panels.append((arm, lines))
    if not at or not panels:
        return None
    columns = min(COLUMNS, len(panels))
    page, axes = panel_grid(len(panels), columns, width=2.7 if columns > 1 else 5.0, height=1.9)
    most = max(float(np.abs(change).max()) for _, lines in panels for _, change in lines)
    for number, (axis, (arm, lines)) in enumerate(zip(axes, panels, strict=True)):
        for macs, change in lines:
            axis.plot(macs / 1e12, change, color=COLOURS[0], linewidth=1, alpha=0.8, marker=".", markersize=3)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylim(-1.1 * most or -1, 1.1 * most or 1)
        against = "" if arm.against == study.plan.control.name else f" against {picture_label(arm.against)}"
        axis.set_title(fill(picture_label(arm.name) + against, 38), fontsize=8)
        axis.tick_params(labelsize=7)
        if number % columns == 0:
            axis.set_ylabel("error, % above", fontsize=8)
        if number >= len(panels) - columns:
            axis.set_xlabel("training TMACs", fontsize=8)
    page.suptitle(f"t = {at[0]:g}, {ERROR_BANDS[at[1]]}; a line for each seed; below 0: less error", fontsize=8)
    return figure_png(page, colours=256)


def _time_and_band(study: StudyResults) -> tuple[float, str] | None:
    """The time t and frequencies of the primary metric, or of the first held-out error that was logged."""
    logged = [at for log in study.logs.values() for at in log.held_out]
    named = [at for at in logged if study.primary == f"held_out.{at[0]:g}.{at[1]}"]
    return next(iter([*named, *logged]), None)
