"""Trained models that ship with the package, by name: runs that hold the averaged weights alone, and are only read."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parents[1]
ROOM = "models"  # `models/NAME` is the model where a preset has the same name, in a checkout and installed
PLACES = (HERE / ROOM, HERE.parents[1] / ROOM)  # installed; in a checkout


def pretrained_models() -> dict[str, Path]:
    """The runs that ship with the package, by name."""
    found = (path.parent for place in PLACES for path in sorted(place.glob("*/config.yaml")))
    return {run.name: run for run in reversed(list(found))}


def find_run(text: str) -> Path:
    """A run's folder: the path as it is, or, where nothing lies there, the shipped run NAME or models/NAME."""
    path = Path(text)
    try:
        taken = path.exists()
    except (OSError, ValueError):  # too long for a name, or a NUL in it: whoever reads it says so
        return path
    return path if taken else pretrained_models().get(text.removeprefix(f"{ROOM}/"), path)


def results_folder(run: Path, kind: str) -> Path:
    """The folder for what a command writes about a run: KIND in the run, or KIND/NAME in the working folder for a
    shipped one."""
    shipping = run.resolve().parent in {place.resolve() for place in PLACES}
    return Path(kind, run.resolve().name) if shipping else run / kind
