"""The folder of a run: create it, lock it, read its config.

    config.yaml            the complete config of the run
    log.jsonl              a line for each step and held-out evaluation; the config decides every line
    timing.jsonl           seconds and images per second
    checkpoints/0001200/   state.safetensors, ema.safetensors, manifest.json
    samples/0001200.png
    lock                   names the process that trains the run

No file that is loaded can run code: YAML (safe), JSON and safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dit_in_dit.config import plugins
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import from_file, to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runs import atomic, integrity, lock
from dit_in_dit.runs.retention import checkpoint_folders, clear_unfinished


def create_run(run: Path, config: RunConfig) -> None:
    """Create the run's folder with its config; UserError when it holds a run already or cannot be written."""
    if (run / "config.yaml").exists():
        raise UserError(f"{run} already holds a run: continue it with --resume, or choose another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
        atomic.write_atomic(run / "config.yaml", to_yaml(config, meanings=True))
        integrity.sync(run)
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror or error}") from None


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Keep other processes, and other callers in this process, from training the run.

    Raises:
        BusyError: another process trains the run; the message names the process and its machine.
    """
    with lock.lock_file(run / "lock", f"{run} is being trained"):
        clear_unfinished(run)
        yield


def read_config(run: Path) -> RunConfig:
    """The run's config; UserError when there is no run at the path."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"no run at {run}: it has no config.yaml")
    try:
        return from_file(path)
    except UserError as error:
        if missing := plugins.missing_plugins(newest_manifest(run)):
            raise UserError(f"{run} was made with a plug-in: pass {missing} ({error})") from None
        raise


def newest_manifest(run: Path) -> dict[str, Any]:
    """The manifest of the newest checkpoint with a manifest; empty without any manifest."""
    for folder in checkpoint_folders(run):
        with suppress(integrity.DamagedError):
            return integrity.read_manifest(folder)
    return {}
