"""Make a study's plan, write the plan into a folder, and check everything possible before the first trial."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dit_in_dit import __version__
from dit_in_dit.config.errors import UserError, did_you_mean, truncate
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import to_dict
from dit_in_dit.config.strict_json import json_difference
from dit_in_dit.curves.convergence import check_same_held_out
from dit_in_dit.data.sources import open_source
from dit_in_dit.diffusion.objective import EVALUATION_TIMES
from dit_in_dit.metrics import pixels
from dit_in_dit.metrics.feature_distances import DISTANCE_NAMES, ENOUGH
from dit_in_dit.metrics.feature_networks import Network, open_network
from dit_in_dit.metrics.metric import plugin_metrics
from dit_in_dit.runs import atomic
from dit_in_dit.runtime.device import resolve_auto
from dit_in_dit.study.arms import match_arms
from dit_in_dit.study.plan import Plan, StudyConfig, read_plan


def plan_study(name: str, study: StudyConfig, device: torch.device) -> Plan:
    """Match the arms, and check everything that can be checked before the first trial.

    Raises:
        UserError: the config or data is invalid, metric weights are missing, or an arm cannot be matched.
    """
    open_networks(study, device)
    arms = match_arms(study, device, study.threads)
    arms = tuple(replace(arm, config=resolve_auto(arm.config, device)) for arm in arms)  # equal on every worker
    if "held_out" in study.metrics:
        check_same_held_out({arm.name: arm.config for arm in arms})
    digests: dict[str, str] = {}
    for arm in arms:
        source = open_source(arm.config.data, arm.config.model)
        if arm.config.data.source not in digests:
            digests[arm.config.data.source] = source.digest
        if "held_out" in study.metrics and not source.held_out_size:
            raise UserError(f"study.metrics: held_out needs held-out images, {arm.config.data.source} has none")
        if study.metrics != ("held_out",) and arm.config.model.channels not in (1, 3):
            raise UserError("study.metrics: only held_out can be measured of latents")
        _check_primary(study, arm.config)
    made = {
        "id": uuid.uuid4().hex,  # distinguishes studies of the same plan in one storage
        "device": str(device) if device.type != "cuda" else torch.cuda.get_device_name(device),
        "versions": {"dit-in-dit": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "data": digests,  # of the images, by source
    }
    return Plan(name, study, arms, made)


def check_data(plan: Plan) -> None:
    """Raise UserError if the images are not those of the plan, because trials would then use different images.

    Plans of earlier versions have no digests, so their images are not checked.
    """
    noted = plan.made.get("data")
    digests = dict(noted) if isinstance(noted, dict) else {}
    for config in (arm.config for arm in plan.arms):
        digest = digests.pop(config.data.source, None)
        if digest is not None and open_source(config.data, config.model).digest != digest:
            raise UserError(
                f"{truncate(config.data.source, 60)} is not what the study was planned on (names, labels or sizes of "
                "its images differ): put it back, or begin the study in another --out"
            )


def _check_primary(study: StudyConfig, config: RunConfig) -> None:
    """Raise UserError if the primary metric will not be measured."""
    known = []
    if "held_out" in study.metrics and config.train.evaluate_every:
        known = [f"held_out.{t}.{kind}" for t in EVALUATION_TIMES for kind in ("whole", "high")]
    if "pixels" in study.metrics:
        shape = (4, *config.model.image_shape)
        images = np.random.default_rng(0).standard_normal(shape, np.float32)
        known += pixels.score(images[:2], images, (config.model.patch_size,))
    if set(study.metrics) - {"held_out"}:
        known += plugin_metrics()
    if study.primary in DISTANCE_NAMES.values() and study.samples < ENOUGH:
        raise UserError(f"study.primary={study.primary} needs study.samples={ENOUGH} at least: got {study.samples}")
    open_ended = {"inception", "dinov2"} & set(study.metrics)  # their names hold the number of images
    if study.primary not in known and not (open_ended and not study.primary.startswith("held_out")):
        raise UserError(f"study.primary: {study.primary!r} is not measured{did_you_mean(study.primary, known)}")


def open_networks(study: StudyConfig, device: torch.device) -> tuple[Network, ...]:
    """The feature networks of the study's metrics; UserError if the weights of a network are missing."""
    weights = {"inception": study.weights, "dinov2": study.dinov2}
    wanted = [name for name in weights if name in study.metrics]
    return tuple(open_network(name, Path(weights[name]) if weights[name] else None, device) for name in wanted)


def open_plan(out: Path, make: Callable[[], Plan], study: StudyConfig | None = None) -> Plan:
    """The plan in `out`. If there is none, exactly one process writes the plan that `make` returns.

    Args:
        study: the study that the plan must belong to; None: any study.

    Raises:
        UserError: `out` holds another study.
    """
    path = out / "plan.json"
    if not path.exists():
        atomic.write_atomic(path, make().to_json() + "\n", once=True)  # another process may be first
    plan = read_plan(out)
    if study is not None and (field := json_difference(to_dict(plan.study), to_dict(study))):
        raise UserError(f"{out} holds another study, {field[:90]}; choose another --out")
    return plan
