"""A study's folder as numbers: the plan, the result of each trial, and the differences between arms."""

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
from dit_in_dit.metrics.metric import direction, group_metrics, metric_of
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runtime.precision import FULL, precision_of_version
from dit_in_dit.study.plan import Arm, Plan, read_plan
from dit_in_dit.study.result import Result, read_result
from dit_in_dit.study.statistics import Difference, Estimate, mean_interval, paired_difference

MOST_DRAWN = 60  # arms in a picture


@dataclass(frozen=True)
class StudyResults:
    """The results of a study of named arms, finished or not.

    Attributes:
        results: results of the trials that ended, by arm and seed, in the order of the plan.
        folders: folders of all planned trials, by arm and seed.
        logs: logs of the trials that logged a step, by arm and seed.
    """

    plan: Plan
    results: dict[tuple[str, int], Result]
    folders: dict[tuple[str, int], Path]
    logs: dict[tuple[str, int], Curve] = field(default_factory=dict)

    @property
    def primary(self) -> str:
        """The name of the study's primary metric."""
        return self.plan.study.primary

    @property
    def compared(self) -> list[Arm]:
        """The arms that are compared with another."""
        return [arm for arm in self.plan.arms if arm.against != arm.name]

    @property
    def drawn(self) -> list[Arm]:
        """The compared arms that pictures show: all of them, unless the grid is very large."""
        return self.compared[:MOST_DRAWN]

    @property
    def shown(self) -> list[Arm]:
        """The arms of `drawn` and the controls."""
        names = {arm.name for arm in self.drawn}
        return [arm for arm in self.plan.arms if arm.name in names or arm.against == arm.name]

    @cached_property
    def done(self) -> dict[tuple[str, int], Result]:
        """The results of the trials that are done."""
        return {key: result for key, result in self.results.items() if result.state == "done"}

    @cached_property
    def metrics(self) -> dict[str, list[str]]:
        """Names of the metrics by group, the primary one first."""
        return group_metrics({name for result in self.done.values() for name in result.metrics}, self.primary)

    @property
    def ranked(self) -> list[str]:
        """Metrics with a direction: a higher value, a lower value or a value nearer to zero is better."""
        return [name for members in self.metrics.values() for name in members if direction(name) != "listed"]

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """An arm's values of a metric by seed, from the trials that are done."""
        return {
            seed: float(result.metrics[metric])
            for (name, seed), result in self.done.items()
            if name == arm and metric in result.metrics
        }

    def estimate(self, arm: str, metric: str) -> Estimate | None:
        """Mean and interval over the seeds that are done."""
        values = self.values(arm, metric)
        return mean_interval(list(values.values())) if values else None

    def difference(self, arm: Arm, metric: str) -> Difference:
        """The arm minus the arm it is compared with; the wide interval holds for all comparisons that were planned."""
        own, other = (
            {seed: metric_of(metric).ranked(value) for seed, value in self.values(name, metric).items()}
            for name in (arm.name, arm.against)
        )
        return paired_difference(own, other, max(1, len(self.compared)))

    def floor(self, metric: str) -> float | None:
        """The score of real images against real images, mean over trials; None if no trial has this score."""
        floors = [r.floors[metric] for r in self.done.values() if r.floors.get(metric) is not None]
        return sum(floors) / len(floors) if floors else None

    def missing(self) -> Iterator[tuple[str, int, str, str]]:
        """Arm, seed, state and reason of every trial without metrics."""
        for key in self.folders:
            result = self.results.get(key)
            if result is None:
                state = "under way" if key in self.logs else "not started"
                yield *key, state, f"step {last_step(self.logs[key]):.0f} logged" if key in self.logs else ""
            elif result.state != "done":
                yield *key, result.state, result.reason or f"at step {result.step}"

    def arms_of_curves(self) -> list[RunGroup]:
        """Each arm with the curves of its done trials or, if it has none, of all its trials that logged a step.

        A trial that failed or still runs would cut the arm's curve short. Arms with equal configs are not merged.
        """
        groups = []
        for arm in self.plan.arms:
            own = {key: log for key, log in self.logs.items() if key[0] == arm.name}
            if curves := [log for key, log in own.items() if key in self.done] or list(own.values()):
                groups.append(RunGroup(arm.name, {}, tuple(curves)))
        return groups


@dataclass(frozen=True)
class SearchTrial:
    """One trial of a search."""

    number: int
    changes: dict[str, Any]  # config keys that the sampler chose, with their values
    config: RunConfig | None  # the trial's config; None if there is none, for example because no match exists
    folder: Path
    result: Result | None  # None until the trial ends


@dataclass(frozen=True)
class SearchResults:
    """The results of a search, finished or not; its trials by number."""

    plan: Plan
    trials: list[SearchTrial]

    def value(self, trial: SearchTrial) -> float:
        """The primary metric's value, by which the trial is ranked; NaN if the trial has none."""
        if trial.result is None or trial.result.state != "done":
            return math.nan
        value = trial.result.metrics.get(self.plan.study.primary)
        return math.nan if value is None else metric_of(self.plan.study.primary).ranked(float(value))

    @property
    def ranked(self) -> list[SearchTrial]:
        """The trials with a finite primary metric, the best first."""
        sign = -1 if direction(self.plan.study.primary) == "higher" else 1
        finite = [trial for trial in self.trials if math.isfinite(self.value(trial))]
        return sorted(finite, key=lambda trial: (sign * self.value(trial), trial.number))


def read_study(out: Path) -> StudyResults:
    """Read a study of named arms.

    Raises:
        UserError: there is no study, a file of it is damaged, or its trials were not evaluated alike.
    """
    plan = read_plan(out)
    results, folders, logs = {}, {}, {}
    for trial in plan.trials:
        key, folder = (trial.arm, trial.seed), out / "runs" / trial.key
        folders[key] = folder
        if result := read_result(folder):
            results[key] = result
        if (folder / "config.yaml").exists() and len((log := read_run(folder)).step):
            logs[key] = log
    study = StudyResults(plan, results, folders, logs)
    _check_alike(plan, {folders[key]: result for key, result in study.done.items()})
    if "held_out" in study.metrics:
        check_comparable(study.arms_of_curves())
    return study


def read_search(out: Path) -> SearchResults:
    """Read a search; raises the same errors as `read_study`."""
    plan, trials = read_plan(out), []
    for path in sorted(out.glob("runs/*/changes.json")):
        choice, folder = read_json(path), path.parent
        if not has_form(choice, {"number": int, "changes": dict}):
            raise UserError(
                f"{path} does not hold a trial's number and changes: remove this file to leave the trial out"
            )
        config = read_config(folder) if (folder / "config.yaml").exists() else None
        trials.append(SearchTrial(choice["number"], choice["changes"], config, folder, read_result(folder)))
    _check_alike(plan, {t.folder: t.result for t in trials if t.result is not None and t.result.state == "done"})
    return SearchResults(plan, sorted(trials, key=lambda trial: trial.number))


def _check_alike(plan: Plan, results: dict[Path, Result]) -> None:
    """Raise UserError if two trials have different evaluation protocols.

    An endless source has no fixed training set. The reference of a trial is then the images that the trial saw, which
    depend on the seed. So the digest of the reference must agree only between trials of the same seed.
    """
    firsts: dict[int | None, tuple[Path, dict[str, Any]]] = {}
    torch_version = str(plan.made.get("versions", {}).get("torch", ""))
    unnamed = FULL if plan.made.get("device") == "cpu" else precision_of_version(torch_version)
    for path, result in results.items():
        if not result.protocol:  # only held-out errors were measured, or the trial was taken from kept rows
            continue
        protocol = any_seed = {"precision": unnamed, **result.protocol}
        if "reference" in protocol:
            any_seed = {**protocol, "reference": {k: v for k, v in protocol["reference"].items() if k != "sha256"}}
        for seed, compared in ((result.seed, protocol), (None, any_seed)):
            first, expected = firsts.setdefault(seed, (path, compared))
            if field_ := json_difference(expected, compared):
                raise UserError(
                    f"{first.name} and {path.name} cannot stand in one table, because their evaluation protocols "
                    f"differ in {field_}; evaluate both in the same way"
                )
