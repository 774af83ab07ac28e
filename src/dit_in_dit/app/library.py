"""Runs that the page offers, and their models, each loaded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock

from dit_in_dit.api.model import Model, load
from dit_in_dit.config.errors import UserError, did_you_mean, truncate
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.pretrained import pretrained_models
from dit_in_dit.runs.retention import checkpoint_folders

MOST_MODELS = 4  # in memory at once


class Library:
    """Runs by name: those given, the shipped ones, and the runs in a folder.

    Args:
        runs: folders of runs, first in the list.
        folder: its subfolders with a checkpoint are runs too. It may be missing, and may grow while the page is open.
            A run whose config cannot be read is left out: the screen Runs says why.
        device: of the loaded models, as for `load`.
    """

    def __init__(self, runs: Sequence[Path] = (), folder: Path = Path("runs"), device: str = "auto") -> None:
        self.folder, self.device = folder, device
        self._given = list(runs)
        self._models: OrderedDict[tuple[Path, str], Model] = OrderedDict()
        self._lock = Lock()

    def runs(self) -> dict[str, Path]:
        """Folders of the runs that have a checkpoint, by name; of the shipped ones, nested models first."""
        shipped = sorted(pretrained_models().values(), key=lambda run: not _config(run).model.blocks("inner"))
        below = sorted(path.parent for path in self.folder.glob("*/config.yaml"))
        runs: dict[str, Path] = {}
        for run in [*self._given, *shipped, *filter(_readable, below)]:
            if run.resolve() not in {known.resolve() for known in runs.values()} and checkpoint_folders(run):
                name = run.resolve().name
                runs[name if name not in runs else str(run)] = run
        return runs

    def model(self, name: str) -> Model:
        """The model of a run with its newest averaged weights. UserError if no run has the name."""
        runs = self.runs()
        if name not in runs:
            raise UserError(f"no run is named {truncate(name)}{did_you_mean(name, runs)}")
        key = runs[name].resolve(), checkpoint_folders(runs[name])[0].name
        with self._lock:
            if key not in self._models:
                self._models[key] = load(runs[name], self.device)
            self._models.move_to_end(key)
            while len(self._models) > MOST_MODELS:
                self._models.popitem(last=False)
            return self._models[key]

    def beside(self, name: str) -> list[str]:
        """Other runs that draw images of the same size for the same classes; plain models first."""
        runs = self.runs()
        if name not in runs:
            return []
        wanted = _config(runs[name])
        alike = []
        for other, folder in runs.items():
            config = _config(folder)
            same = config.model.image_shape == wanted.model.image_shape and config.data.source == wanted.data.source
            if other != name and same and config.model.num_classes == wanted.model.num_classes:
                alike.append((bool(config.model.blocks("inner")), other))
        return [other for _, other in sorted(alike, key=lambda each: each[0])]


def _config(run: Path) -> RunConfig:
    return _read(run, (run / "config.yaml").stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _read(run: Path, changed: int) -> RunConfig:
    """The config of a run, whose file changed at `changed`: every event asks for all of them."""
    return read_config(run)


def _readable(run: Path) -> bool:
    try:
        return bool(_config(run))
    except (UserError, OSError):
        return False
