"""What runs logged while they trained, and which of them belong together.

Runs whose configs differ in the seed alone are one arm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.program import format_stages
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import Section, keys
from dit_in_dit.config.strict_json import parse_lines
from dit_in_dit.inspection import cost
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.jsonl import MOST_STEP, check_lines, is_log_line

Floats = NDArray[np.floating[Any]]

ADVICE = "mend it, or leave the run out"
CHUNK_BYTES = 1 << 20  # of a log, parsed at once
LONGEST_NAME = 48  # characters of an arm's name; above it, folders' names are used


# -------------------------------------------------------------------------------------------- logs


@dataclass(frozen=True)
class Curve:
    """What a run has logged so far: L steps, V held-out evaluations, K readings of the clock (0: no timing)."""

    run: Path
    config: RunConfig
    step: Floats  # (L,), increasing
    loss: Floats  # (L,)
    grad_norm: Floats  # (L,), before clipping
    parts: dict[str, Floats]  # gradient norm of each part of the model, (L,)
    skipped: NDArray[np.bool_]  # (L,)
    evaluated: Floats  # (V,), steps
    held_out: dict[tuple[float, str], Floats]  # error by (t, "whole" or "high"), (V,); NaN: not a finite number
    timed: Floats  # (K,), steps, increasing
    seconds: Floats  # (K,), of training up to them

    def macs(self, steps: Floats) -> Floats:
        """Training MACs up to these steps."""
        per_step = cost.training_macs(self.config.model)["total"] * self.config.global_batch
        return steps * float(per_step)

    def hours(self, steps: Floats) -> Floats:
        """Hours of training up to these steps; NaN where the clock was not read."""
        if not len(self.timed):
            return np.full(np.shape(steps), np.nan)
        return np.interp(steps, np.append(0, self.timed), np.append(0, self.seconds) / 3600, right=np.nan)


def read_run(path: Path) -> Curve:
    """The curves of a run folder, finished or not; half a line at the end of a log is left out.

    Raises:
        UserError: there is no run, or a file of it cannot be understood.
    """
    config = read_config(path)
    steps: list[dict[Any, Floats]] = []
    evaluations: list[dict[str, Any]] = []
    log = path / "log.jsonl"
    try:
        for rows, back in _between_roll_backs(log):
            evaluations += [_evaluation(row) for row in rows if "held_out" in row]
            steps.append(_columns([row for row in rows if "held_out" not in row]))
            if back is not None:  # what came after that step was taken again
                evaluations = [row for row in evaluations if row["step"] <= back]
                steps = [
                    {name: values[columns["step"] <= back] for name, values in columns.items()} for columns in steps
                ]
        trained, tested = _joined(steps), _columns(evaluations)
        step = trained.pop("step", np.empty(0))
        if not (np.append(step, tested.get("step", ())) <= MOST_STEP).all():
            raise ValueError("a step is no step")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        for rows in _rows(log):  # only now: looking at every line takes longer than reading them
            check_lines(rows, is_log_line, str(log), ADVICE)
        raise UserError(f"{log} is not a training log: {truncate(error, 60)}; {ADVICE}") from None
    if (np.diff(step) <= 0).any():
        raise UserError(f"{log} goes back from step {step[:-1][np.diff(step) <= 0][0]:.0f}: it holds more than one run")
    absent = np.full(len(step), np.nan)
    timed, seconds = _clock(path / "timing.jsonl")
    return Curve(
        run=path,
        config=config,
        step=step,
        loss=trained.pop("loss", absent),
        grad_norm=trained.pop("grad_norm", absent),
        skipped=np.nan_to_num(trained.pop("skipped", absent)) > 0,
        parts={name.removeprefix("grad_norm."): values for name, values in sorted(trained.items())},
        evaluated=tested.pop("step", np.empty(0)),
        held_out=dict(sorted(tested.items(), key=lambda item: (item[0][0], -len(item[0][1])))),  # whole before high
        timed=timed,
        seconds=seconds,
    )


def _rows(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The objects in a file of JSON lines, many at a time: one call for a chunk is faster than one for a line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        while lines := file.readlines(CHUNK_BYTES):
            if not lines[-1].endswith(b"\n"):
                lines.pop()
            yield parse_lines(lines, str(path), ADVICE)


def _between_roll_backs(path: Path) -> Iterator[tuple[list[dict[str, Any]], int | None]]:
    """The objects of a log, and the step that the run then went back to, if it did."""
    for rows in _rows(path):
        start = 0
        for place in [place for place, row in enumerate(rows) if "rollback" in row]:
            yield rows[start:place], int(rows[place]["rollback"]["to"])
            start = place + 1
        yield rows[start:], None


def _evaluation(row: dict[str, Any]) -> dict[Any, Any]:
    """The step and the errors of a line of a log."""
    return {"step": row["step"], **held_out_errors(row)}


def held_out_errors(row: dict[str, Any]) -> dict[tuple[float, str], float]:
    """The errors of a line of a log by (t, kind)."""
    return {(float(t), kind): _finite(error) for t, kinds in row["held_out"].items() for kind, error in kinds.items()}


def _finite(error: Any) -> float:
    """The number; NaN where it is not finite, which a log writes as "inf" or "nan"."""
    number = float(error)
    return number if math.isfinite(number) else math.nan


def _columns(rows: list[dict[Any, Any]]) -> dict[Any, Floats]:
    """A column for each key that is drawn; NaN where a row lacks it."""
    names = {name for name in set().union(*rows) if _is_drawn(name)}
    steps = {"step": np.array([row["step"] for row in rows], float)} if rows else {}
    return {**{name: np.array([row.get(name, math.nan) for row in rows], float) for name in names}, **steps}


def _is_drawn(name: Any) -> bool:
    return isinstance(name, tuple) or name in ("loss", "grad_norm", "skipped") or name.startswith("grad_norm.")


def _joined(chunks: list[dict[Any, Floats]]) -> dict[Any, Floats]:
    names = dict.fromkeys(name for chunk in chunks for name in chunk)
    absent = [np.full(len(chunk.get("step", ())), np.nan) for chunk in chunks]
    return {name: np.concatenate([c.get(name, a) for c, a in zip(chunks, absent, strict=True)]) for name in names}


def _clock(path: Path) -> tuple[Floats, Floats]:
    """Steps and the seconds of training up to them. A resumed run repeats steps: each counts once, its first time."""
    try:
        rows = [(row["step"], row["seconds"]) for chunk in _rows(path) for row in chunk]
        step, seconds = np.array(rows, float).reshape(-1, 2).T
    except (KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path} is not a log of the clock") from None
    before = np.append(0, np.maximum.accumulate(step))[:-1]
    new = step > before
    covered = (step - np.append(0, step)[:-1])[new]
    spent = np.diff(seconds, prepend=0)[new]
    return step[new], np.cumsum(spent * (step - before)[new] / covered)


# -------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class RunGroup:
    """Runs whose configs differ in the seed alone."""

    name: str
    differs: dict[str, Any]  # every key in which the arms differ, and its value here
    curves: tuple[Curve, ...]

    @property
    def config(self) -> RunConfig:
        """The config of its first seed."""
        return self.curves[0].config

    @property
    def label(self) -> str:
        """Name and number of seeds."""
        return f"{self.name} ({len(self.curves)} {'seed' if len(self.curves) == 1 else 'seeds'})"


def arms(curves: Sequence[Curve]) -> list[RunGroup]:
    """The arms in the order of their first runs, named by what differs; runs that logged no step are left out.

    Raises:
        UserError: no run has logged a step, or two runs have the same config and seed.
    """
    groups: dict[tuple[Any, ...], list[Curve]] = {}
    for curve in curves:
        if not len(curve.step):
            continue
        group = groups.setdefault(tuple(_settings(curve.config).items()), [])
        for other in group:
            if other.config.seed == curve.config.seed:
                raise UserError(f"{other.run} and {curve.run} are one config with one seed: give one of them")
        group.append(curve)
    if not groups:
        raise UserError("no step is logged yet in " + ", ".join(str(curve.run) for curve in curves))
    settings = [dict(group) for group in groups]
    names = dict.fromkeys(name for known in settings for name in known)
    differing = [name for name in names if len({known[name] for known in settings if name in known}) > 1]
    found = list(groups.values())
    return [
        RunGroup(name, {key: known[key] for key in differing if key in known}, tuple(group))
        for name, known, group in zip(_names(settings, differing, found), settings, found, strict=True)
    ]


def _settings(config: RunConfig) -> dict[str, Any]:
    """What makes a run but its seed: stages spelled out, and no key that the model does not read."""
    found = {name: value for name, _, value in keys(config) if not isinstance(value, Section)}
    found["model.stages"] = format_stages(config.model.program)
    spelled = ("seed", "model.depth", "model.use_inner", "model.inner.depth_ratio")
    unread = () if config.model.blocks("inner") else tuple(name for name in found if name.startswith("model.inner."))
    return {name.removeprefix("model."): found[name] for name in found if name not in spelled + unread}


def _names(settings: list[dict[str, Any]], differing: list[str], groups: list[list[Curve]]) -> list[str]:
    """A name for each arm from the fewest keys that tell them apart; from folders where that is long."""

    def told_apart(by: Sequence[str]) -> int:
        return len({tuple(known.get(name) for name in by) for known in settings})

    chosen = [name for name in differing or ["stages"] if told_apart([name]) == len(settings)][:1]
    for name in differing:
        if told_apart([*chosen, name]) > told_apart(chosen):
            chosen.append(name)
    names = [", ".join(f"{name}={known[name]}" for name in chosen if name in known) for known in settings]
    folders = [group[0].run.resolve().name for group in groups]
    long = max(map(len, names)) > LONGEST_NAME
    return folders if long and len(set(folders)) == len(folders) else names


def notes(curves: Sequence[Curve]) -> list[str]:
    """What a reader has to know: runs left out or unfinished, missing clocks, unlike schedules and losses."""
    found = []
    for curve in curves:
        done, wanted = last_step(curve), curve.config.train.steps
        if not done:
            found.append(f"{curve.run}: no step logged yet, left out")
        elif done < wanted:
            found.append(f"{curve.run}: {done:.0f} of {wanted} steps so far")
        if len(bad := not_finite_steps(curve)):
            found.append(
                f"{curve.run}: the held-out error is not finite at {len(bad)} of {len(curve.evaluated)} evaluations, "
                f"first at step {bad[0]:.0f}; it is left out there"
            )
        if done and not len(curve.timed):
            found.append(f"{curve.run}: no timing.jsonl, so no hours and no throughput")
    if len({(c.config.train.schedule, c.config.train.steps) for c in curves}) > 1 and any(
        c.config.train.schedule == "cosine" for c in curves
    ):
        found.append(
            "learning rates fall over other lengths (train.schedule, train.steps): speeds are not like for like"
        )
    if unlike_losses(curves):
        found.append("training losses are of different quantities (diffusion.weight, predict or time): not comparable")
    return found


def not_finite_steps(curve: Curve) -> Floats:
    """Steps of the evaluations at which an error is not finite."""
    bad = [np.isnan(errors) for errors in curve.held_out.values()]
    return curve.evaluated[np.logical_or.reduce(bad)] if bad else np.empty(0)


def unlike_losses(curves: Sequence[Curve]) -> bool:
    """Whether their training losses are of different quantities."""
    return len({_loss_of(curve.config) for curve in curves}) > 1


def _loss_of(config: RunConfig) -> tuple[Any, ...]:
    """What the training loss measures: an error of what, at which times."""
    diffusion = config.diffusion
    of = diffusion.predict if diffusion.weight == "prediction" else diffusion.weight
    spread = (diffusion.time_mean, diffusion.time_std) if diffusion.time == "logit_normal" else ()
    return diffusion.path, of, diffusion.time, spread


def last_step(curve: Curve) -> float:
    """The last step logged; 0 for none."""
    return float(curve.step[-1]) if len(curve.step) else 0.0
