"""Convergence speed, final held-out error and stability of runs, as tables."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import keys
from dit_in_dit.curves.arms import RunGroup
from dit_in_dit.curves.logs import Curve, Floats, last_step
from dit_in_dit.inspection import cost
from dit_in_dit.inspection.cost import FORWARDS_PER_STEP

MEDIAN_STEPS = 100  # a spike is compared with the median over this many previous steps
LOSS_SPIKE = 3.0  # multiple of the median; healthy runs with batch 32 stay below 2.6
GRADIENT_SPIKE = 10.0
ERROR_BANDS = {"whole": "whole image", "high": "high frequencies"}
COMPARABLE = ("data.source", "data.held_out", "model.image_size", "model.channels", "diffusion.path")

DEFINITIONS = {
    "macs": f"training MACs: {FORWARDS_PER_STEP} x forward MACs per image (backward: twice the forward) x images; "
    "recomputed activations are not counted",
    "hours": "time spent in training steps on the machine of each run; steps that a resumed run repeats count once",
    "held_out": "mean squared error of the averaged model's image estimate on held-out images, noise the same for "
    "all runs; high: what 2x2 averaging removes",
    "reach": "first crossing, linear between evaluations, of each seed; then mean, least and greatest over seeds",
    "loss_spikes": f"stretches of steps whose loss is above {LOSS_SPIKE:g} x the median of the previous "
    f"{MEDIAN_STEPS}; the first {MEDIAN_STEPS} are not judged",
    "gradient_spikes": f"the same for the gradient norm, above {GRADIENT_SPIKE:g} x its median",
    "clipped": "share of steps whose gradient norm is above train.clip",
    "non_finite": "steps whose loss or gradient norm is not a finite number",
    "skipped": "steps without an update of the weights",
}


# ----------------------------------------------------------------------------------------- held-out


def check_comparable(compared: Sequence[RunGroup]) -> None:
    """Raise UserError unless the arms' held-out errors were measured on the same images with the same noise."""
    check_same_held_out({arm.name: arm.config for arm in compared if any(len(c.evaluated) for c in arm.curves)})


def check_same_held_out(configs: Mapping[str, RunConfig]) -> None:
    """Raise UserError unless runs of all these configs are evaluated on the same images with the same noise."""
    for name in COMPARABLE:
        values = {arm: {key: value for key, _, value in keys(config)}[name] for arm, config in configs.items()}
        first = next(iter(values), "")
        for other, value in values.items():
            if value != values[first]:
                raise UserError(
                    f"held-out errors cannot be compared: {name} is {values[first]} for {first!r} and {value} for "
                    f"{other!r}; compare these runs separately"
                )


def errors_by_seed(arm: RunGroup, t: float, kind: str) -> tuple[Floats, Floats]:
    """Steps (V,) at which every seed was evaluated, and each seed's errors at time t, (seeds, V); NaN: not finite."""
    by_seed = [_logged(curve, t, kind) for curve in arm.curves]
    common = sorted(set.intersection(*(set(errors) for errors in by_seed)))
    rows = np.array([[errors[step] for step in common] for errors in by_seed])
    return np.array(common), rows


def _logged(curve: Curve, t: float, kind: str = "whole") -> dict[float, float]:
    """Held-out errors by step; NaN: not finite."""
    return dict(zip(curve.evaluated.tolist(), curve.held_out.get((t, kind), np.empty(0)).tolist(), strict=False))


def _evaluations(curve: Curve, t: float) -> dict[float, float]:
    """Finite held-out errors of the whole image by step."""
    return {step: error for step, error in _logged(curve, t).items() if math.isfinite(error)}


def logged_times(compared: Sequence[RunGroup]) -> list[float]:
    """Times t at which held-out errors were logged."""
    return sorted({t for arm in compared for curve in arm.curves for t, _ in curve.held_out})


@dataclass(frozen=True)
class Range:
    """Mean, least and greatest value over seeds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Reach:
    """The training that an arm needed until its whole-image error at time t was first at most `error`."""

    t: float
    error: float
    arm: str
    seeds: int
    reached: int  # seeds that reached the error
    best: float | None  # least error of any seed so far
    bound: bool  # a seed's first evaluation was already below `error`: the numbers are upper bounds
    needed: dict[str, Range]  # steps, macs, hours; empty unless every seed reached it
    ratio: dict[str, float]  # this arm's means relative to the first arm's; empty if one is missing or a bound


def steps_to_reach(compared: Sequence[RunGroup], targets: Sequence[tuple[float, float]] = ()) -> list[Reach]:
    """The training that each arm needed to reach each (t, error).

    Args:
        targets: pairs (t, error). By default: for each t, the last error of the worst run.

    Raises:
        UserError: no error was logged at the t of a target, or the arms' held-out sets differ.
    """
    check_comparable(compared)
    known = logged_times(compared)
    for t, _ in targets:
        if t not in known:
            way_out = (
                f"choose from {', '.join(map(str, known))}" if known else "train with train.evaluate_every above 0"
            )
            raise UserError(f"no held-out error is logged at t={t:g}: {way_out}")
    rows = []
    for t, error in targets or _worst(compared):
        first: dict[str, Range] = {}
        for arm in compared:
            crossings = [_crossing(_evaluations(curve, t), error) for curve in arm.curves]
            reached = [(c, step) for c, (step, _) in zip(arm.curves, crossings, strict=True) if step is not None]
            bound = any(early for _, early in crossings)
            needed = _needed(reached) if len(reached) == len(arm.curves) else {}
            if arm is compared[0] and not bound:
                first = needed
            ratio = {k: needed[k].mean / first[k].mean for k in needed if k in first and not bound}
            best = min((e for c in arm.curves for e in _evaluations(c, t).values()), default=None)
            rows.append(Reach(t, error, arm.name, len(arm.curves), len(reached), best, bound, needed, ratio))
    return rows


def _worst(compared: Sequence[RunGroup]) -> list[tuple[float, float]]:
    """For each t, the largest of the runs' last errors, which every evaluated run has reached."""
    curves = [curve for arm in compared for curve in arm.curves]
    last = {
        t: [list(errors.values())[-1] for c in curves if (errors := _evaluations(c, t))] for t in logged_times(compared)
    }
    return [(t, max(errors)) for t, errors in last.items() if errors]


def _crossing(evaluations: Mapping[float, float], error: float) -> tuple[float | None, bool]:
    """The step at which the error is first reached (None: not yet), and whether the first evaluation is below it."""
    previous: tuple[float, float] | None = None
    for step, value in evaluations.items():
        if value <= error:
            if previous is None:
                return step, value < error
            before, above = previous
            return before + (step - before) * (above - error) / (above - value), False
        previous = step, value
    return None, False


def _range(values: Sequence[float]) -> Range:
    return Range(sum(values) / len(values), min(values), max(values))


def _needed(reached: Sequence[tuple[Curve, float]]) -> dict[str, Range]:
    rows = {
        "steps": [step for _, step in reached],
        "macs": [float(curve.macs(np.array(step))) for curve, step in reached],
        "hours": [float(curve.hours(np.array(step))) for curve, step in reached],
    }
    ranges = {name: _range(values) for name, values in rows.items()}
    return {name: values for name, values in ranges.items() if math.isfinite(values.mean)}


# ---------------------------------------------------------------------------------------- stability


@dataclass(frozen=True)
class Stability:
    """Stability of a run; DEFINITIONS defines the counts."""

    steps: int
    skipped: int
    non_finite: int
    loss_spikes: int
    gradient_spikes: int
    largest_gradient: float | None  # of the finite norms
    largest_at: int | None  # the step of `largest_gradient`
    clipped: float | None  # share of steps; None: no clipping


def stability(curve: Curve) -> Stability:
    """Count the skipped steps and the spikes of a run, and find its largest gradient norm."""
    finite = np.isfinite(curve.grad_norm)
    largest = int(np.argmax(np.where(finite, curve.grad_norm, -np.inf))) if finite.any() else None
    clip = curve.config.train.clip
    return Stability(
        steps=len(curve.step),
        skipped=int(curve.skipped.sum()),
        non_finite=int((~(np.isfinite(curve.loss) & finite)).sum()),
        loss_spikes=_spikes(curve.loss, LOSS_SPIKE),
        gradient_spikes=_spikes(curve.grad_norm, GRADIENT_SPIKE),
        largest_gradient=None if largest is None else float(curve.grad_norm[largest]),
        largest_at=None if largest is None else int(curve.step[largest]),
        clipped=float((curve.grad_norm > clip).mean()) if clip and len(curve.step) else None,
    )


def _spikes(values: Floats, times_median: float) -> int:
    """Number of stretches of finite values above a multiple of the running median."""
    high = np.isfinite(values[MEDIAN_STEPS:]) & (values[MEDIAN_STEPS:] > times_median * _medians(values))
    return int((high & ~np.append(False, high)[:-1]).sum())


def _medians(values: Floats) -> Floats:
    """For each value after the first MEDIAN_STEPS, the median of the MEDIAN_STEPS before it; NaN counts as infinite."""
    known = np.where(np.isfinite(values), values, np.inf).tolist()
    window = sorted(known[:MEDIAN_STEPS])
    middle, medians = MEDIAN_STEPS // 2, []
    for oldest, newest in zip(known, known[MEDIAN_STEPS:], strict=False):
        medians.append((window[middle - 1] + window[middle]) / 2)
        del window[bisect_left(window, oldest)]
        insort(window, newest)
    return np.array(medians)


def convergence_tables(compared: Sequence[RunGroup], targets: Sequence[tuple[float, float]] = ()) -> dict[str, Any]:
    """Arms, last held-out errors, convergence speed and stability, as values for JSON.

    Raises:
        UserError: see `steps_to_reach`.
    """
    return {
        "definitions": DEFINITIONS,
        "arms": [_summary(arm) for arm in compared],
        "held_out": [row for arm in compared for row in _ends(arm)],
        "reach": [asdict(row) for row in steps_to_reach(compared, targets)],
        "stability": [
            {"arm": arm.name, "run": str(curve.run), "seed": curve.config.seed, **asdict(stability(curve))}
            for arm in compared
            for curve in arm.curves
        ],
    }


def _summary(arm: RunGroup) -> dict[str, Any]:
    """An arm's cost and its runs; hours and speed are None without timing."""
    runs = []
    for curve in arm.curves:
        seconds = float(curve.seconds[-1]) if len(curve.seconds) else None
        speed = float(curve.timed[-1]) * arm.config.global_batch / seconds if seconds else None
        run = {"run": str(curve.run), "seed": curve.config.seed, "steps": int(last_step(curve))}
        runs.append({**run, "hours": seconds and seconds / 3600, "images_per_second": speed})
    return {"arm": arm.name, "differs": arm.differs, "forward_macs": cost.macs(arm.config.model)["total"], "runs": runs}


def _ends(arm: RunGroup) -> list[dict[str, Any]]:
    """Held-out errors at the last step at which every seed was evaluated; None if an error is not finite."""
    ends = []
    for t in logged_times([arm]):
        for kind in ERROR_BANDS:
            steps, rows = errors_by_seed(arm, t, kind)
            if len(steps):
                last = rows[:, -1].tolist()
                finite = all(map(math.isfinite, last))
                error = asdict(_range(last)) if finite else dict.fromkeys(("mean", "low", "high"))
                ends.append({"arm": arm.name, "t": t, "frequencies": kind, "step": int(steps[-1]), **error})
    return ends
