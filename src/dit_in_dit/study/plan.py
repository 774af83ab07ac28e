"""A study as data: what varies, what is held equal, the budget, the seeds and the metrics.

A user writes a `StudyConfig`. On a device it becomes a `Plan`: every arm as a config of matched cost, and a trial for
each arm and seed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

from dit_in_dit.config.errors import UserError, did_you_mean, truncate
from dit_in_dit.config.files import parse_assignment
from dit_in_dit.config.plugins import missing_plugins
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import Section, key, to_dict, to_hash
from dit_in_dit.config.strict_json import has_form, parse_json
from dit_in_dit.config.strict_yaml import read_yaml
from dit_in_dit.metrics.metric import plugin_metrics
from dit_in_dit.runs.folder import newest_manifest

BUDGETS = ("steps", "images", "macs", "seconds", "epochs")
GROUPS = ("held_out", "pixels", "classifier", "inception", "dinov2")
NUMBER = (int, float)
COSTS = {"macs": NUMBER, "params": NUMBER}
ARM_FORM = {"name": str, "changes": dict, "against": str, "config": dict, "matched": dict, "cost": COSTS, "gap": COSTS}
PLAN_FORM = {"name": str, "study": dict, "arms": [ARM_FORM], "made": dict}


@dataclass(frozen=True)
class StudyConfig(Section):
    """A question and the design that answers it."""

    prefix: ClassVar[str] = "study"
    question: str = key("", "the study's question, in words")
    base: str = key("emoji", "the preset, or the YAML file of a config, that all arms start from")
    set: dict[str, Any] = key(dict, "config keys of all arms, such as {train.batch_size: 64}")
    arms: dict[str, Any] = key(dict, "name: {config keys} of each arm; `against: ARM` replaces the control")
    grid: dict[str, Any] = key(dict, "config key: [values]; every combination is an arm")
    search: dict[str, Any] = key(dict, "config key: [values] or {low, high, step or log}; a sampler chooses")
    trials: int = key(20, "number of trials of a search", low=1, high=100_000)
    control: str = key("", "the arm that the others are compared with; empty: the first")
    match: Literal["macs", "time", "params", "none"] = key("macs", "the cost that an arm shares with the control")
    tolerance: float = key(0.02, "largest relative difference in the matched cost", low=1e-4, high=1)
    budget: dict[str, Any] = key(dict, "training budget in steps, images, macs, seconds or epochs; empty: train.steps")
    seeds: tuple[int, ...] = key((0, 1, 2), "every arm is trained once with each seed", low=0, high=2**63 - 1)
    metrics: tuple[str, ...] = key(("held_out", "pixels"), "held_out, pixels, classifier, inception, dinov2")
    primary: str = key("held_out.0.2.high", "the metric that the study is judged by; a search minimises it")
    samples: int = key(256, "number of samples per trial, for all metrics except held_out", low=2, high=10**6)
    prune: bool = key(False, "stop trials whose held-out error is above the median of the others")
    weights: str = key("", "torch-fidelity's Inception weights, for inception")
    dinov2: str = key("", "folder of DINOv2 weights, for dinov2")
    threads: int = key(1, "CPU threads per trial; results do not depend on the number of workers", low=1, high=1024)

    @classmethod
    def names(cls) -> list[str]:
        """Keys of a study."""
        return [f"{cls.prefix}.{f.name}" for f in fields(cls)]

    def check(self) -> None:
        if sum(map(bool, (self.arms, self.grid, self.search))) != 1:
            raise UserError("study: give one of arms, grid and search (and not an empty one)")
        for name, values in {**self.grid, **self.search}.items():
            _check_values(name, values, "search" if self.search else "grid")
        if len(self.budget) > 1 or any(kind not in BUDGETS for kind in self.budget):
            raise UserError(f"study.budget must be one of {', '.join(BUDGETS)}: got {str(self.budget)[:60]}")
        for kind, amount in self.budget.items():
            if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < float("inf"):
                raise UserError(f"study.budget.{kind} must be a number above 0: got {str(amount)[:40]!r}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"study.seeds must be different numbers, at least one: got {list(self.seeds)}")
        known = dict.fromkeys((*GROUPS, *(metric.group for metric in plugin_metrics().values())))
        for group in self.metrics:
            if group not in known:
                raise UserError(f"unknown metrics {group!r}{did_you_mean(group, known)}")
        if not self.metrics:
            raise UserError(f"study.metrics is empty: choose from {', '.join(known)}")
        if self.primary.split(".")[0] == "held_out" and "held_out" not in self.metrics:
            raise UserError(f"study.primary={self.primary} is not measured: add held_out to study.metrics")
        if self.prune and "held_out" not in self.metrics:
            raise UserError("study.prune judges by held-out errors: add held_out to study.metrics")


def _check_values(name: str, values: Any, what: str) -> None:
    """Raise UserError if the values for a key of a grid or a search are invalid."""
    if isinstance(values, list) and values:
        return
    if what == "search" and isinstance(values, dict):
        low, high = values.get("low"), values.get("high")
        known = not set(values) - {"low", "high", "step", "log"}
        if known and isinstance(low, int | float) and isinstance(high, int | float) and low < high:
            return
        raise UserError(f"study.search.{name} must have low < high, and step or log: got {str(values)[:60]}")
    raise UserError(f"study.{what}.{name} must be a list of values, not an empty one: got {str(values)[:60]}")


def shipped_studies() -> dict[str, Path]:
    """The studies that come with the package, by name."""
    folder = Path(str(files("dit_in_dit.study") / "shipped"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_study_config(name: str, assignments: Iterable[str] = ()) -> StudyConfig:
    """Read a shipped study or a YAML file, and apply assignments such as `set.train.batch_size=16`.

    Raises:
        UserError: there is no such study, or it is invalid.
    """
    path = shipped_studies().get(name, Path(name))
    if name not in shipped_studies() and path.suffix not in (".yaml", ".yml"):
        raise UserError(f"unknown study {name!r}{did_you_mean(name, shipped_studies())}, or give a .yaml file")
    values = read_yaml(path, "the study ")
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys such as 'base:' and 'arms:': got {truncate(values, 40)!r}")
    for assignment in assignments:
        _assign(values, *parse_assignment(assignment))
    return StudyConfig.from_dict(values)


def _assign(values: dict[str, Any], name: str, value: Any) -> None:
    """Set a key, or a key in a group (`group.key`). A budget has only one key, so the old budget is replaced."""
    group, _, rest = name.partition(".")
    if not rest:
        values[name] = value
    elif group == "budget":
        values[group] = {rest: value}
    elif group in ("set", "grid", "search"):
        before = values.get(group) or {}
        if not isinstance(before, dict):
            raise UserError(f"study.{group} is set to {truncate(before, 40)!r} and has a key below it: leave out one")
        values[group] = {**before, rest: value}
    else:
        raise UserError(f"unknown key 'study.{name}'{did_you_mean(f'study.{name}', StudyConfig.names())}")


@dataclass(frozen=True)
class Arm:
    """A config that is compared with another."""

    name: str
    changes: dict[str, Any]  # config keys of the arm, as the study gives them
    against: str  # the arm it is matched to and compared with; its own name for the control
    config: RunConfig  # the config that is trained, with seed 0
    matched: dict[str, tuple[Any, Any]]  # keys that matching changed, each with the value before and after
    cost: dict[str, float]  # `macs` (forward pass per image), `params`, and `time` if measured (seconds of a step)
    gap: dict[str, float]  # relative difference to `against` in each cost


@dataclass(frozen=True)
class Trial:
    """One training run of a study: an arm with a seed."""

    arm: str
    seed: int
    config: RunConfig

    @property
    def key(self) -> str:
        """The name of the trial and of its folder: lower-case letters, digits and dashes."""
        return f"{slug(self.arm)}-s{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A study that is ready to run. In a search, the control is the only arm."""

    name: str
    study: StudyConfig
    arms: tuple[Arm, ...]
    made: dict[str, Any]  # the device, versions and data digests that the plan was made with

    @property
    def control(self) -> Arm:
        """The arm that the others are compared with."""
        return next(arm for arm in self.arms if arm.against == arm.name)

    @property
    def trials(self) -> list[Trial]:
        """Every arm with every seed, seed by seed, so that a study that is stopped early has seeds with all arms."""
        return [Trial(a.name, seed, replace(a.config, seed=seed)) for seed in self.study.seeds for a in self.arms]

    def to_json(self) -> str:
        """The whole plan, for `from_json`."""
        return self._json(to_dict)

    @property
    def identity(self) -> str:
        """The study's name in a storage, the same in every version of the package that reads the plan."""
        return f"{self.name}-{hashlib.sha256(self._json(to_hash).encode()).hexdigest()[:12]}"

    def _json(self, plain: Callable[[Section], dict[str, Any]]) -> str:
        arms = [{**vars(arm), "config": plain(arm.config)} for arm in self.arms]
        whole = {"name": self.name, "study": plain(self.study), "arms": arms, "made": self.made}
        return json.dumps(whole, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote; UserError when the text is not a valid plan."""
        whole = parse_json(text, "this plan of a study", "begin the study in another --out")
        _require(has_form(whole, PLAN_FORM), "it lacks a part, or a part has the wrong type")
        arms = tuple(_arm_from_dict(arm) for arm in whole["arms"])
        names = {arm.name for arm in arms}
        known = len(names) == len(arms) and {arm.against for arm in arms} <= names
        _require(known, "two arms have one name, or an arm is compared with an unknown arm")
        plan = cls(whole["name"], StudyConfig.from_dict(whole["study"]), arms, whole["made"])
        _require(any(arm.against == arm.name for arm in arms), "it has no control")
        return plan


def read_plan(out: Path) -> Plan:
    """Read the plan in a study's folder.

    Raises:
        UserError: there is no plan, it is damaged, or it uses a class of a plug-in that is not loaded.
    """
    path = out / "plan.json"
    try:
        return Plan.from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{out} is not a study's folder: {error}") from None
    except UserError as error:
        manifests = (newest_manifest(run) for run in sorted(out.glob("runs/*")))
        if missing := next(filter(None, map(missing_plugins, manifests)), ""):
            raise UserError(f"{out} was made with a plug-in ({error}): pass {missing}") from None
        raise UserError(f"{path}: {error}") from None


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise UserError(f"this is no plan of a study: {problem}")


def _arm_from_dict(values: dict[str, Any]) -> Arm:
    name, pairs = truncate(values["name"], 40), values["matched"]
    paired = all(isinstance(pair, list) and len(pair) == 2 for pair in pairs.values())
    _require(paired, f"a matched key of {name!r} must hold two values")
    costs = [*values["cost"].values(), *values["gap"].values()]
    _require(has_form(costs, [NUMBER]), f"a cost of {name!r} is not a number")
    parts = {f.name: values[f.name] for f in fields(Arm)}
    matched = {key: tuple(pair) for key, pair in pairs.items()}
    return Arm(**{**parts, "config": RunConfig.from_dict(values["config"]), "matched": matched})


def slug(name: str) -> str:
    """A name, changed so that it can be part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "arm"
