"""Arms: groups of runs whose configs differ only in the seed. Arms are named by the keys in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.program import format_stages
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import Section, keys
from dit_in_dit.curves.logs import Curve, last_step, not_finite_steps
from dit_in_dit.runs.lock import is_locked

LONGEST_NAME = 48  # characters of an arm's name; longer names are replaced by the folders' names


@dataclass(frozen=True)
class RunGroup:
    """Runs whose configs differ only in the seed."""

    name: str
    differs: dict[str, Any]  # each key in which the arms differ, with this arm's value
    curves: tuple[Curve, ...]

    @property
    def config(self) -> RunConfig:
        """Config of the first seed."""
        return self.curves[0].config

    @cached_property
    def label(self) -> str:
        """The arm's name, its number of seeds, and the step of the slowest seed while it is trained."""
        slowest, seeds = min(self.curves, key=last_step), len(self.curves)
        step, steps = last_step(slowest), slowest.config.train.steps
        running = step < steps and is_locked(slowest.run / "lock")
        state = f"; running, step {step:.0f} of {steps}" if running else ""
        return f"{self.name} ({seeds} {'seed' if seeds == 1 else 'seeds'}{state})"


def arms(curves: Sequence[Curve]) -> list[RunGroup]:
    """Group runs into arms, in the order of their first runs; runs without a logged step are left out.

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
                raise UserError(f"{other.run} and {curve.run} have the same config and seed: leave one run out")
        group.append(curve)
    if not groups:
        raise UserError("no step is logged yet in " + ", ".join(str(curve.run) for curve in curves))
    settings = [dict(group) for group in groups]
    names = dict.fromkeys(name for known in settings for name in known)
    differing = [name for name in names if len({known[name] for known in settings if name in known}) > 1]
    grouped = list(groups.values())
    return [
        RunGroup(name, {key: known[key] for key in differing if key in known}, tuple(group))
        for name, known, group in zip(_names(settings, differing, grouped), settings, grouped, strict=True)
    ]


def _settings(config: RunConfig) -> dict[str, Any]:
    """Config keys that identify an arm, except the seed and keys that the model ignores; stages become a program."""
    settings = {name: value for name, _, value in keys(config) if not isinstance(value, Section)}
    settings["model.stages"] = format_stages(config.model.program)
    spelled = ("seed", "model.depth", "model.use_inner", "model.inner.depth_ratio")
    unread = () if config.model.blocks("inner") else tuple(name for name in settings if name.startswith("model.inner."))
    return {name.removeprefix("model."): settings[name] for name in settings if name not in spelled + unread}


def _names(settings: list[dict[str, Any]], differing: list[str], groups: list[list[Curve]]) -> list[str]:
    """A name for each arm: the fewest keys that distinguish the arms or, if these are too long, the folders."""

    def distinguished(by: Sequence[str]) -> int:
        return len({tuple(known.get(name) for name in by) for known in settings})

    chosen = [name for name in differing or ["stages"] if distinguished([name]) == len(settings)][:1]
    for name in differing:
        if distinguished([*chosen, name]) > distinguished(chosen):
            chosen.append(name)
    names = [", ".join(f"{name}={known[name]}" for name in chosen if name in known) for known in settings]
    folders = [group[0].run.resolve().name for group in groups]
    long = max(map(len, names)) > LONGEST_NAME
    return folders if long and len(set(folders)) == len(folders) else names


def notes(curves: Sequence[Curve]) -> list[str]:
    """Caveats: runs left out or unfinished, missing timing, and schedules or losses that are not comparable."""
    lines = []
    for curve in curves:
        done, wanted = last_step(curve), curve.config.train.steps
        if not done:
            lines.append(f"{curve.run}: no step logged yet, left out")
        elif done < wanted:
            lines.append(f"{curve.run}: {done:.0f} of {wanted} steps so far")
        if len(bad := not_finite_steps(curve)):
            lines.append(
                f"{curve.run}: the held-out error is not finite at {len(bad)} of {len(curve.evaluated)} evaluations, "
                f"first at step {bad[0]:.0f}; it is left out there"
            )
        if done and not len(curve.timed):
            lines.append(f"{curve.run}: no timing.jsonl, so no hours and no throughput")
    schedules = {(curve.config.train.schedule, curve.config.train.steps) for curve in curves}
    if len(schedules) > 1 and any(schedule == "cosine" for schedule, _ in schedules):
        unlike = "learning-rate schedules have other lengths (train.schedule, train.steps)"
        lines.append(f"{unlike}: speeds are not comparable")
    if unlike_losses(curves):
        lines.append("training losses are of different quantities (diffusion.weight, predict or time): not comparable")
    return lines


def unlike_losses(curves: Sequence[Curve]) -> bool:
    """Whether the runs' training losses have different targets, or different distributions of times."""
    measured = set()
    for diffusion in (curve.config.diffusion for curve in curves):
        of = diffusion.predict if diffusion.weight == "prediction" else diffusion.weight
        spread = (diffusion.time_mean, diffusion.time_std) if diffusion.time == "logit_normal" else ()
        measured.add((diffusion.path, of, diffusion.time, spread))
    return len(measured) > 1
