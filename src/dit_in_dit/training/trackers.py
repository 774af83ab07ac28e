"""Experiment trackers: scalars, sample grids and curves of a run, in addition to its JSON lines.

`--track` names trackers; the config does not, because trackers do not change the run. `trackers.json` in the run's
folder stores the run's identity at each tracker, so that a resumed run continues the same tracked run. Steps that a
killed process had logged but not saved are logged again, with the same values. A tracker that fails during training is
dropped with a warning, and the run continues.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from dit_in_dit.config.errors import UserError, did_you_mean
from dit_in_dit.config.files import to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import Section, keys, to_dict
from dit_in_dit.runs import atomic
from dit_in_dit.runs.folder import read_config

if TYPE_CHECKING:
    from dit_in_dit.training.event import Event

PROJECT = "dit-in-dit"
KEPT = "trackers.json"
NONE = "none"
SCALARS = {"step": "train", "held_out": "held_out"}  # kind of event: heading under which its numbers are logged


class Tracker(Protocol):
    """A tracker of one run. `TRACKERS` constructs it from the run's folder, its config, the stored identity ("" at the
    first start) and the step from which training continues."""

    identity: str  # stored, and passed again when the run is resumed

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step, by name."""

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """Log a picture of a step."""

    def flush(self) -> None:
        """Write buffered values. Called at every checkpoint, from which a killed run resumes."""

    def close(self) -> None:
        """Write buffered values and end."""


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, config: RunConfig, identity: str, step: int) -> None:
        writer: Any = import_module("torch.utils.tensorboard").SummaryWriter
        # Later steps are logged again: purge_step drops their old values.
        self.writer = writer(str(run / "tensorboard"), purge_step=step + 1 if identity else None)
        self.identity = "tensorboard"
        if not identity:
            self.writer.add_text("config", f"```yaml\n{to_yaml(config)}```", 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Logged(Tracker):
    """Weights & Biases, or trackio, which has the same interface."""

    def __init__(self, module: Any, identity: str, **options: Any) -> None:
        self.module, self.identity = module, identity
        self.module.init(project=os.environ.get("WANDB_PROJECT", PROJECT), resume="allow", **options)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self.module.log({name: self.module.Image(picture)}, step=step)

    def flush(self) -> None:
        """Do nothing: both libraries write within about a second."""

    def close(self) -> None:
        self.module.finish()


def _wandb(run: Path, config: RunConfig, identity: str, step: int) -> Tracker:
    """A wandb run, identified by its id; WANDB_MODE=offline writes it into RUN/wandb."""
    wandb, identity = import_module("wandb"), identity or uuid.uuid4().hex[:12]
    quiet = wandb.Settings(console="off")  # do not log the progress bar
    return _Logged(wandb, identity, id=identity, name=run.name, dir=str(run), config=to_dict(config), settings=quiet)


def _trackio(run: Path, config: RunConfig, identity: str, step: int) -> Tracker:
    """A trackio run, identified by its name, in trackio's folder (TRACKIO_DIR) or Space."""
    identity = identity or f"{run.name}-{uuid.uuid4().hex[:8]}"
    return _Logged(import_module("trackio"), identity, name=identity, config=to_dict(config), embed=False)


class MLflow(Tracker):
    """An MLflow run, identified by its id, at MLFLOW_TRACKING_URI."""

    MOST = 500  # numbers per request; a server accepts 1000

    def __init__(self, run: Path, config: RunConfig, identity: str, step: int) -> None:
        self.entities: Any = import_module("mlflow.entities")
        self.client = import_module("mlflow").MlflowClient()
        self.waiting: list[Any] = []
        if identity:
            self.identity = identity
            self.client.update_run(identity, status="RUNNING")
            return
        existing = self.client.get_experiment_by_name(PROJECT)
        experiment = existing.experiment_id if existing else self.client.create_experiment(PROJECT)
        self.identity = self.client.create_run(experiment, run_name=run.name).info.run_id
        flat = [(name, value) for name, _, value in keys(config) if not isinstance(value, Section)]
        parameters = [self.entities.Param(name, str(value)) for name, value in flat]
        for start in range(0, len(parameters), 100):  # a server accepts 100 per request
            self.client.log_batch(self.identity, params=parameters[start : start + 100])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self.waiting += [self.entities.Metric(name, value, now, step) for name, value in values.items()]
        if len(self.waiting) >= self.MOST:
            self.flush()

    def flush(self) -> None:
        while self.waiting:
            part, self.waiting = self.waiting[: self.MOST], self.waiting[self.MOST :]
            self.client.log_batch(self.identity, metrics=part)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self.flush()
        self.client.log_image(self.identity, picture, artifact_file=f"{name}/{step:07d}.png")

    def close(self) -> None:
        self.flush()
        self.client.set_terminated(self.identity)


TRACKERS: dict[str, Callable[[Path, RunConfig, str, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": MLflow,
}
PACKAGES = frozenset(TRACKERS)  # trackers that need the package of their name; registered ones need none


def log_to(events: Iterator[Event], names: Sequence[str], run: Path, warn: Callable[[str], None]) -> Iterator[Event]:
    """Pass on the events of a run and log them to trackers; `warn` gets a line for each tracker that fails.

    The consumer of a `samples` event writes the grid into the run's folder; then the grid is logged. Curves are logged
    at the end of the run. UserError at the first event if a tracker cannot be started.
    """
    first = next(events)
    config, identities = read_config(run), _identities(run)
    trackers = {name: _start(name, run, config, identities.get(name, ""), first.step) for name in names}
    identities |= {name: tracker.identity for name, tracker in trackers.items()}
    atomic.write_atomic(run / KEPT, json.dumps(identities))

    def call(method: str, *arguments: Any) -> None:
        for name, tracker in list(trackers.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # a network that is down, a full disk: no error of a tracker ends the run
                del trackers[name]
                warn(f"{name} failed and is dropped: {_line(error)}")

    try:
        yield first
        for event in events:
            if event.kind in SCALARS:
                call("scalars", event.step, dict(_flat(SCALARS[event.kind], event.values)))
            grid = run / "samples" / f"{event.step:07d}.png"
            logged = event.step <= first.step and grid.is_file()  # a resumed run may repeat the event of its step
            yield event
            if event.kind == "checkpoint":
                call("flush")
            if event.kind == "samples":
                pictures = [] if logged else [grid]
            else:
                pictures = _curves(run) if event.kind == "checkpoint" and event.step == config.train.steps else []
            for path in pictures:
                if path.is_file():
                    with Image.open(path) as picture:
                        name = "samples" if event.kind == "samples" else f"curves/{path.stem}"
                        call("image", event.step, name, picture.convert("RGB"))
    finally:
        call("close")


def _curves(run: Path) -> list[Path]:
    """Paths of pictures of the run's curves; empty without matplotlib, which is optional."""
    if find_spec("matplotlib") is None:
        return []
    from dit_in_dit.curves import arms, logs, plots

    out = run / "curves"
    out.mkdir(exist_ok=True)
    return plots.draw_curves(arms.arms([logs.read_run(run)]), out)


def chosen_trackers(option: str | None, run: Path) -> list[str]:
    """Names from `--track`, or the trackers of earlier starts; UserError if one is unknown or not installed."""
    names = list(_identities(run)) if option is None else [n for n in option.split(",") if n not in ("", NONE)]
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track: unknown tracker {name[:40]!r}{did_you_mean(name, [*TRACKERS, NONE])}")
        if name in PACKAGES and find_spec(name) is None:
            raise UserError(f"--track {name} needs the package {name}: pip install {name}, or leave out this tracker")
    return list(dict.fromkeys(names))


def _identities(run: Path) -> dict[str, str]:
    path = run / KEPT
    try:
        return {str(name): str(identity) for name, identity in json.loads(path.read_text()).items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise UserError(f"cannot read {path}: remove the file, and trackers start a new run") from None


def _start(name: str, run: Path, config: RunConfig, identity: str, step: int) -> Tracker:
    try:
        return TRACKERS[name](run, config, identity, step)
    except Exception as error:  # for example, no key or no server
        raise UserError(f"--track {name} failed: {_line(error)}; fix the cause or use --track {NONE}") from None


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:100]


def _flat(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        return [pair for key, part in value.items() for pair in _flat(f"{name}/{key}", part)]
    return [(name, float(value))] if isinstance(value, int | float) else []
