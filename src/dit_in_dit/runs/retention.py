"""Checkpoint folders of a run: list all folders, and delete folders that are no longer needed.

A checkpoint's folder has its final name once it is complete, synced and read again. `0001200.part` is being written or
deleted. `0001200.old` is complete and about to be replaced by another checkpoint of its step.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dit_in_dit.runs.integrity import DamagedError, verify

COMPLETE = re.compile(r"[0-9]+(\.old)?")
LEFT = re.compile(r"\d{7,}\.part|\d+(\.old)?\.gone\.part")  # remains of a killed save
KEEP = 2  # number of newest verified checkpoints to keep


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.partition(".")[0])


def checkpoint_folders(run: Path) -> list[Path]:
    """Checkpoint folders, newest step first; a folder that is being replaced follows its replacement."""
    checkpoints = [path for path in (run / "checkpoints").glob("*") if COMPLETE.fullmatch(path.name)]
    return sorted(checkpoints, key=lambda path: (-step_of(path), path.suffix))


def _good(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None when it does not verify."""
    try:
        return verify(checkpoint)
    except DamagedError:
        return None


def move_aside(target: Path) -> None:
    """Move a checkpoint aside, so that another one of its step can replace it. A good checkpoint is renamed to `.old`,
    and `checkpoint_folders` still lists this folder.
    """
    aside = target.with_name(f"{target.name}.old")
    if _good(target):
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier save that was killed here
        target.rename(aside)
    elif target.exists():
        _drop(target)


def _drop(folder: Path) -> None:
    """Delete a checkpoint; a process killed meanwhile leaves no folder that looks like a checkpoint."""
    leaving = folder.with_name(f"{folder.name}.gone.part")
    folder.rename(leaving)
    shutil.rmtree(leaving)


def prune(run: Path, saved: Mapping[str, Any], keep_every: int) -> None:
    """Delete checkpoints. Three kinds stay: milestones, the newest `KEEP` checkpoints that verify, and the newest
    steady checkpoint, to which a run may roll back.

    A damaged checkpoint is not counted, and is deleted once it is older than the kept checkpoints.

    Args:
        saved: the manifest of the checkpoint that was just verified.
    """
    good: set[int] = set()
    steady = False
    for folder in checkpoint_folders(run):
        step = step_of(folder)
        milestone = step not in good and keep_every and step % keep_every == 0
        if step not in good and (len(good) < KEEP or not steady):
            manifest = saved if step == saved["step"] else _good(folder)
            if manifest is None:
                continue
            if len(good) < KEEP or manifest["steady"]:
                good.add(step)
                steady |= manifest["steady"]
                continue
        if not milestone:
            with suppress(OSError):  # try the others
                _drop(folder)


def clear_unfinished(run: Path) -> None:
    """Delete the remains of a killed save. Only the process that trains the run may call it."""
    for folder in (run / "checkpoints").glob("*.part"):
        if LEFT.fullmatch(folder.name):  # else it is a file of the user
            shutil.rmtree(folder, ignore_errors=True)
