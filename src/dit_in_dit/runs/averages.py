"""Averages of a run beside its first: in its checkpoints, in snapshots past all pruning, and reconstructed ones.

    checkpoints/0001200/state.safetensors    beside the trained weights average/0.9996/WEIGHT, average/length=0.1/WEIGHT
    averages/0001200/                        snapshot of the averages of train.ema_lengths, a copy of these tensors
    averages/0001200-length=0.15/            an average of another length, reconstructed from snapshots

Each folder has a manifest with SHA-256, as a checkpoint has. `state` is a checkpoint's file state.safetensors.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_in_dit.config.averages import LENGTH
from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.runs import integrity
from dit_in_dit.runs.tensors import LazyTensors, load_tensors, serialize

AVERAGE_PREFIX = "average/"  # begins the names of the averages' tensors: average/NAME/WEIGHT
FOLDER, FILE = "averages", "averages.safetensors"


def write_averages(folder: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a folder of averages, complete or not at all, in place of an older one. Its manifest is that of a
    checkpoint with other files. Raises OSError or DamagedError."""
    beside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)  # of a killed process
    beside.mkdir(parents=True)
    size, sha256 = integrity.write_hashed(beside / FILE, serialize(tensors))
    own = {name: value for name, value in manifest.items() if name != "seal"}
    integrity.write_hashed(
        beside / "manifest.json", [integrity.seal({**own, "bytes": {FILE: size}, "sha256": {FILE: sha256}})]
    )
    integrity.sync(beside)
    integrity.verify(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    integrity.sync(folder.parent)


def keep_snapshot(run: Path, state: Path, manifest: Mapping[str, Any], train: TrainConfig) -> None:
    """Copy the averages of train.ema_lengths out of the state of a regular checkpoint, if a snapshot is due. Raises
    OSError or DamagedError."""
    step, every = manifest["step"], train.ema_snapshot_every
    if every and step % every == 0 and manifest["steady"]:
        lazy = LazyTensors(state)
        tensors = {name: lazy[name] for name in lazy if name.startswith(f"{AVERAGE_PREFIX}{LENGTH}")}
        if tensors:  # a release has none
            write_averages(run / FOLDER / f"{step:07d}", manifest, tensors)


def evaluation_folder(folder: Path, averaged: bool | str | None) -> Path:
    """The folder of an average's evaluation: inside `folder`, that of the run's first, whose scores stay the run's."""
    return folder / f"average-{averaged}" if isinstance(averaged, str) else folder


def reconstructed_folder(state: LazyTensors, average: str) -> Path:
    """The folder of an average reconstructed at a checkpoint's step."""
    checkpoint = state.path.parent
    return checkpoint.parents[1] / FOLDER / f"{checkpoint.name.partition('.')[0]}-{average}"


def kept_averages(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the averages whose tensors are among these."""
    return list(dict.fromkeys(name.split("/")[1] for name in state if name.startswith(AVERAGE_PREFIX)))


def average_names(state: LazyTensors) -> list[str]:
    """Names of a checkpoint's averages beside the first: kept ones, then ones reconstructed at its step."""
    place = reconstructed_folder(state, f"{LENGTH}*")
    made = [path.name.partition("-")[2] for path in sorted(place.parent.glob(place.name)) if path.suffix != ".part"]
    return list(dict.fromkeys([*kept_averages(state), *made]))


def average_sha256(state: LazyTensors, average: str, train: TrainConfig, sha256: str) -> str:
    """SHA-256 that identifies an average: of the reconstructed file, or of the state's SHA-256 and the name."""
    if average in kept_averages(state):
        return hashlib.sha256(f"{sha256} {average}".encode()).hexdigest()
    return str(_verify(state, average, train)["sha256"][FILE])


def average_weights(state: LazyTensors, average: str, train: TrainConfig) -> dict[str, Tensor]:
    """The weights of an average by the model's names. UserError without such an average, or if its file is damaged."""
    if average not in kept_averages(state):
        _verify(state, average, train)
        return load_tensors(reconstructed_folder(state, average) / FILE)
    names, prefix = (
        (name.removeprefix("model.") for name in state if name.startswith("model.")),
        f"{AVERAGE_PREFIX}{average}/",
    )
    return {name: state[stored if (stored := prefix + name) in state else f"model.{name}"] for name in names}


def _verify(state: LazyTensors, average: str, train: TrainConfig) -> dict[str, Any]:
    """The manifest of a reconstructed average. UserError if there is none, or it is damaged."""
    folder = reconstructed_folder(state, average)
    if average not in (names := average_names(state)):
        run, length = folder.parents[1], average.removeprefix(LENGTH)
        known = ", ".join([str(train.decays[0]), *names])
        way = (
            f"; make it: dit-in-dit average {run} --length {length}" if train.ema_lengths and length != average else ""
        )
        raise UserError(f"{state.path.parent} has no average {truncate(average, 40)!r}: it has {known}{way}")
    return integrity.verify(folder)
