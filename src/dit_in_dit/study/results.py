"""A study's folder as numbers: what was planned, what became of each trial, and how arms compare."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.strict_json import has_form, json_difference, read_json
from dit_in_dit.curves.arms import RunGroup
from dit_in_dit.curves.convergence import check_comparable
from dit_in_dit.curves.logs import Curve, last_step, read_run
from dit_in_dit.metrics.metric import direction, metric_of
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runtime.precision import FULL, before_it_was_named
from dit_in_dit.study.metrics import grouped
from dit_in_dit.study.plan import Arm, Plan, read_plan
from dit_in_dit.study.result import Result, read_result
from dit_in_dit.study.statistics import Difference, Estimate, mean_interval, paired_difference

MOST_DRAWN = 60  # compared arms in a picture


@dataclass(frozen=True)
class StudyResults:
    """A study of named arms, as far as it got.

    Attributes:
        results: of trials that ended, by arm and seed, in the order of the plan.
        folders: of all planned trials.
        logs: of trials that logged a step, by arm and seed.
    """

    plan: Plan
    results: dict[tuple[str, int], Result]
    folders: dict[tuple[str, int], Path]
    logs: dict[tuple[str, int], Curve] = field(default_factory=dict)

    @property
    def primary(self) -> str:
        """The metric that the study was made for."""
        return self.plan.study.primary

    @property
    def compared(self) -> list[Arm]:
        """The arms that are compared with another."""
        return [arm for arm in self.plan.arms if arm.against != arm.name]

    @property
    def drawn(self) -> list[Arm]:
        """The compared arms that pictures show: all of them, but for a very large grid."""
        return self.compared[:MOST_DRAWN]

    @property
    def shown(self) -> list[Arm]:
        """The arms of `drawn` and those that are compared with none."""
        names = {arm.name for arm in self.drawn}
        return [arm for arm in self.plan.arms if arm.name in names or arm.against == arm.name]

    @cached_property
    def done(self) -> dict[tuple[str, int], Result]:
        """The trials whose numbers count."""
        return {key: result for key, result in self.results.items() if result.state == "done"}

    @cached_property
    def metrics(self) -> dict[str, list[str]]:
        """Names of the metrics by group, the primary one first."""
        return grouped({name for result in self.done.values() for name in result.metrics}, self.primary)

    @property
    def ranked(self) -> list[str]:
        """Metrics of which one value is better than another."""
        return [name for members in self.metrics.values() for name in members if direction(name) != "listed"]

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """A metric of an arm by seed, of the trials that are done."""
        found = {seed: result.metrics for (name, seed), result in self.done.items() if name == arm}
        return {seed: float(metrics[metric]) for seed, metrics in found.items() if metric in metrics}

    def estimate(self, arm: str, metric: str) -> Estimate | None:
        """Mean and interval over the seeds that are done."""
        values = self.values(arm, metric)
        return mean_interval(list(values.values())) if values else None

    def difference(self, arm: Arm, metric: str) -> Difference:
        """An arm less what it is compared with, for as many comparisons as the study has planned."""
        mine, theirs = (
            {seed: metric_of(metric).ranked(value) for seed, value in self.values(name, metric).items()}
            for name in (arm.name, arm.against)
        )
        return paired_difference(mine, theirs, max(1, len(self.compared)))

    def floor(self, metric: str) -> float | None:
        """What real images score against real ones."""
        found = [r.floors[metric] for r in self.done.values() if r.floors.get(metric) is not None]
        return sum(found) / len(found) if found else None

    def missing(self) -> Iterator[tuple[str, int, str, str]]:
        """Arm, seed, state and reason of every trial without numbers."""
        for key in self.folders:
            result = self.results.get(key)
            if result is None:
                state = "under way" if key in self.logs else "not started"
                yield *key, state, f"step {last_step(self.logs[key]):.0f} logged" if key in self.logs else ""
            elif result.state != "done":
                yield *key, result.state, result.reason or f"at step {result.step}"

    def arms_of_curves(self) -> list[RunGroup]:
        """The arms for curves, two of one config stay two: trials that are done, or all that logged where none is.

        A trial that failed or is under way would end the arm's curve where it stands.
        """
        found = []
        for arm in self.plan.arms:
            own = {key: log for key, log in self.logs.items() if key[0] == arm.name}
            if chosen := [log for key, log in own.items() if key in self.done] or list(own.values()):
                found.append(RunGroup(arm.name, {}, tuple(chosen)))
        return found


@dataclass(frozen=True)
class SearchTrial:
    """One trial of a search: its number, what it changed, its config (None: it never had one, as where no match was
    found), and what became of it (None: not yet)."""

    number: int
    changes: dict[str, Any]
    config: RunConfig | None
    folder: Path
    result: Result | None


@dataclass(frozen=True)
class SearchResults:
    """A search as far as it got, its trials by number."""

    plan: Plan
    trials: list[SearchTrial]

    def value(self, tried: SearchTrial) -> float:
        """The primary metric as it is compared; NaN where there is none."""
        if tried.result is None or tried.result.state != "done":
            return math.nan
        value = tried.result.metrics.get(self.plan.study.primary)
        return math.nan if value is None else metric_of(self.plan.study.primary).ranked(float(value))

    @property
    def ranked(self) -> list[SearchTrial]:
        """The trials with a finite primary metric, the best first."""
        sign = -1 if direction(self.plan.study.primary) == "higher" else 1
        finite = [tried for tried in self.trials if math.isfinite(self.value(tried))]
        return sorted(finite, key=lambda tried: (sign * self.value(tried), tried.number))


def read_study(out: Path) -> StudyResults:
    """Read a study of named arms.

    Raises:
        UserError: there is no study, a file of it is damaged, or its trials were not evaluated alike.
    """
    plan = read_plan(out)
    results, folders, read = {}, {}, {}
    for trial in plan.trials:
        key, folder = (trial.arm, trial.seed), out / "runs" / trial.key
        folders[key] = folder
        if result := read_result(folder):
            results[key] = result
        if (folder / "config.yaml").exists() and len((log := read_run(folder)).step):
            read[key] = log
    gathered = StudyResults(plan, results, folders, read)
    _check_alike(plan, {folders[key]: result for key, result in gathered.done.items()})
    if "held_out" in gathered.metrics:
        check_comparable(gathered.arms_of_curves())
    return gathered


def read_search(out: Path) -> SearchResults:
    """Read a search; errors as `read_study`."""
    plan, found = read_plan(out), []
    for path in sorted(out.glob("runs/*/changes.json")):
        made, folder = read_json(path), path.parent
        if not has_form(made, {"number": int, "changes": dict}):
            raise UserError(f"{path} is not what a trial of a search changed")
        number, changes = made["number"], made["changes"]
        config = read_config(folder) if (folder / "config.yaml").exists() else None
        found.append(SearchTrial(number, changes, config, folder, read_result(folder)))
    _check_alike(plan, {t.folder: t.result for t in found if t.result is not None and t.result.state == "done"})
    return SearchResults(plan, sorted(found, key=lambda tried: tried.number))


def _check_alike(plan: Plan, results: dict[Path, Result]) -> None:
    """UserError when two trials have different evaluation protocols.

    Of an endless source a trial is compared with images that it saw, which its seed decides: they are the same within a
    seed, and there trials are compared.
    """
    firsts: dict[int | None, tuple[Path, dict[str, Any]]] = {}
    made = plan.made
    unnamed = (
        FULL if made.get("device") == "cpu" else before_it_was_named(str(made.get("versions", {}).get("torch", "")))
    )
    for path, result in results.items():
        protocol = seeds = {"precision": unnamed, **result.protocol} if result.protocol else {}
        if "reference" in protocol:
            seeds = {**protocol, "reference": {k: v for k, v in protocol["reference"].items() if k != "sha256"}}
        for key, compared in ((result.seed, protocol), (None, seeds)):
            first, theirs = firsts.setdefault(key, (path, compared))
            if field_ := json_difference(theirs, compared):
                raise UserError(
                    f"{first.name} and {path.name} cannot stand in one table, their evaluation protocols differ in "
                    f"{field_}; evaluate them alike"
                )
