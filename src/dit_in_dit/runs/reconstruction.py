"""Reconstruction of an average of any relative length after training, from snapshots of two or more tracked lengths
(Karras et al. 2024, section 3.2)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dit_in_dit.config.averages import LENGTH
from dit_in_dit.config.errors import UserError
from dit_in_dit.runs.averages import (
    AVERAGE_PREFIX,
    FILE,
    FOLDER,
    average_weights,
    kept_averages,
    reconstructed_folder,
    write_averages,
)
from dit_in_dit.runs.checkpoint import Checkpoint, check_config
from dit_in_dit.runs.integrity import DamagedError, DamagedWarning, verify
from dit_in_dit.runs.power_function import fit_profile, length_exponent
from dit_in_dit.runs.tensors import LazyTensors

Stored = tuple[int, str, Mapping[str, Tensor]]  # step, name of the average, tensors of that step's averages


@dataclass(frozen=True)
class Reconstruction:
    """An average that was reconstructed at the step of the newest checkpoint."""

    name: str
    folder: Path
    step: int
    averages: int  # number of stored averages that were summed
    error: float  # of its weights over the steps, relative: the root of the squared difference to the wanted ones


def reconstruct(run: Path, length: float) -> Reconstruction:
    """Write the average of a relative length into the run, at the step of its newest checkpoint. Sums are in float64.

    Raises:
        UserError: the run tracks no lengths, has this average already as a tracked one, or cannot be written.
    """
    saved, name = Checkpoint.open(run), f"{LENGTH}{length}"
    state = saved.state()
    kept = [each for each in kept_averages(state) if each.startswith(LENGTH)]
    if not kept:
        raise UserError(f"{run} keeps no averages to reconstruct from: train with train.ema_lengths=[0.05,0.1]")
    if name in kept:
        raise UserError(f"{run} has tracked the average of length {length}: choose it with --ema {name}")
    stored = [*_snapshots(saved), *((saved.step, each, state) for each in kept)]
    profiles = [(float(step), length_exponent(float(each.removeprefix(LENGTH)))) for step, each, _ in stored]
    weights, error = fit_profile(profiles, (float(saved.step), length_exponent(length)))
    average = average_weights(state, kept[0], saved.config.train)  # the tensors that are no parameters stay
    for part in average:
        if f"{AVERAGE_PREFIX}{kept[0]}/{part}" in state:
            total = torch.zeros_like(average[part], dtype=torch.float64)
            for weight, (_, each, tensors) in zip(weights.tolist(), stored, strict=True):
                total += weight * tensors[f"{AVERAGE_PREFIX}{each}/{part}"].double()
            average[part] = total.to(average[part].dtype)
    folder = reconstructed_folder(state, name)
    try:
        write_averages(folder, saved.manifest, average)
    except OSError as refused:
        raise UserError(f"cannot write {folder}: {refused.strerror or refused}") from None
    return Reconstruction(name, folder, saved.step, len(stored), error)


def _snapshots(saved: Checkpoint) -> list[Stored]:
    """The run's snapshots before the checkpoint's step. Warns (DamagedWarning) of each that is damaged."""
    stored: list[Stored] = []
    for folder in sorted((saved.folder.parents[1] / FOLDER).glob("*")):
        if folder.name.isdecimal() and int(folder.name) < saved.step:
            try:
                check_config(saved.config, folder, manifest := verify(folder))
            except DamagedError as error:
                warnings.warn(f"left out: {error}", DamagedWarning, stacklevel=3)
                continue
            tensors = LazyTensors(folder / FILE)
            stored += [(manifest["step"], name, tensors) for name in kept_averages(tensors)]
    return stored
