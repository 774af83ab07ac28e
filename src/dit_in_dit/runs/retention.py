"""Checkpoint folders of a run: which there are, which stay and which go.

A checkpoint's folder has its name once it is whole, on the disk, and read again. `0001200.part` is on its way in or
out; `0001200.old` is as good as any, about to be replaced by another of its step.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dit_in_dit.runs.integrity import DamagedError, verify

LEFT = re.compile(r"\d{7,}\.part|\d+(\.old)?\.gone\.part")  # what a killed save leaves
KEEP = 2  # newest checkpoints that stay, of those that verify


def _step(folder: Path) -> int:
    return int(folder.name.partition(".")[0])


def folders(run: Path) -> list[Path]:
    """Checkpoint folders, newest step first; one that is being replaced after its replacement."""
    found = []
    for path in (run / "checkpoints").glob("*"):
        name = path.name.removesuffix(".old")
        if name.isascii() and name.isdigit():
            found.append(path)
    return sorted(found, key=lambda path: (-_step(path), path.suffix))


def _good(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint that verifies."""
    try:
        return verify(checkpoint)
    except DamagedError:
        return None


def make_way(target: Path) -> None:
    """Take the checkpoint of the same step away, if there is one: a good one to a name by which it is still found."""
    aside = target.with_name(f"{target.name}.old")
    if _good(target):
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier save that was killed here
        target.rename(aside)
    elif target.exists():
        _drop(target)


def _drop(folder: Path) -> None:
    """Delete a checkpoint; killed on the way, it leaves no folder that looks like one."""
    leaving = folder.with_name(f"{folder.name}.gone.part")
    folder.rename(leaving)
    shutil.rmtree(leaving)


def prune(run: Path, saved: Mapping[str, Any], keep_every: int) -> None:
    """Drop what is older than the newest `KEEP` that verify, but milestones, and the newest steady one, to which a run
    may go back. `saved`, a manifest, was verified just now.

    A damaged one among these is not counted, and stays until it is older than they are.
    """
    good: set[int] = set()
    steady = False
    for folder in folders(run):
        step = _step(folder)
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
            with suppress(OSError):  # the others may well go
                _drop(folder)


def clear_unfinished(run: Path) -> None:
    """Delete what a killed save left. Only for who trains the run."""
    for folder in (run / "checkpoints").glob("*.part"):
        if LEFT.fullmatch(folder.name):  # else it is the user's
            shutil.rmtree(folder, ignore_errors=True)
