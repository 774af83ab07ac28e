"""Plots of training curves: a line is the mean over an arm's seeds, a band is the range over these seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dit_in_dit.curves.arms import RunGroup, unlike_losses
from dit_in_dit.curves.convergence import ERROR_BANDS, check_comparable, errors_by_seed, logged_times
from dit_in_dit.curves.logs import Curve, Floats, last_step
from dit_in_dit.inspection.cost import FORWARDS_PER_STEP
from dit_in_dit.reporting.plots import COLOURS, figure, figure_png
from dit_in_dit.runs import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLOCK = {"hours": 1, "minutes": 60, "seconds": 3600}  # how many of each unit make an hour
ROW = 0.2  # inches per row of a legend
POINTS = 200  # most points of a curve; each is the mean of a window of steps


def draw_curves(compared: Sequence[RunGroup], out: Path) -> list[Path]:
    """Write loss.png, held-out.png, gradients.png and throughput.png, except plots without data; returns the paths.

    Raises:
        UserError: the arms' held-out sets differ, or matplotlib is not installed.
    """
    check_comparable(compared)
    pages = {
        "loss": draw_loss(compared),
        "held-out": draw_held_out(compared) if logged_times(compared) else None,
        "gradients": _draw_gradients(compared),
        "throughput": _draw_throughput(compared) if _hours(compared) else None,
    }
    paths = []
    for name, page in pages.items():
        if page:
            paths.append(out / f"{name}.png")
            atomic.write_atomic(paths[-1], figure_png(page, colours=256))
    return paths


class _Across(NamedTuple):
    """A horizontal axis: its label, and the positions of an arm's steps on it."""

    label: str
    place: Callable[[RunGroup, Floats], Floats]


def _acrosses(compared: Sequence[RunGroup]) -> list[_Across]:
    most = max(float(curve.macs(curve.step[-1:])[0]) for arm in compared for curve in arm.curves)
    power = 3 * int(math.log10(most) // 3)
    acrosses = [
        _Across("steps", lambda arm, steps: steps),
        _Across(
            f"training MACs / $10^{{{power}}}$  ({FORWARDS_PER_STEP} x forward x images)",
            lambda arm, steps: arm.curves[0].macs(steps) / 10.0**power,
        ),
    ]
    if hours := _hours(compared):
        unit, per_hour = next((unit, n) for unit, n in CLOCK.items() if max(hours) * n >= 2 or unit == "seconds")

        def mean_time(arm: RunGroup, steps: Floats) -> Floats:
            return per_hour * np.mean([curve.hours(steps) for curve in arm.curves], axis=0)

        acrosses.append(_Across(f"training time / {unit}", mean_time))
    return acrosses


def _hours(compared: Sequence[RunGroup]) -> list[float]:
    """Hours of training of every run with timing."""
    return [float(curve.hours(curve.timed[-1:])[0]) for arm in compared for curve in arm.curves if len(curve.timed)]


def _window(compared: Sequence[RunGroup]) -> int:
    """Steps per plotted point, the same for all arms, so that all curves are smoothed equally."""
    return math.ceil(max(last_step(curve) for arm in compared for curve in arm.curves) / POINTS)


def _smoothed(window: int) -> str:
    return f"mean of {window} steps" if window > 1 else "every step"


def _binned(
    arm: RunGroup, window: int, values: Callable[[Curve], Floats], *, largest: bool = False
) -> tuple[Floats, Floats]:
    """Middle steps (B,) of the windows that every seed has completed, and each seed's means or maxima, (seeds, B)."""
    rows = []
    for curve in arm.curves:
        edges = np.arange(int(last_step(curve)) // window + 1) * window
        first = np.searchsorted(curve.step, edges, side="right")  # a window holds steps `edge + 1` to `edge + window`
        count = np.diff(first)
        padded = np.append(values(curve), 0)  # reduceat needs every start to exist
        binned = (np.maximum if largest else np.add).reduceat(padded, first)[:-1]
        rows.append(np.where(count, binned / (1 if largest else np.maximum(count, 1)), np.nan))
    shortest = min(map(len, rows))
    middle: Floats = np.arange(shortest) * float(window) + (window + 1) / 2
    return middle, np.array([row[:shortest] for row in rows])


def _style(number: int) -> dict[str, Any]:
    """Colour and line style of arm `number`."""
    lines = ("-", "--", ":", "-.")
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": lines[number // len(COLOURS) % len(lines)]}


def _lines(
    axes: Sequence[Axes],
    compared: Sequence[RunGroup],
    acrosses: Sequence[_Across],
    curves: Sequence[tuple[Floats, Floats]],
    **style: Any,
) -> None:
    """Plot the mean and the range over the seeds of each arm's rows (seeds, B), at the arm's steps (B,), against each
    horizontal axis."""
    for at, across in zip(axes, acrosses, strict=True):
        at.set_xlabel(across.label)
        for number, (arm, (steps, rows)) in enumerate(zip(compared, curves, strict=True)):
            if not rows.size or np.isnan(rows).all():
                continue
            place = across.place(arm, steps)
            at.plot(place, rows.mean(0), label=arm.label, **{"linewidth": 1.3, **_style(number), **style})
            if len(rows) > 1:
                at.fill_between(place, rows.min(0), rows.max(0), alpha=0.2, linewidth=0, color=_style(number)["color"])


def _log_scale(axes: Axes) -> None:
    """Set a logarithmic scale, with plain numbers as ticks even if it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    if not any((np.asarray(line.get_ydata(), float) > 0).any() for line in axes.lines):
        axes.text(0.5, 0.5, "no finite number", ha="center", va="center", transform=axes.transAxes, color="grey")
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if decades < 2.5 else (1,)) if decades > 1 else MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if decades <= 1:
        axes.yaxis.set_minor_locator(NullLocator())


def _finish(page: Figure, title: str, *, log: bool = True) -> Figure:
    """Add a title, one legend for all axes and, with `log`, logarithmic scales."""
    shown: dict[str, Any] = {}
    for axes in page.axes:
        if log and axes.get_visible():
            _log_scale(axes)
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, line)
    if any(axes.collections for axes in page.axes):
        title += "; band: range of the seeds, as far as all of them got"
    page.suptitle(title, fontsize=10)
    page.set_figheight(page.get_figheight() + ROW * math.ceil(len(shown) / 2))  # else the legend shrinks the axes
    page.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=2, frameon=False)
    return page


def draw_loss(compared: Sequence[RunGroup]) -> Figure:
    window, acrosses = _window(compared), _acrosses(compared)
    page, axes = figure(1, len(acrosses))
    _lines(axes[0], compared, acrosses, [_binned(arm, window, lambda curve: curve.loss) for arm in compared])
    axes[0, 0].set_ylabel("training loss")
    title = f"training loss, {_smoothed(window)}"
    if unlike_losses([arm.curves[0] for arm in compared]):
        title += "; NOT comparable between arms: losses of different quantities"
    return _finish(page, title)


def draw_held_out(compared: Sequence[RunGroup]) -> Figure:
    rows = [(t, kind) for t in logged_times(compared) for kind in ERROR_BANDS]
    acrosses = _acrosses(compared)
    page, axes = figure(len(rows), len(acrosses), height=2.1)
    for (t, kind), line in zip(rows, axes, strict=True):
        curves = [errors_by_seed(arm, t, kind) for arm in compared]
        _lines(line, compared, acrosses, curves, marker=".", markersize=4)
        line[0].set_ylabel(f"t = {t:g}, {ERROR_BANDS[kind]}\nmean squared error")
    for at in axes[:-1].flat:
        at.set_xlabel("")
    return _finish(page, "held-out error of the averaged model's image estimate")


def _draw_gradients(compared: Sequence[RunGroup]) -> Figure:
    """Plot the total norm against each horizontal axis, then the norm of each level and part against steps."""
    window, acrosses = _window(compared), _acrosses(compared)
    parts = sorted({part for arm in compared for curve in arm.curves for part in curve.parts})
    levels = {f"{level} level": [p for p in parts if p.startswith(f"{level}_")] for level in ("outer", "inner")}
    panels = {**{name: inside for name, inside in levels.items() if inside}, **{part: [part] for part in parts}}
    page, axes = figure(1 + math.ceil(len(panels) / len(acrosses)), len(acrosses), height=2.3 if panels else 3.0)
    _lines(axes[0], compared, acrosses, [_binned(arm, window, lambda curve: curve.grad_norm) for arm in compared])
    largest = [_binned(arm, window, lambda curve: curve.grad_norm, largest=True) for arm in compared]
    for at, across in zip(axes[0], acrosses, strict=True):
        for number, (arm, (steps, rows)) in enumerate(zip(compared, largest, strict=True)):
            if rows.size and window > 1:
                at.plot(across.place(arm, steps), rows.max(0), **{**_style(number), "linewidth": 0.5, "alpha": 0.6})
        at.set_title("whole model", fontsize=9)
    for at, (panel, members) in zip(axes[1:].flat, panels.items(), strict=False):
        curves = [_binned(arm, window, partial(_norm, parts=members)) for arm in compared]
        _lines([at], compared, acrosses[:1], curves)
        at.set_title(panel.replace("_", " "), fontsize=9)
    for at in axes[1:].flat[len(panels) :]:
        at.set_visible(False)
    for line in axes:
        line[0].set_ylabel("gradient norm")
    thin = "; thin: the largest of them" if window > 1 else ""
    return _finish(page, f"gradient norm before clipping, {_smoothed(window)}{thin}")


def _norm(curve: Curve, parts: Sequence[str]) -> Floats:
    """Gradient norm (L,) of some parts together; NaN if the run logged none of them."""
    norms = [curve.parts[part] for part in parts if part in curve.parts]
    return np.sqrt(np.sum(np.square(norms), axis=0)) if norms else np.full(len(curve.step), np.nan)


def _draw_throughput(compared: Sequence[RunGroup]) -> Figure:
    """Plot the images per second of each window."""
    window, acrosses = _window(compared), _acrosses(compared)
    page, axes = figure(1, len(acrosses))
    curves = []
    for arm in compared:
        edges = np.arange(int(min(map(last_step, arm.curves))) // window + 1) * float(window)
        middle: Floats = edges[1:] - window / 2
        images = window * arm.config.global_batch
        curves.append((middle, np.array([images / np.diff(3600 * curve.hours(edges)) for curve in arm.curves])))
    _lines(axes[0], compared, acrosses, curves)
    for at in axes[0]:
        at.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("images per second")
    return _finish(page, f"training speed on the machine of each run, {_smoothed(window)}", log=False)
