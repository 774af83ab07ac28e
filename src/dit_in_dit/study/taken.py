"""Finished trials of a study, taken from the two files that are worth keeping: plan.json and results.csv."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from dit_in_dit.config.errors import UserError
from dit_in_dit.runs import atomic
from dit_in_dit.study.plan import read_plan
from dit_in_dit.study.result import Result


def take_trials(earlier: Path, out: Path) -> int:
    """Give the study in `out` the plan of `earlier`, if it has none, and the results of the finished trials there.

    Such a trial is not trained again. It has numbers only: no curve, no checkpoint and no samples. Returns how many
    trials were taken.

    Raises:
        UserError: `earlier` lacks one of its files, a row cannot be read, or the study in `out` has another plan.
    """
    plan = read_plan(earlier)
    if not (out / "plan.json").exists():
        atomic.write_atomic(out / "plan.json", plan.to_json())
    elif read_plan(out) != plan:
        raise UserError(f"--from {earlier} has another plan than {out}: begin in another --out")
    rows: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    try:
        with (earlier / "results.csv").open(newline="") as lines:
            for row in csv.DictReader(lines):
                rows[row["arm"], row["seed"]].append(row)
        taken = 0
        for trial in plan.trials:
            found = rows[trial.arm, str(trial.seed)]
            if not found or found[0]["state"] != "done":
                continue
            metrics = {row["metric"]: float(row["value"]) for row in found}
            floors = {row["metric"]: float(row["floor"]) for row in found if row["floor"]}
            result = Result(trial.arm, trial.seed, "done", int(found[0]["step"]), metrics, floors, {})
            path = out / "runs" / trial.key / "result.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_atomic(path, result.to_json() + "\n")
                taken += 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{earlier / 'results.csv'} is not the table of a study: {str(error)[:80]}") from None
    return taken
