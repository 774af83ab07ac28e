"""Checkpoints of a run: a folder is complete or absent, and the newest folder that verifies is opened."""

from __future__ import annotations

import errno
import shutil
import warnings
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_in_dit import __version__
from dit_in_dit.config import plugins
from dit_in_dit.config.errors import PluginWarning, UserError, truncate
from dit_in_dit.config.files import HASH_VERSION, config_hash
from dit_in_dit.config.run import RunConfig
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import averages, integrity
from dit_in_dit.runs.folder import newest_manifest, read_config, read_history
from dit_in_dit.runs.integrity import Damage, DamagedError, DamagedWarning, verify
from dit_in_dit.runs.retention import checkpoint_folders, clear_unfinished, move_aside, prune, step_of
from dit_in_dit.runs.tensors import LazyTensors, load_tensors, serialize

LIBRARIES = ("torch", "numpy", "safetensors")  # their versions are in the manifest
STATE, AVERAGED = "state.safetensors", "ema.safetensors"
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "mount it writable",
    errno.EACCES: "make it writable",
}


class SaveError(UserError):
    """A checkpoint could not be written; older checkpoints are unchanged, and a later save may succeed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified when it was opened; its tensors are read on demand.

    folder: `RUN/checkpoints/STEP`.
    config: of the run; the manifest records its hash.
    manifest: step, class names, digest of the data, SHA-256 of the files.
    passed_over: the damages of newer checkpoints.
    """

    folder: Path
    config: RunConfig
    manifest: dict[str, Any]
    passed_over: tuple[Damage, ...]

    @classmethod
    def open(cls, run: Path) -> Checkpoint:
        """The run's newest good checkpoint; warns (DamagedWarning) of each newer checkpoint that is damaged.

        Raises:
            UserError: no checkpoint verifies, or config.yaml was edited after the checkpoint was written.
        """
        checkpoint = newest(run)
        for damage in checkpoint.passed_over:
            warnings.warn(f"passed over: {damage}", DamagedWarning, stacklevel=2)
        return checkpoint

    @property
    def step(self) -> int:
        """Optimizer steps that the run had taken."""
        return self.manifest["step"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return tuple(self.manifest["classes"])

    def sha256(self, *, averaged: bool | str = True) -> str:
        """SHA-256 of the file with the averaged or the trained weights; one of its own for a further average."""
        if isinstance(averaged, str):
            return averages.average_sha256(self.state(), averaged, self.config.train, self.manifest["sha256"][STATE])
        return self.manifest["sha256"][AVERAGED if averaged else STATE]

    def state(self) -> LazyTensors:
        """The file of the trained weights and the optimizer's state; empty in an exported run."""
        return LazyTensors(self.folder / STATE)

    def averaged(self) -> LazyTensors:
        """The file of the averaged weights."""
        return LazyTensors(self.folder / AVERAGED)

    def trained(self) -> LazyTensors:
        """The state from which training resumes; UserError if the run was exported with only its averaged weights."""
        state = self.state()
        if not any(name.startswith("model.") for name in state):
            raise UserError(
                f"{self.folder} holds only averaged weights: sample or evaluate them, or begin a new run with --init"
            )
        return state

    def weights(self, *, averaged: bool | str = True) -> dict[str, Tensor]:
        """The averaged or the trained weights by the model's names, or those of a further average, given by its name
        (config.averages); UserError when there are none."""
        if isinstance(averaged, str):
            return averages.average_weights(self.state(), averaged, self.config.train)
        if averaged:
            return load_tensors(self.folder / AVERAGED)
        state = self.trained()  # the optimizer's moments, twice the weights, are not read
        return {name.removeprefix("model."): state[name] for name in state if name.startswith("model.")}

    def model(self, device: torch.device, *, averaged: bool | str = True) -> NestedDiT:
        """The model with these weights, in evaluation mode."""
        self.check_model()
        model = NestedDiT(self.config.model)
        try:
            model.load_state_dict(self.weights(averaged=averaged))
        except RuntimeError:
            raise self.misfit() from None
        return model.to(device).eval()

    def check_model(self) -> None:
        """UserError when the weights belong to a model given to train(): the config builds another model."""
        if model := self.manifest.get("objects", {}).get("model"):
            raise UserError(
                f"{self.folder} holds weights of a model given to train(), {model}: load {AVERAGED} into that model"
            )

    def misfit(self) -> UserError:
        """The error to raise when the checkpoint's tensors do not fit the config's model."""
        config = self.folder.parents[1] / "config.yaml"
        return UserError(f"{self.folder} does not fit {config}: the model has changed since")


# ------------------------------------------------------------------------------------------ writing


def save(
    run: Path,
    config: RunConfig,
    step: int,
    state: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    classes: tuple[str, ...],
    *,
    steady: bool = True,
    data: Mapping[str, str] | None = None,
    objects: Mapping[str, str] | None = None,
) -> Path:
    """Write the checkpoint of `step`, then delete checkpoints except milestones and the newest `KEEP`.

    Files are written to a temporary folder and synced, the manifest last. The folder is synced, read again, and
    renamed. At every moment a checkpoint's folder is complete or absent, and once `KEEP` good checkpoints exist, there
    are never fewer.
    `state` and `ema` are everything that changes in a run: the decay of the average is computed from the step.

    Args:
        steady: false for a checkpoint of a stopped run: a run that diverges does not go back to it.
        data: digest and place of the images (data.run_data.data_record).
        objects: classes of a model or optimizer given to train().

    Raises:
        SaveError: the disk refused the checkpoint. No part of the checkpoint remains, and older checkpoints are
            unchanged.
    """
    folder = run / "checkpoints"
    target, beside = folder / f"{step:07d}", folder / f"{step:07d}.part"
    files = {name: serialize(tensors) for name, tensors in ((STATE, state), (AVERAGED, ema))}
    try:
        clear_unfinished(run)
        folder.mkdir(parents=True, exist_ok=True)
        integrity.sync(run)
        beside.mkdir()
        written = {name: integrity.write_hashed(beside / name, content) for name, content in files.items()}
        manifest = {
            "step": step,
            "config": config_hash(config),
            "hash_version": HASH_VERSION,
            "classes": list(classes),
            "steady": steady,
            **({"data": dict(data)} if data else {}),
            **({"objects": dict(objects)} if objects else {}),
            **({"changes": history} if (history := read_history(run, config)) else {}),
            "versions": {"dit-in-dit": __version__, **{name: version(name) for name in LIBRARIES}},
            **({"plugins": plugins.loaded_plugins()} if plugins.loaded_plugins() else {}),
            "bytes": {name: size for name, (size, _) in written.items()},
            "sha256": {name: sha256 for name, (_, sha256) in written.items()},
        }
        integrity.write_hashed(beside / "manifest.json", [integrity.seal(manifest)])
        integrity.sync(beside)
        verify(beside)
        averages.keep_snapshot(run, beside / STATE, manifest, config.train)
        move_aside(target)
        beside.rename(target)
        integrity.sync(folder)
    except (OSError, DamagedError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        what, remedy = "reading it again gives other bytes", "check the disk"
        if isinstance(error, OSError):
            what, remedy = error.strerror or str(error), REMEDIES.get(error.errno or 0, remedy)
        raise SaveError(f"cannot save {target}: {what}; older checkpoints are unchanged: {remedy}") from error
    finally:
        for content in files.values():  # after an error other processes still wait to send their parts
            deque(content, maxlen=0)
    with suppress(OSError):  # the next save tries again
        prune(run, manifest, config.train.keep_every)
    return target


# ------------------------------------------------------------------------------------------ reading


def has_any(run: Path) -> bool:
    """Whether the run has written a checkpoint, good or not."""
    return bool(checkpoint_folders(run))


def newest(run: Path, *, steady: bool = False, step: int | None = None) -> Checkpoint:
    """The newest checkpoint that verifies (and is steady, if `steady`; and has this `step`, if given), and what is
    damaged in newer ones.

    All loading of a run's weights goes through here, so that weights are never used with the config of another run.

    Raises:
        UserError: no checkpoint verifies, or config.yaml was edited after the checkpoint was written.
    """
    config = read_config(run)
    passed_over: list[Damage] = []
    for folder in checkpoint_folders(run):
        if step not in (None, step_of(folder)):
            continue
        try:
            manifest = verify(folder)
            if manifest["steady"] or not steady:
                check_config(config, folder, manifest)
                for name in plugins.changed_sources(manifest):
                    warnings.warn(f"{name} has changed since {folder} was written", PluginWarning, stacklevel=2)
                return Checkpoint(folder, config, manifest, tuple(passed_over))
        except DamagedError as error:
            passed_over += error.damages
    if passed_over:
        raise UserError(
            f"no checkpoint of {run} is good: {passed_over[0]}; put a copy back, or remove "
            f"{run / 'checkpoints'} to begin again"
        )
    if step is not None and (steps := sorted({step_of(folder) for folder in checkpoint_folders(run)})):
        raise UserError(f"{run} has no checkpoint of step {step}: there are {truncate(', '.join(map(str, steps)), 60)}")
    raise UserError(f"{run} has no checkpoint yet: train it first")


def recorded_data(run: Path) -> dict[str, str] | None:
    """Digest and place of the data in the run's newest manifest; None without a record."""
    return newest_manifest(run).get("data")


def check_config(config: RunConfig, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """UserError when a run's config has changed since a checkpoint of it was written."""
    if manifest["config"] == config_hash(config):
        return
    if manifest["config"] in {change["from"] for change in read_history(checkpoint.parents[1], config)}:
        return  # a resume changed the config
    if manifest.get("hash_version", 1) > HASH_VERSION:
        raise UserError(f"{checkpoint} was written by a later version of dit-in-dit: use that version or a newer one")
    if changed := plugins.changed_sources(manifest):
        raise UserError(
            f"{checkpoint.parents[1]} was made with other config keys of {changed[0]}, which has changed: give a key "
            "that came later `added=2` and its default, or take the plug-in as it was"
        )
    raise UserError(
        f"{checkpoint.parents[1] / 'config.yaml'} was changed since {checkpoint.name} was written: put it back, or "
        "begin a new run with --config"
    )
