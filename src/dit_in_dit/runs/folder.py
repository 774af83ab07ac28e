"""The folder of a run: create it, lock it, read its config.

    config.yaml            the complete config of the run
    history.json           config keys that changed when the run was resumed, and the step; absent if none changed
    log.jsonl              a line for each step and held-out evaluation; the config decides every line
    timing.jsonl           seconds, images per second, memory, MFU
    checkpoints/0001200/   state.safetensors, ema.safetensors, manifest.json
    samples/0001200.png
    lock                   names the process that trains the run

No file that is loaded can run code: YAML (safe), JSON and safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dit_in_dit.config import plugins
from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.files import config_hash, from_file, to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.strict_json import has_form, read_json
from dit_in_dit.runs import atomic, integrity, lock
from dit_in_dit.runs.retention import checkpoint_folders, clear_unfinished

HISTORY = "history.json"  # {"changes": [{"step": 6, "keys": {KEY: [BEFORE, AFTER]}, "from": HASH, "to": HASH}]}


def create_run(run: Path, config: RunConfig) -> None:
    """Create the run's folder with its config; UserError when it holds a run already or cannot be written."""
    if (run / "config.yaml").exists():
        raise UserError(f"{run} already holds a run: continue it with --resume, or choose another folder")
    try:
        run.mkdir(parents=True, exist_ok=True)
        atomic.write_atomic(run / "config.yaml", to_yaml(config, meanings=True))
        integrity.sync(run)
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror or error}") from None


def change_run(run: Path, stored: RunConfig, config: RunConfig, keys: Mapping[str, Any], step: int) -> None:
    """Replace the run's config at a step, and record the changed keys, each with the values before and after."""
    change = {"step": step, "keys": keys, "from": config_hash(stored), "to": config_hash(config)}
    history = {"changes": [*read_history(run, stored), change]}
    try:
        atomic.write_atomic(run / HISTORY, json.dumps(history, indent=1) + "\n")  # a process may be killed after this
        atomic.write_atomic(run / "config.yaml", to_yaml(config, meanings=True))
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror or error}") from None


def read_history(run: Path, config: RunConfig) -> list[dict[str, Any]]:
    """The changes that led to the run's config, in order. UserError if the file is damaged."""
    path, wanted = run / HISTORY, config_hash(config)
    changes = read_json(path).get("changes") if path.exists() else []
    if not has_form(changes, [{"step": int, "keys": dict, "from": str, "to": str}]):
        raise UserError(f"{path} is not the history of a run: put it back as it was")
    history: list[dict[str, Any]] = []
    for change in reversed(changes or ()):
        if change["to"] == wanted:
            history.insert(0, change)
            wanted = change["from"]
    return history


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
            raise UserError(f"{run} was made with a plug-in: pass {missing} ({truncate(error)})") from None
        raise


def newest_manifest(run: Path) -> dict[str, Any]:
    """The manifest of the newest checkpoint with a manifest; empty without any manifest."""
    for folder in checkpoint_folders(run):
        with suppress(integrity.DamagedError):
            return integrity.read_manifest(folder)
    return {}
