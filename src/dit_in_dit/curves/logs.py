"""Training logs of a run as arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.strict_json import parse_lines
from dit_in_dit.inspection import cost
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.jsonl import MOST_STEP, check_lines, is_log_line

Floats = NDArray[np.floating[Any]]

ADVICE = "fix the file, or leave the run out"
CHUNK_BYTES = 1 << 20  # of a log, parsed in one call


@dataclass(frozen=True)
class Curve:
    """The log of a run so far: L steps, V held-out evaluations, K clock readings (0: no timing)."""

    run: Path
    config: RunConfig
    step: Floats  # (L,), increasing
    loss: Floats  # (L,)
    grad_norm: Floats  # (L,), before clipping
    parts: dict[str, Floats]  # gradient norm of each part of the model, (L,)
    skipped: NDArray[np.bool_]  # (L,)
    evaluated: Floats  # (V,), steps
    held_out: dict[tuple[float, str], Floats]  # error by (t, "whole" or "high"), (V,); NaN: not finite
    timed: Floats  # (K,), steps, increasing
    seconds: Floats  # (K,), training time up to these steps

    def macs(self, steps: Floats) -> Floats:
        """Training MACs up to these steps."""
        macs: Floats = cost.run_macs(self.config, steps)
        return macs

    def hours(self, steps: Floats) -> Floats:
        """Hours of training up to these steps; NaN after the last clock reading."""
        if not len(self.timed):
            return np.full(np.shape(steps), np.nan)
        return np.interp(steps, np.append(0, self.timed), np.append(0, self.seconds) / 3600, right=np.nan)


def read_run(path: Path) -> Curve:
    """Read the logs of a finished or unfinished run; an incomplete last line is ignored.

    Raises:
        UserError: the folder holds no run, or one of its files is damaged.
    """
    config, log = read_config(path), path / "log.jsonl"
    try:
        trained, tested = _read_log(log)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        for rows in _rows(log):  # only after an error: checking every line takes longer than reading the log
            check_lines(rows, is_log_line, str(log), ADVICE)
        raise UserError(f"{log} is not a training log: {truncate(error, 60)}; {ADVICE}") from None
    step = trained.pop("step", np.empty(0))
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


def _read_log(log: Path) -> tuple[dict[Any, Floats], dict[Any, Floats]]:
    """Columns of the training steps and of the held-out evaluations, without the steps that a rollback discarded."""
    steps: list[dict[Any, Floats]] = []
    evaluations: list[dict[Any, Any]] = []
    for rows, back in _between_rollbacks(log):
        evaluations += [{"step": row["step"], **held_out_errors(row)} for row in rows if "held_out" in row]
        steps.append(_columns([row for row in rows if "held_out" not in row]))
        if back is not None:  # the run repeats the steps after that one
            evaluations = [row for row in evaluations if row["step"] <= back]
            steps = [{name: values[columns["step"] <= back] for name, values in columns.items()} for columns in steps]
    trained, tested = _concatenate(steps), _columns(evaluations)
    if not (np.append(trained.get("step", ()), tested.get("step", ())) <= MOST_STEP).all():
        raise ValueError(f"a step is not a number up to {MOST_STEP}")
    return trained, tested


def _rows(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Objects of a file of JSON lines, in chunks: one parser call per chunk is faster than one per line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        while lines := file.readlines(CHUNK_BYTES):
            if not lines[-1].endswith(b"\n"):
                lines.pop()
            yield parse_lines(lines, str(path), ADVICE)


def _between_rollbacks(path: Path) -> Iterator[tuple[list[dict[str, Any]], int | None]]:
    """Objects of a log up to each rollback, with the step to which the run went back (None at the end of a chunk)."""
    for rows in _rows(path):
        start = 0
        for place in [place for place, row in enumerate(rows) if "rollback" in row]:
            yield rows[start:place], int(rows[place]["rollback"]["to"])
            start = place + 1
        yield rows[start:], None


def held_out_errors(row: dict[str, Any]) -> dict[tuple[float, str], float]:
    """The held-out errors in a line of a log, by (t, kind); NaN: not finite (in the log: "inf" or "nan")."""
    errors = {(float(t), kind): float(error) for t, kinds in row["held_out"].items() for kind, error in kinds.items()}
    return {at: error if math.isfinite(error) else math.nan for at, error in errors.items()}


def _columns(rows: list[dict[Any, Any]]) -> dict[Any, Floats]:
    """A column for each key of `Curve`; NaN if a row lacks the key."""
    used = ("loss", "grad_norm", "skipped")
    names = {n for n in set().union(*rows) if isinstance(n, tuple) or n in used or n.startswith("grad_norm.")}
    steps = {"step": np.array([row["step"] for row in rows], float)} if rows else {}
    return {**{name: np.array([row.get(name, math.nan) for row in rows], float) for name in names}, **steps}


def _concatenate(chunks: list[dict[Any, Floats]]) -> dict[Any, Floats]:
    """The columns of all chunks; NaN in chunks that lack a column."""
    names = dict.fromkeys(name for chunk in chunks for name in chunk)
    absent = [np.full(len(chunk.get("step", ())), np.nan) for chunk in chunks]
    return {name: np.concatenate([c.get(name, a) for c, a in zip(chunks, absent, strict=True)]) for name in names}


def _clock(path: Path) -> tuple[Floats, Floats]:
    """Steps, and seconds of training up to each step. If a resumed run repeats a step, only the first time counts."""
    try:
        rows = [(row["step"], row["seconds"]) for chunk in _rows(path) for row in chunk]
        step, seconds = np.array(rows, float).reshape(-1, 2).T
    except UserError:
        raise
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a timing log; {ADVICE}") from None
    before = np.append(0, np.maximum.accumulate(step))[:-1]
    new = step > before
    covered = (step - np.append(0, step)[:-1])[new]
    spent = np.diff(seconds, prepend=0)[new]
    return step[new], np.cumsum(spent * (step - before)[new] / covered)


def not_finite_steps(curve: Curve) -> Floats:
    """Steps whose evaluation has an error that is not finite."""
    bad = [np.isnan(errors) for errors in curve.held_out.values()]
    return curve.evaluated[np.logical_or.reduce(bad)] if bad else np.empty(0)


def last_step(curve: Curve) -> float:
    """The last logged step; 0 if no step is logged."""
    return float(curve.step[-1]) if len(curve.step) else 0.0
