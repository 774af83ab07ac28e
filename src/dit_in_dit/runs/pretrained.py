"""Trained models that ship with the package, by name: read-only runs that hold only averaged weights."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parents[1]
ROOM = "models"  # `models/NAME` names the model even if a preset has the name NAME
PLACES = (HERE / ROOM, HERE.parents[1] / ROOM)  # installed; in a checkout


def pretrained_models() -> dict[str, Path]:
    """The runs that ship with the package, by name."""
    runs = [path.parent for place in PLACES for path in sorted(place.glob("*/config.yaml"))]
    return {run.name: run for run in reversed(runs)}


def find_run(text: str) -> Path:
    """A run's folder: the path itself if it exists, else the pretrained run NAME or models/NAME."""
    path = Path(text)
    try:
        taken = path.exists()
    except (OSError, ValueError):  # a name too long or with a NUL: reading it raises the error
        return path
    return path if taken else pretrained_models().get(text.removeprefix(f"{ROOM}/"), path)


def ships(run: Path) -> bool:
    """Whether the run is one of those that ship with the package."""
    return run.resolve().parent in {place.resolve() for place in PLACES}


def shown_name(run: Path) -> str:
    """The run's name in results: the path as given; of a pretrained run models/NAME, wherever it is installed."""
    return f"{ROOM}/{run.resolve().name}" if ships(run) else str(run)


def results_folder(run: Path, kind: str) -> Path:
    """The folder for a command's results about a run: KIND in the run; for a pretrained run, KIND/NAME in the working
    folder."""
    return Path(kind, run.resolve().name) if ships(run) else run / kind
