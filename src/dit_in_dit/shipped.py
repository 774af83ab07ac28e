"""Trained models that come with the package, by name: runs that hold the averaged weights alone."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
PLACES = (HERE / "models", HERE.parents[1] / "models")  # installed; in a checkout


def shipped() -> dict[str, Path]:
    """The runs that come with the package, by name."""
    found = (path.parent for place in PLACES for path in sorted(place.glob("*/config.yaml")))
    return {run.name: run for run in reversed(list(found))}


def results_of(run: Path, room: str) -> Path:
    """Where the results about a run go by default: into its folder, or, of a shipped run, which is read-only, into
    ROOM/NAME of the working folder."""
    run = run.resolve()
    return Path(room, run.name) if run in {path.resolve() for path in shipped().values()} else run / room


def find_run(text: str) -> Path:
    """A run's folder: the path as it is, or, where nothing lies there, the shipped run of that name."""
    path = Path(text)
    return path if path.exists() else shipped().get(text, path)
