"""Study folders that tests write themselves, with known numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_in_dit.config.files import to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.inspection import cost
from dit_in_dit.study.arms import arm_changes, budgeted_config, configure
from dit_in_dit.study.plan import Arm, Plan, StudyConfig, Trial
from dit_in_dit.study.result import Result

Metrics = Callable[[str, int], dict[str, float]]
PROTOCOL = {"images": 64, "samples": {"sampler": "dpm++", "steps": 25}, "reference": {"data": "emoji", "images": 3000}}


def plan_of(study: StudyConfig, name: str = "planted", *, timed: bool = True) -> Plan:
    """The plan of a study without matching, with made-up step times."""
    counted: dict[str, tuple[RunConfig, dict[str, float]]] = {}
    found = arm_changes(study)
    for arm, (changes, _) in found.items():
        config = budgeted_config(study, configure(study, changes), changes)
        macs = cost.macs(config.model)["total"]
        parameters = {"macs": float(macs), "params": 1.5e6 + len(counted)}
        counted[arm] = config, {**parameters, "time": macs / 1e9} if timed else parameters
    arms = []
    for arm, (changes, against) in found.items():
        config, mine = counted[arm]
        gap = {kind: mine[kind] / counted[against][1][kind] - 1 for kind in mine}
        arms.append(Arm(arm, changes, against, config, {}, mine, gap))
    return Plan(name, study, tuple(arms), {"device": "a made-up one", "torch": "2.x"})


def write_plan(out: Path, plan: Plan) -> Path:
    """Write a study's folder that holds only the plan."""
    out.mkdir(parents=True)
    (out / "plan.json").write_text(plan.to_json())
    return out


def write_trial(
    out: Path,
    trial: Trial,
    metrics: Mapping[str, float] | None,
    *,
    floors: Mapping[str, float] | None = None,
    protocol: Mapping[str, Any] | None = None,
    state: str = "done",
    reason: str = "",
    level: float = 1.0,
    times: tuple[str, ...] = ("0.2",),
) -> Path:
    """Write a trial's folder: config, logs, samples, and a result unless `metrics` is None."""
    folder = out / "runs" / trial.key
    folder.mkdir(parents=True)
    steps = trial.config.train.steps
    noise = np.random.default_rng(trial.seed)
    lines = []
    for step in range(1, steps + 1):
        loss = level * (0.1 + 2 / (step + 3)) * noise.lognormal(0, 0.08)
        lines.append({"step": step, "loss": loss, "grad_norm": 0.6 * loss**0.5, "grad_norm.outer_blocks": 0.4 * loss})
        if step % max(1, steps // 10) == 0:
            error = level * (0.01 + 1 / (step + 9))
            errors = {t: {"whole": n * error, "high": n * error / 2} for n, t in enumerate(times, 1)}
            lines.append({"step": step, "held_out": errors})
    (folder / "config.yaml").write_text(to_yaml(trial.config))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = range(10, steps + 1, 10)
    clock = "".join(json.dumps({"step": s, "seconds": 0.05 * s * level}) + "\n" for s in read)
    (folder / "timing.jsonl").write_text(clock)
    if metrics is not None:
        used = PROTOCOL if protocol is None else protocol
        result = Result(trial.arm, trial.seed, state, steps, dict(metrics), dict(floors or {}), dict(used), reason)
        (folder / "result.json").write_text(result.to_json())
    height, width = trial.config.model.image_size
    draw = np.random.default_rng(3)
    real = draw.integers(0, 256, (6, height, width, 3), dtype=np.uint8)
    np.savez(folder / "drawn.npz", images=real // 2, real=real, labels=np.arange(6))
    return folder


def write_study(out: Path, plan: Plan, metrics: Metrics, **parts: Any) -> Path:
    """Write the folder of a finished study."""
    write_plan(out, plan)
    for trial in plan.trials:
        write_trial(out, trial, metrics(trial.arm, trial.seed), **parts)
    return out
