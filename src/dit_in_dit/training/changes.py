"""Config keys that may change when a run is resumed, such as train.steps: a finished run can be trained longer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import changed_keys
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runs.folder import change_run
from dit_in_dit.training.trainer import learning_rate

# No weight depends on these keys, except on train.steps by a cosine schedule.
CHANGEABLE = (
    *("train.steps", "train.checkpoint_every", "train.keep_every", "train.sample_every", "train.evaluate_every"),
    *("train.recompute", "train.timeout", "train.skip_most", "train.on_divergence", "data.workers", "sample."),
)


def check_changes(run: Path, stored: RunConfig, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The keys in which a resumed run's config differs from the stored one, with both values.

    Raises:
        UserError: a key is not CHANGEABLE.
    """
    changes = changed_keys(stored, config)
    for name, (before, now) in changes.items():
        if not name.startswith(CHANGEABLE):
            raise UserError(
                f"{run} was started with another config: {name} is {before}, not {now}; resume without this change, "
                f"or begin another run from its weights with --init {run}"
            )
    return changes


def record_changes(
    run: Path,
    stored: RunConfig,
    config: RunConfig,
    changes: Mapping[str, tuple[Any, Any]],
    step: int,
    log: Sequence[Mapping[str, Any]],
) -> str:
    """Write the changed config and its history; returns a line about the changes.

    Args:
        step: of the restored checkpoint.
        log: the run's log, which may have later steps.

    Raises:
        UserError: train.steps is below the step reached, or the disk refuses the files.
    """
    reached, last = max((line["step"] for line in log), default=step), config.train.steps
    if last < reached:
        raise UserError(f"train.steps must be at least the step that {run} has reached, {reached}: got {last}")
    change_run(run, stored, config, changes, step)
    words = (f"{name} is {now}, was {before}" for name, (before, now) in changes.items())
    line = f"from step {step}: {', '.join(words)}"
    rates = [learning_rate(each.train, max(step - 1, 0)) for each in (stored, config)]
    if "train.steps" not in changes or not step:
        return line
    if rates[0] == rates[1]:  # so were those of all steps before
        return f"{line}; as if the run had been started with {last} steps"
    following = learning_rate(config.train, step)
    return (
        f"{line}; not as if it had been started with {last} steps: the learning rate goes from {rates[0]:.3g} to "
        f"{following:.3g}, because the {config.train.schedule} schedule is now that of {last} steps"
    )
