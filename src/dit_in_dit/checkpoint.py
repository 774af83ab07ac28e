"""A run is a folder; this reads and writes it.

    config.yaml            everything the run is
    log.jsonl              one line per step and per held-out evaluation, a function of the config
    timing.jsonl           what the clock said
    checkpoints/0001200/   state.safetensors, ema.safetensors, manifest.json
    samples/0001200.png
    lock                   who trains it, while somebody does

Nothing that is loaded can run code: YAML (safe), JSON and safetensors.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_in_dit.config import RunConfig, UserError, config_hash, from_yaml, to_yaml
from dit_in_dit.model.nested import NestedDiT

KEEP = 2  # newest checkpoints that stay


def create(run: Path, config: RunConfig) -> None:
    """Make the run's folder with its config; UserError when a run is there already or it cannot be written."""
    if (run / "config.yaml").exists():
        raise UserError(f"{run} already holds a run: continue it with --resume, or choose another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
        _write(run / "config.yaml", to_yaml(config, meanings=True).encode())
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror or error}") from None


class BusyError(UserError):
    """Another process trains the run."""


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Keep other processes from training the run. The lock dies with its process, and no child inherits it.

    Raises:
        BusyError: another process has it; named with its machine.
    """
    with (run / "lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise BusyError(
                f"{run} is being trained by {file.read().strip() or 'another process'}: wait, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def read_config(run: Path) -> RunConfig:
    """The run's config; UserError when there is no run."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"no run at {run}: it has no config.yaml")
    try:
        return from_yaml(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _write(path: Path, content: bytes) -> None:
    """Write beside, sync, rename: the file is whole or absent."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(
    run: Path,
    config: RunConfig,
    step: int,
    state: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    classes: tuple[str, ...],
) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `KEEP`.

    Written beside, synced, hashed into the manifest, then renamed: a checkpoint folder is complete or
    not there.
    """
    target = run / "checkpoints" / f"{step:07d}"
    beside = target.with_name(target.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for name, tensors in (("state.safetensors", state), ("ema.safetensors", ema)):
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, beside / name)
        _sync(beside / name)
    manifest = {
        "step": step,
        "config": config_hash(config),
        "classes": classes,
        "versions": {name: version(name) for name in ("dit-in-dit", "torch", "numpy", "safetensors")},
        "sha256": {path.name: _sha256(path) for path in sorted(beside.iterdir())},
    }
    _write(beside / "manifest.json", json.dumps(manifest, indent=1).encode())
    _sync(beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    _sync(target.parent)
    for old in _folders(run)[KEEP:]:
        shutil.rmtree(old)
    return target


def _folders(run: Path) -> list[Path]:
    """Checkpoint folders, newest step first."""
    found = [path for path in (run / "checkpoints").glob("*") if path.name.isascii() and path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def has_any(run: Path) -> bool:
    """Whether the run has written a checkpoint, good or not."""
    return bool(_folders(run))


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest, after every file's hash was found right; UserError names what is wrong."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
        int(manifest["step"]), str(manifest["config"]), list(manifest["classes"])  # all are there
        for name, expected in manifest["sha256"].items():
            if _sha256(checkpoint / name) != expected:
                raise UserError(f"{checkpoint / name} is damaged: its SHA-256 is not the manifest's")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"checkpoint {checkpoint} is incomplete: {error}") from None
    return manifest


def newest(run: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that verifies, and its manifest; UserError when there is none."""
    problem = f"{run} has no checkpoint yet: train it first"
    for folder in _folders(run):
        try:
            return folder, verify(folder)
        except UserError as error:
            problem = str(error)
    raise UserError(problem)


def load_state(checkpoint: Path, file: str = "state.safetensors") -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint."""
    try:
        return load_file(checkpoint / file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {checkpoint / file}: {error}") from None


def load_model(run: Path, device: torch.device, *, ema: bool = True) -> tuple[NestedDiT, RunConfig, dict[str, Any]]:
    """The run's model from its newest good checkpoint (averaged weights unless `ema` is false), its config
    and the checkpoint's manifest."""
    config = read_config(run)
    folder, manifest = newest(run)
    model = NestedDiT(config.model)
    if ema:
        weights = load_state(folder, "ema.safetensors")
    else:
        weights = {k.removeprefix("model."): v for k, v in load_state(folder).items() if k.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"{folder} does not fit {run / 'config.yaml'}: the model was changed since") from None
    return model.to(device).eval(), config, manifest
