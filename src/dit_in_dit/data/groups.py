"""Families of images and the held-out split; both depend only on names."""

from __future__ import annotations

import hashlib
import os
from pathlib import PurePosixPath

from dit_in_dit.config.errors import UserError


def is_held_out(family: str, share: float) -> bool:
    """Whether a family of images is held out. This depends only on the family's name and the share."""
    return family_number(family) < share * 2**64


def family_number(family: str) -> int:
    """A hash of the family's name, from 0 to `2^64 - 1`: families with the lowest numbers are held out."""
    name = os.fsencode(family)  # file names need not be Unicode
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big")


def family(name: str) -> str:
    """The family of a file: its name up to the first `~`."""
    return PurePosixPath(name).stem.split("~")[0]


def split_families(families: list[str], share: float, what: str) -> tuple[list[int], list[int]]:
    """Positions of the training and the held-out images; UserError when either list would be empty."""
    held = [i for i, family in enumerate(families) if is_held_out(family, share)]
    trained = sorted(set(range(len(families))) - set(held))
    check_split(len(trained), len(held), share, what)
    return trained, held


def check_split(trained: int, held: int, share: float, what: str) -> None:
    """UserError when a split leaves no training image, or no held-out image although `share` is above 0."""
    if not trained or (share and not held):
        raise UserError(
            f"data.held_out={share} leaves {trained} training and {held} held-out images of {what}: "
            "change it (0 holds none out)"
        )
