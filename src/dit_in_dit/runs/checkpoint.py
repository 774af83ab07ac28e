"""Checkpoints of a run: saved so that a folder is whole or not there, and opened as the newest that verifies."""

from __future__ import annotations

import errno
import shutil
import warnings
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_in_dit import __version__
from dit_in_dit.config import plugins
from dit_in_dit.config.errors import PluginWarning, UserError
from dit_in_dit.config.files import HASH_VERSION, config_hash
from dit_in_dit.config.run import RunConfig
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import integrity
from dit_in_dit.runs.folder import noted_manifest, read_config
from dit_in_dit.runs.integrity import Damage, DamagedError, DamagedWarning, verify
from dit_in_dit.runs.retention import clear_unfinished, folders, make_way, prune
from dit_in_dit.runs.tensors import Stored, load_tensors, serialize

STATE, AVERAGED = "state.safetensors", "ema.safetensors"
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "mount it to be written",
    errno.EACCES: "make it writable",
}


class SaveError(UserError):
    """A checkpoint could not be written; those before it are as they were, and a later save may well succeed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified when it was opened. Its tensors are read when they are asked for.

    folder: `RUN/checkpoints/STEP`.
    config: the run's, with which it was written.
    manifest: step, class names, digest of the data, SHA-256 of the files.
    passed_over: what is wrong with newer checkpoints.
    """

    folder: Path
    config: RunConfig
    manifest: dict[str, Any]
    passed_over: tuple[Damage, ...]

    @classmethod
    def open(cls, run: Path) -> Checkpoint:
        """The run's newest good checkpoint; each damaged newer one is a DamagedWarning: a library prints nothing.

        Raises:
            UserError: there is none, or config.yaml has other values than when it was written.
        """
        found = newest(run)
        for damage in found.passed_over:
            warnings.warn(f"passed over: {damage}", DamagedWarning, stacklevel=2)
        return found

    @property
    def step(self) -> int:
        """Optimizer steps that the run had taken."""
        step: int = self.manifest["step"]
        return step

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return tuple(self.manifest["classes"])

    def sha256(self, *, averaged: bool = True) -> str:
        """SHA-256 of the file that holds the averaged, else the trained weights."""
        sha256: str = self.manifest["sha256"][AVERAGED if averaged else STATE]
        return sha256

    def state(self) -> Stored:
        """The file of the trained weights and the optimizer's state; empty in a run that was exported."""
        return Stored(self.folder / STATE)

    def averaged(self) -> Stored:
        """The file of the averaged weights."""
        return Stored(self.folder / AVERAGED)

    def trained(self) -> Stored:
        """The state that training goes on from; UserError where a run was exported with its averaged weights alone."""
        state = self.state()
        if not any(name.startswith("model.") for name in state):
            raise UserError(
                f"{self.folder} holds averaged weights alone: sample or evaluate them, or begin a new run with --init"
            )
        return state

    def weights(self, *, averaged: bool = True) -> dict[str, Tensor]:
        """The model's averaged, else trained weights by the model's names; UserError where there are none."""
        if averaged:
            return load_tensors(self.folder / AVERAGED)
        state = self.trained()  # the optimizer's moments, twice the weights, are not read
        return {name.removeprefix("model."): state[name] for name in state if name.startswith("model.")}

    def model(self, device: torch.device, *, averaged: bool = True) -> NestedDiT:
        """The model with these weights, in evaluation mode."""
        self.check_model()
        model = NestedDiT(self.config.model)
        try:
            model.load_state_dict(self.weights(averaged=averaged))
        except RuntimeError:
            raise self.misfit() from None
        return model.to(device).eval()

    def check_model(self) -> None:
        """UserError when the weights are those of a model that was given to train(): the config builds another."""
        if model := self.manifest.get("objects", {}).get("model"):
            raise UserError(
                f"{self.folder} holds weights of a model given to train(), {model}: load {AVERAGED} into it"
            )

    def misfit(self) -> UserError:
        """The error to raise where its tensors are not those of the config's model."""
        config = self.folder.parents[1] / "config.yaml"
        return UserError(f"{self.folder} does not fit {config}: the model was changed since")


# ------------------------------------------------------------------------------------------ writing


@cache
def _versions() -> dict[str, str]:
    # A source tree that is not installed has no metadata.
    return {"dit-in-dit": __version__, **{name: version(name) for name in ("torch", "numpy", "safetensors")}}


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
    """Write the checkpoint of `step`, then drop those that are neither milestones nor among the newest `KEEP`.

    One that is not steady was made because somebody stopped the run: no run that diverges goes back to it. `data` is
    the digest and the place of the images, as `data.run_data.record` gives them; `objects` the classes of a
    model or optimizer that was given to train().

    Written beside, files and folder synced, the manifest last, read again, and renamed: at every moment a checkpoint's
    folder is whole or not there, and there are `KEEP` good ones once there were. `state` and `ema` are all that changes
    in a run: the average has no counter of its own, it goes by the step.

    Raises:
        SaveError: the disk did not take it. No part of it is left, and older checkpoints are as they were.
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
            "versions": _versions(),
            **({"plugins": plugins.noted()} if plugins.noted() else {}),
            "bytes": {name: size for name, (size, _) in written.items()},
            "sha256": {name: sha256 for name, (_, sha256) in written.items()},
        }
        integrity.write_hashed(beside / "manifest.json", [integrity.seal(manifest)])
        integrity.sync(beside)
        verify(beside)
        make_way(target)
        beside.rename(target)
        integrity.sync(folder)
    except (OSError, DamagedError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        what = "it reads otherwise than it was written"
        remedy = "check the disk"
        if isinstance(error, OSError):
            what, remedy = error.strerror or str(error), REMEDIES.get(error.errno or 0, remedy)
        raise SaveError(f"cannot save {target}: {what}; older checkpoints are as they were: {remedy}") from error
    finally:
        for content in files.values():  # where the disk refused, other processes still wait to give their parts
            deque(content, maxlen=0)
    with suppress(OSError):  # what cannot be deleted is no reason to stop: the next save tries again
        prune(run, manifest, config.train.keep_every)
    return target


# ------------------------------------------------------------------------------------------ reading


def has_any(run: Path) -> bool:
    """Whether the run has written a checkpoint, good or not."""
    return bool(folders(run))


def newest(run: Path, *, steady: bool = False) -> Checkpoint:
    """The newest checkpoint that verifies (and is steady); it names the damaged ones that are newer.

    Whoever loads a run's weights asks here for them, so that they meet no other config than their own.

    Raises:
        UserError: there is none, or config.yaml has other values than when it was written.
    """
    config = read_config(run)
    passed_over: list[Damage] = []
    for folder in folders(run):
        try:
            manifest = verify(folder)
            if manifest["steady"] or not steady:
                _check_config(config, folder, manifest)
                for name in plugins.changed_sources(manifest):
                    warnings.warn(f"{name} is not as it was when {folder} was written", PluginWarning, stacklevel=2)
                return Checkpoint(folder, config, manifest, tuple(passed_over))
        except DamagedError as error:
            passed_over += error.damages
    if passed_over:
        raise UserError(
            f"no checkpoint of {run} is good: {passed_over[0]}; put a copy back, or remove "
            f"{run / 'checkpoints'} to begin again"
        )
    raise UserError(f"{run} has no checkpoint yet: train it first")


def noted_data(run: Path) -> dict[str, str] | None:
    """The digest and the place of the data that the run's newest checkpoint notes; None where none does."""
    noted: dict[str, str] | None = noted_manifest(run).get("data")
    return noted


def _check_config(config: RunConfig, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """UserError when a run's config is not the one that a checkpoint of it was written with."""
    if manifest["config"] == config_hash(config):
        return
    if manifest.get("hash_version", 1) > HASH_VERSION:
        raise UserError(f"{checkpoint} was written by a later version of dit-in-dit: use that version or a newer one")
    raise UserError(
        f"{checkpoint.parents[1] / 'config.yaml'} was changed since {checkpoint.name} was written: put it back, or "
        "begin a new run with --config"
    )
