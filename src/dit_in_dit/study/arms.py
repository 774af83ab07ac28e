"""The arms of a study: which there are, and how each becomes a config of wanted cost within the budget.

Named arms, the combinations of a grid and the choices of a search are all made by `matched` and `budgeted`.
"""

from __future__ import annotations

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
from dit_in_dit.inspection import cost
from dit_in_dit.study.match import COST_NAMES, COUNTS, SECONDS_EACH, NoTwin, Twin, match, quick_times
from dit_in_dit.study.plan import Arm, StudyConfig, slug

AGAINST = "against"  # key of an arm that names the arm it is matched to and compared with
MOST_ARMS = 1000


# --------------------------------------------------------------------------------------------- names


def candidates(study: StudyConfig) -> dict[str, tuple[dict[str, Any], str]]:
    """Config keys of every arm by name, and the arm that it is compared with; not matched yet."""
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
    found = {}
    for name, changes in named.items():
        against = control if name == control else changes.get(AGAINST, control)
        if against not in named:
            raise UserError(f"study.arms.{name}: no arm {str(against)!r}{did_you_mean(str(against), named)}")
        found[name] = {k: v for k, v in changes.items() if k != AGAINST}, against
    slugs: dict[str, str] = {}
    for name in found:
        if (other := slugs.setdefault(slug(name), name)) != name:
            raise UserError(f"arms {other!r} and {name!r} have one folder, {slug(name)}: name them apart")
    return found


def _combinations(grid: Mapping[str, list[Any]]) -> Iterable[tuple[str, dict[str, Any]]]:
    count = 1
    for values in grid.values():
        count *= len(values)
    if count > MOST_ARMS:
        raise UserError(f"study.grid has {count} combinations, more than {MOST_ARMS}: make it a search")
    for chosen in product(*grid.values()):
        changes = dict(zip(grid, chosen, strict=True))
        yield describe(changes), changes


def describe(changes: Mapping[str, Any]) -> str:
    """Changes as a name: each value with the end of its key, the whole key where ends are the same."""
    ends = [name.rpartition(".")[2] for name in changes]
    return ", ".join(
        f"{name if ends.count(e) > 1 else e}={changes[name]}" for name, e in zip(changes, ends, strict=True)
    )


def _in_order(found: Mapping[str, tuple[dict[str, Any], str]]) -> list[str]:
    """Arms by name, each after the one that it is compared with; those compared with themselves first."""
    order: list[str] = []
    while len(order) < len(found):
        ready = [n for n, (_, against) in found.items() if n not in order and (against == n or against in order)]
        if not ready:
            left = ", ".join(name for name in found if name not in order)
            raise UserError(f"study.arms: {left} are compared in a circle: one must be against a control")
        order += ready
    return order


# ------------------------------------------------------------------------------------------- configs


def configure(study: StudyConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The study's base with its own keys and an arm's, neither matched nor budgeted."""
    named = study.base.endswith((".yaml", ".yml"))
    base = from_file(Path(study.base), "study.base") if named else presets.get(study.base)
    return replace_keys(base, {**study.set, **changes})


def matched(
    study: StudyConfig,
    changes: Mapping[str, Any],
    like: RunConfig | None,
    device: torch.device,
    threads: int | None = None,
) -> tuple[RunConfig, Twin | None]:
    """The config of an arm with as much of what the study matches as `like`; the twin, where it was matched.

    Keys that the study or the arm names are not changed.

    Args:
        like: None: the arm is a control.

    Raises:
        NoTwin: there is none within the tolerance.
    """
    config = configure(study, changes)
    if like is None or study.match == "none":
        return config, None
    fixed = {*study.set, *changes}
    twin = match(config, like, study.match, tolerance=study.tolerance, fixed=fixed, device=device, threads=threads)
    return replace(config, model=twin.model), twin


def budgeted(
    study: StudyConfig, config: RunConfig, changes: Mapping[str, Any], step_seconds: float | None = None
) -> RunConfig:
    """The config of an arm with the steps that the study's budget gives it.

    What the study and the arm do not name follows the number of steps: ten held-out evaluations, eight checkpoints,
    no grids, and a warm-up of at most a tenth.

    Args:
        step_seconds: measured, for a budget of seconds.
    """
    train, named = config.train, {**study.set, **changes}
    for kind, amount in study.budget.items():
        per_step = {
            "steps": 1.0,
            "images": float(config.global_batch),
            "macs": float(cost.training_macs(config.model)["total"] * config.global_batch),
            "seconds": step_seconds or 1.0,
        }[kind]
        train = replace(train, steps=max(1, round(amount / per_step)))
    every: dict[str, Any] = {
        "evaluate_every": max(1, train.steps // 10),
        "checkpoint_every": max(1, train.steps // 8),
        "sample_every": 0,
        "warmup": min(train.warmup, train.steps // 10),
    }
    return replace(config, train=replace(train, **{k: v for k, v in every.items() if f"train.{k}" not in named}))


# --------------------------------------------------------------------------------------------- arms


def match_arms(study: StudyConfig, device: torch.device, threads: int | None = None) -> tuple[Arm, ...]:
    """The study's arms, each of the cost of the arm it is compared with, within its budget.

    Step times are measured where matching or the budget needs them, and where it takes seconds.

    Raises:
        UserError: an arm cannot be matched, or arms are compared with each other in a circle.
    """
    found = candidates(study)
    configs: dict[str, RunConfig] = {}
    twins: dict[str, Twin | None] = {}
    for name in _in_order(found):
        changes, against = found[name]
        try:
            configs[name], twins[name] = matched(study, changes, configs.get(against), device, threads)
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
    for name, (changes, against) in found.items():
        twin, costs = twins[name], counts[name]
        gap = {by: costs[by] / counts[against][by] - 1 for by in COUNTS}
        if times:
            twin_gap = twin.gap if twin else 0.0
            gap["time"] = twin_gap if study.match == "time" else times[name].over(times[against]) - 1
            costs = {**costs, "time": times[name].seconds}
        config = budgeted(study, configs[name], changes, costs.get("time"))
        arms.append(Arm(name, changes, against, config, twin.changed if twin else {}, costs, gap))
    return tuple(arms)


def _times(
    study: StudyConfig, configs: Mapping[str, RunConfig], device: torch.device, threads: int | None
) -> dict[str, Times]:
    """Step times of all arms in turns; none where nobody needs them and they take long."""
    if study.match == "time" or "seconds" in study.budget:
        return step_seconds(configs, device, threads=threads, seconds=SECONDS_EACH * len(configs))
    return quick_times(configs, device, threads)
