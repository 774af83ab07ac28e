"""The arms of a study: their names, the keys they change, and their configs within the budget, matched in cost.

`matched_config` and `budgeted_config` make the configs of named arms, of a grid's combinations and of a search's
choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dit_in_dit.benchmark.timing import Times, step_seconds
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError, did_you_mean
from dit_in_dit.config.files import from_file, replace_keys
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.sources import count_auto_classes, open_source
from dit_in_dit.inspection import cost
from dit_in_dit.study.match import COST_NAMES, COUNTS, SECONDS_EACH, NoTwin, Twin, match, quick_times
from dit_in_dit.study.plan import Arm, StudyConfig, slug

AGAINST = "against"  # key of an arm: the arm it is matched to and compared with
MOST_ARMS = 1000


def arm_changes(study: StudyConfig) -> dict[str, tuple[dict[str, Any], str]]:
    """By arm name: the config keys that the arm changes, before matching, and the arm that it is compared with.

    Raises:
        UserError: an arm is not a group of keys, the arm to compare with does not exist, or two arms share a folder.
    """
    if study.grid:
        named = dict(_combinations(study.grid))
    else:
        named = {name: changes or {} for name, changes in study.arms.items()} or {"base": {}}
    for name, changes in named.items():
        if not isinstance(changes, Mapping):
            raise UserError(f"study.arms.{name} must be a group of config keys: got {str(changes)[:40]!r}")
    control = study.control or next(iter(named))
    if control not in named:
        raise UserError(f"study.control: no arm {control!r}{did_you_mean(control, named)}")
    arms = {}
    for name, changes in named.items():
        against = control if name == control else changes.get(AGAINST, control)
        if against not in named:
            raise UserError(f"study.arms.{name}: no arm {str(against)!r}{did_you_mean(str(against), named)}")
        arms[name] = {k: v for k, v in changes.items() if k != AGAINST}, against
    slugs: dict[str, str] = {}
    for name in arms:
        if (other := slugs.setdefault(slug(name), name)) != name:
            raise UserError(f"arms {other!r} and {name!r} share the folder name {slug(name)}: rename one of them")
    return arms


def _combinations(grid: Mapping[str, list[Any]]) -> Iterable[tuple[str, dict[str, Any]]]:
    if (count := math.prod(map(len, grid.values()))) > MOST_ARMS:
        raise UserError(f"study.grid has {count} combinations, more than {MOST_ARMS}: use study.search instead")
    for chosen in product(*grid.values()):
        changes = dict(zip(grid, chosen, strict=True))
        yield describe_changes(changes), changes


def describe_changes(changes: Mapping[str, Any]) -> str:
    """A name made from changes: each key is shortened to its last part, unless another key has the same last part."""
    ends = [name.rpartition(".")[2] for name in changes]
    return ", ".join(
        f"{name if ends.count(e) > 1 else e}={changes[name]}" for name, e in zip(changes, ends, strict=True)
    )


def _in_order(arms: Mapping[str, tuple[dict[str, Any], str]]) -> list[str]:
    """Arm names, sorted so that each arm follows the arm it is compared with; controls come first."""
    order: list[str] = []
    while len(order) < len(arms):
        ready = [n for n, (_, against) in arms.items() if n not in order and (against == n or against in order)]
        if not ready:
            left = ", ".join(name for name in arms if name not in order)
            raise UserError(f"study.arms: {left} are compared in a circle: compare one of them with a control")
        order += ready
    return order


def configure(study: StudyConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The study's base config with the study's keys and the arm's changes, before matching and budgeting."""
    is_file = study.base.endswith((".yaml", ".yml"))
    base = from_file(Path(study.base), "study.base") if is_file else presets.get(study.base)
    return count_auto_classes(replace_keys(base, {**study.set, **changes}))


def matched_config(
    study: StudyConfig,
    changes: Mapping[str, Any],
    like: RunConfig | None,
    device: torch.device,
    threads: int | None = None,
) -> tuple[RunConfig, Twin | None]:
    """An arm's config, changed so that its cost matches `like`; and the twin, or None if nothing was matched.

    Matching changes no key that the study or the arm sets.

    Args:
        like: config of the arm to compare with; None for a control.

    Raises:
        NoTwin: no model is within the study's tolerance.
    """
    config = configure(study, changes)
    if like is None or study.match == "none":
        return config, None
    fixed = {*study.set, *changes}
    twin = match(config, like, study.match, tolerance=study.tolerance, fixed=fixed, device=device, threads=threads)
    return replace(config, model=twin.model), twin


def budgeted_config(
    study: StudyConfig, config: RunConfig, changes: Mapping[str, Any], step_seconds: float | None = None
) -> RunConfig:
    """An arm's config with as many steps as the study's budget allows.

    Unless the study or the arm sets them, these keys are adapted to the number of steps: ten held-out evaluations,
    eight checkpoints, no sample grids, and a warm-up of at most a tenth of the steps.

    Args:
        step_seconds: measured seconds per step, needed for a budget in seconds.
    """
    train, named = config.train, {**study.set, **changes}
    budget = dict(study.budget)
    if epochs := budget.pop("epochs", None if budget else train.epochs):
        train = config.resolve_epochs(open_source(config.data, config.model).train_size, epochs).train
    for kind, amount in budget.items():
        if kind == "macs":
            train = replace(train, epochs=None, steps=max(1, round(cost.steps_within(config, amount))))
            continue
        per_step = {
            "steps": 1.0,
            "images": float(config.global_batch),
            "seconds": step_seconds or 1.0,
        }[kind]
        train = replace(train, epochs=None, steps=max(1, round(amount / per_step)))
    every: dict[str, Any] = {
        "evaluate_every": max(1, train.steps // 10),
        "checkpoint_every": max(1, train.steps // 8),
        "sample_every": 0,
        "warmup": min(train.warmup, train.steps // 10),
    }
    return replace(config, train=replace(train, **{k: v for k, v in every.items() if f"train.{k}" not in named}))


def match_arms(study: StudyConfig, device: torch.device, threads: int | None = None) -> tuple[Arm, ...]:
    """The study's arms: each arm matches the cost of the arm it is compared with, and stays within the budget.

    Step times are measured if matching or the budget needs them, or if measuring takes only seconds.

    Raises:
        UserError: an arm cannot be matched, or arms are compared with each other in a circle.
    """
    named = arm_changes(study)
    configs: dict[str, RunConfig] = {}
    twins: dict[str, Twin | None] = {}
    for name in _in_order(named):
        changes, against = named[name]
        try:
            configs[name], twins[name] = matched_config(study, changes, configs.get(against), device, threads)
        except NoTwin as error:
            ratio, what = 1 + error.nearest.gap, COST_NAMES[study.match]
            raise UserError(
                f"study: arm {name!r} costs {ratio:.3g}x {against!r} in {what}, more than "
                f"tolerance {study.tolerance:g} allows: raise study.tolerance, name fewer keys, or set match: none"
            ) from None
    times = _times(study, configs, device, threads)
    counts = {
        name: {by: float(count(config.model)) for by, count in COUNTS.items()} for name, config in configs.items()
    }
    arms = []
    for name, (changes, against) in named.items():
        twin, costs = twins[name], counts[name]
        gap = {by: costs[by] / counts[against][by] - 1 for by in COUNTS}
        if times:
            twin_gap = twin.gap if twin else 0.0
            gap["time"] = twin_gap if study.match == "time" else times[name].over(times[against]) - 1
            costs = {**costs, "time": times[name].seconds}
        config = budgeted_config(study, configs[name], changes, costs.get("time"))
        arms.append(Arm(name, changes, against, config, twin.changed if twin else {}, costs, gap))
    return tuple(arms)


def _times(
    study: StudyConfig, configs: Mapping[str, RunConfig], device: torch.device, threads: int | None
) -> dict[str, Times]:
    """Step times of all arms, measured alternately; empty if they are optional and measuring would take long."""
    if study.match == "time" or "seconds" in study.budget:
        return step_seconds(configs, device, threads=threads, seconds=SECONDS_EACH * len(configs))
    return quick_times(configs, device, threads)
