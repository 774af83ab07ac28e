"""Config keys that may change when a run is resumed, such as train.steps: a finished run can be trained longer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import changed_keys
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runs.folder import change_run
from dit_in_dit.training.optimizer import learning_rate

# No weight depends on these keys, except on train.steps by a cosine schedule.
CHANGEABLE = (
    *("train.steps", "train.checkpoint_every", "train.keep_every", "train.sample_every", "train.evaluate_every"),
    *("train.recompute", "train.shard", "train.timeout", "train.skip_most", "train.on_divergence", "train.save"),
    *("train.ema_snapshot_every", "data.workers", "sample."),
)


def check_changes(run: Path, stored: RunConfig, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The keys that a resume changes, with both values; UserError if one is not CHANGEABLE."""
    auto = stored.train.compile == "auto"  # edited by hand: a run stores what auto became
    changes = {name: pair for name, pair in changed_keys(stored, config).items() if name != "train.compile" or not auto}
    if name := next((name for name in changes if not name.startswith(CHANGEABLE)), None):
        before, now = changes[name]
        raise UserError(
            f"{run} was started with another config: {name} is {before}, not {now}; resume without this change, "
            f"or begin another run from its weights with --init {run}"
        )
    return changes


def record_changes(
    run: Path, stored: RunConfig, config: RunConfig, changes: Mapping[str, Any], step: int, logged: int
) -> str:
    """Write the changed config and its history; returns a line about the changes. UserError if train.steps is below
    the last logged step, or the disk refuses the files."""
    last = config.train.steps
    if last < max(step, logged):
        raise UserError(f"train.steps must be at least {max(step, logged)}, which {run} has reached: got {last}")
    change_run(run, stored, config, changes, step)
    line = f"from step {step}: " + ", ".join(f"{name} {a} -> {b}" for name, (a, b) in changes.items())
    before, same = (learning_rate(each.train, max(step - 1, 0)) for each in (stored, config))
    if "train.steps" not in changes or not step or before == same:  # equal rates: at all earlier steps too
        return f"{line}, as if asked for at first"
    now, how = learning_rate(config.train, step), config.train.schedule
    return (
        f"{line}, not as if asked for at first: the learning rate, {before:.3g} before, is now {now:.3g}, "
        f"as on the {how} schedule of {last} steps"
    )
