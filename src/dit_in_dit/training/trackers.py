"""What a run tells trackers of experiments, beside its own JSON lines: scalars, sample grids, curves.

A tracker is asked for when training is (`--track`), not in the config: it changes nothing of the run. The run's folder
keeps who was told and under which name (`trackers.json`), so that a resumed run is the same run there.
What a killed process had told, but not saved, is told again: steps may arrive twice, with the same values. Once
training goes on, a tracker that fails is left out with a warning; it must not end a run.
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
from dit_in_dit.config.run import RunConfig, to_yaml
from dit_in_dit.config.schema import Section, keys, to_dict
from dit_in_dit.runs import atomic
from dit_in_dit.runs.folder import read_config

if TYPE_CHECKING:
    from dit_in_dit.training.session import Event

PROJECT = "dit-in-dit"
KEPT = "trackers.json"
NONE = "none"
SCALARS = {"step": "train", "held_out": "held_out"}  # kinds of facts whose numbers are told, and under which heading


class Tracker(Protocol):
    """One place that is told. Made with the run's folder, its config, the name kept from before ("": the first time)
    and the step that training goes on from; a user's own joins TRACKERS."""

    identity: str  # kept, and given back when the run is resumed

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at a step, by name."""
        ...

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """A picture at a step."""
        ...

    def flush(self) -> None:
        """Write what waits: a run that is killed goes on from here."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, config: RunConfig, identity: str, step: int) -> None:
        writer: Any = import_module("torch.utils.tensorboard").SummaryWriter
        # What was told of later steps is told again: TensorBoard forgets the former.
        self.writer = writer(str(run / "tensorboard"), purge_step=step + 1 if identity else None)
        self.identity = "tensorboard"
        if not identity:
            self.writer.add_text("config", f"```yaml\n{to_yaml(config)}```", 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at a step, by name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """A picture at a step."""
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def flush(self) -> None:
        """Write what waits."""
        self.writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class _Logged:
    """Weights & Biases, and trackio, which has its interface."""

    def __init__(self, module: Any, identity: str, **options: Any) -> None:
        self.module, self.identity = module, identity
        self.module.init(project=os.environ.get("WANDB_PROJECT", PROJECT), resume="allow", **options)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at a step, by name."""
        self.module.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """A picture at a step."""
        self.module.log({name: self.module.Image(picture)}, step=step)

    def flush(self) -> None:
        """Nothing: both write what is logged by themselves, within about a second."""

    def close(self) -> None:
        """Write what is left."""
        self.module.finish()


def _wandb(run: Path, config: RunConfig, identity: str, step: int) -> Tracker:
    """A run whose id is kept; WANDB_MODE=offline writes it into RUN/wandb."""
    wandb, identity = import_module("wandb"), identity or uuid.uuid4().hex[:12]
    quiet = wandb.Settings(console="off")  # the progress bar is no log
    return _Logged(wandb, identity, id=identity, name=run.name, dir=str(run), config=to_dict(config), settings=quiet)


def _trackio(run: Path, config: RunConfig, identity: str, step: int) -> Tracker:
    """A run whose name is kept, in trackio's own folder (TRACKIO_DIR) or Space."""
    identity = identity or f"{run.name}-{uuid.uuid4().hex[:8]}"
    return _Logged(import_module("trackio"), identity, name=identity, config=to_dict(config), embed=False)


class MLflow:
    """A run whose id is kept, at MLFLOW_TRACKING_URI."""

    MOST = 500  # numbers sent at once; a server takes 1000

    def __init__(self, run: Path, config: RunConfig, identity: str, step: int) -> None:
        self.entities: Any = import_module("mlflow.entities")
        self.client = import_module("mlflow").MlflowClient()
        self.waiting: list[Any] = []
        if identity:
            self.identity = identity
            self.client.update_run(identity, status="RUNNING")
            return
        found = self.client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self.client.create_experiment(PROJECT)
        self.identity = self.client.create_run(experiment, run_name=run.name).info.run_id
        flat = [(name, value) for name, _, value in keys(config) if not isinstance(value, Section)]
        parameters = [self.entities.Param(name, str(value)) for name, value in flat]
        for start in range(0, len(parameters), 100):  # as many as a server takes at once
            self.client.log_batch(self.identity, params=parameters[start : start + 100])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at a step, by name."""
        now = int(time.time() * 1000)
        self.waiting += [self.entities.Metric(name, value, now, step) for name, value in values.items()]
        if len(self.waiting) >= self.MOST:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        while self.waiting:
            part, self.waiting = self.waiting[: self.MOST], self.waiting[self.MOST :]
            self.client.log_batch(self.identity, metrics=part)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """A picture at a step."""
        self.flush()
        self.client.log_image(self.identity, picture, artifact_file=f"{name}/{step:07d}.png")

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self.client.set_terminated(self.identity)


TRACKERS: dict[str, Callable[[Path, RunConfig, str, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": MLflow,
}
PACKAGES = frozenset(TRACKERS)  # trackers that need the package of their name; a user's own need none


def told(facts: Iterator[Event], names: Sequence[str], run: Path, warn: Callable[[str], None]) -> Iterator[Event]:
    """The facts of a run as they are, told to trackers on the way; `warn` gets a line for one that fails.

    A sample grid is told once it lies in the run's folder, where whoever takes the fact draws it; curves are told when
    the run is at its end.

    Raises:
        UserError: at the first fact, when a tracker cannot be begun.
    """
    first = next(facts)
    config, kept = read_config(run), _kept(run)
    trackers = {name: _begin(name, run, config, kept.get(name, ""), first.step) for name in names}
    atomic.write_atomic(run / KEPT, json.dumps(kept | {name: tracker.identity for name, tracker in trackers.items()}))

    def tell(what: str, *about: Any) -> None:
        for name, tracker in list(trackers.items()):
            try:
                getattr(tracker, what)(*about)
            except Exception as error:  # a network that is down, a full disk there: whatever it is, the run goes on
                del trackers[name]
                warn(f"{name} is told nothing more, because it failed: {_line(error)}")

    try:
        yield first
        for fact in facts:
            if fact.kind in SCALARS:
                tell("scalars", fact.step, dict(_flat(SCALARS[fact.kind], fact.values)))
            drawn = run / "samples" / f"{fact.step:07d}.png"
            known = fact.step <= first.step and drawn.is_file()  # a resumed run asks again for what it may lack
            yield fact
            if fact.kind == "checkpoint":
                tell("flush")
            if fact.kind == "samples":
                pictures = [] if known else [drawn]
            else:
                pictures = _curves(run) if fact.kind == "checkpoint" and fact.step == config.train.steps else []
            for path in pictures:
                if path.is_file():
                    with Image.open(path) as picture:
                        name = "samples" if fact.kind == "samples" else f"curves/{path.stem}"
                        tell("image", fact.step, name, picture.convert("RGB"))
    finally:
        tell("close")


def _curves(run: Path) -> list[Path]:
    """Pictures of the run's curves; none where nothing can draw them."""
    try:
        draw = import_module("dit_in_dit.curves.plots").draw_curves
    except ImportError:
        return []
    from dit_in_dit.curves.logs import arms, read_run

    out = run / "curves"
    out.mkdir(exist_ok=True)
    return list(draw(arms([read_run(run)]), out))


def chosen_trackers(given: str | None, run: Path) -> list[str]:
    """Names from `--track`, or those the run has told before; UserError for one that is unknown or not installed."""
    names = list(_kept(run)) if given is None else [name for name in given.split(",") if name not in ("", NONE)]
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track: no {name[:40]!r}{did_you_mean(name, [*TRACKERS, NONE])}")
        if name in PACKAGES and find_spec(name) is None:
            raise UserError(f"--track {name} needs the package {name}: pip install {name}, or leave it out")
    return list(dict.fromkeys(names))


def _kept(run: Path) -> dict[str, str]:
    path = run / KEPT
    try:
        return {str(name): str(identity) for name, identity in json.loads(path.read_text()).items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise UserError(f"cannot read {path}: remove it, and trackers begin another run") from None


def _begin(name: str, run: Path, config: RunConfig, identity: str, step: int) -> Tracker:
    try:
        return TRACKERS[name](run, config, identity, step)
    except Exception as error:  # no key, no server
        raise UserError(f"--track {name} failed: {_line(error)}; mend it, or resume with --track {NONE}") from None


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:100]


def _flat(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        return [pair for key, part in value.items() for pair in _flat(f"{name}/{key}", part)]
    return [(name, float(value))] if isinstance(value, int | float) else []
