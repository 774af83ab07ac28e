"""Numbers of a study as CSV, finished trials read back from it, and a table for a paper."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dit_in_dit.config.errors import UserError
from dit_in_dit.metrics.metric import metric_of
from dit_in_dit.runs import atomic
from dit_in_dit.study import formatting
from dit_in_dit.study.plan import read_plan
from dit_in_dit.study.result import Result
from dit_in_dit.study.results import StudyResults


def csv_text(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV with a header line, then the rows."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    return text.getvalue()


def metric_rows(start: Sequence[object], result: Result | None) -> Iterator[list[object]]:
    """A row for each metric of a trial: `start`, step, metric, value, floor. A trial without metrics gives one row."""
    begin = [*start, result.step if result else ""]
    if result is None or not result.metrics:
        yield [*begin, "", "", ""]
        return
    for metric, value in sorted(result.metrics.items()):
        floor = result.floors.get(metric)
        yield [*begin, metric, repr(float(value)), "" if floor is None else repr(float(floor))]


def results_csv(study: StudyResults) -> str:
    """CSV: a line for each arm, seed and metric. A trial without metrics has one line with empty metric fields."""
    states = {(arm, seed): state for arm, seed, state, _ in study.missing()}
    rows = (
        row for key in study.folders for row in metric_rows([*key, states.get(key, "done")], study.results.get(key))
    )
    return csv_text(["arm", "seed", "state", "step", "metric", "value", "floor"], rows)


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


def held_out_curves(study: StudyResults) -> str:
    """CSV: a line for each arm, seed, evaluated step and held-out error."""
    rows = (
        [*key, int(step), f"held_out.{t}.{kind}", repr(float(error))]
        for key, log in study.logs.items()
        for (t, kind), errors in log.held_out.items()
        for step, error in zip(log.evaluated, errors, strict=True)
    )
    return csv_text(["arm", "seed", "step", "metric", "value"], rows)


def paper_table(study: StudyResults) -> tuple[list[str], list[list[str]], str]:
    """Column heads, rows and caption of the table for a paper: costs, and the metrics that `_in_paper` selects."""
    shown = [name for group, names in study.metrics.items() for name in names if _in_paper(study, group, name)]
    heads = ["arm", "MACs (M)", "params (M)", *shown]
    rows = []
    for arm in study.plan.arms:
        cells = [arm.name, f"{arm.cost['macs'] / 1e6:.4g}", f"{arm.cost['params'] / 1e6:.4g}"]
        for metric in shown:
            marked = arm.against != arm.name and study.difference(arm, metric).marked
            cells.append(formatting.mean(study, arm.name, metric) + ("†" if marked else ""))
        rows.append(cells)
    done = [sum(name == arm.name for name, _ in study.done) for arm in study.plan.arms]
    fewest, most = min(done), max(done)
    seeds = formatting.count(most, "seed") if fewest == most else f"{fewest} to {most} seeds"
    marks = (
        f"; mean ± half of its 95% interval. † differs from what it is compared with ({study.plan.control.name} unless "
        f"said otherwise): paired t interval, corrected for {formatting.count(len(study.compared), 'comparison')}, "
        "excludes zero"
    )
    caption = f"{study.plan.study.question or study.plan.name} {seeds} for each arm"
    return heads, rows, caption + (marks if most > 1 else ": a lead, no claim") + "."


def _in_paper(study: StudyResults, group: str, metric: str) -> bool:
    """Whether the table for a paper shows a metric. Spectra, moments and seams are shown only as the primary metric."""
    known = metric_of(metric)
    if known.direction == "listed":
        return False
    return group in ("held_out", "standard") or metric == study.primary or known.name == "swd.*" or bool(known.compute)
