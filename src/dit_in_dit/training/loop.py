"""The training loop, an iterator of events: the caller decides what to print, draw or stop."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from copy import copy
from dataclasses import KW_ONLY, dataclass, replace
from importlib.util import find_spec
from inspect import GEN_CLOSED, getgeneratorstate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

import dit_in_dit
from dit_in_dit.config.errors import UserError, check_whole
from dit_in_dit.config.run import DiffusionConfig, RunConfig
from dit_in_dit.curves import arms, logs, plots
from dit_in_dit.data.coerce import as_source
from dit_in_dit.data.run_data import find_source
from dit_in_dit.data.source import Source
from dit_in_dit.data.sources import count_auto_classes
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.inspection import cost
from dit_in_dit.inspection.optimizer_cost import moments_per_weight
from dit_in_dit.inspection.plugin_parts import check_plugin_parts
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.reporting.plots import figure_png
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create_run, lock_run, read_config
from dit_in_dit.runtime.deterministic import deterministic as deterministic_algorithms
from dit_in_dit.runtime.device import pick_device, resolve_auto
from dit_in_dit.training.balance import balanced_order
from dit_in_dit.training.distributed import join_group
from dit_in_dit.training.event import Event, progress_text
from dit_in_dit.training.interrupt import StopRequest
from dit_in_dit.training.optimizer import Groups
from dit_in_dit.training.session import Session
from dit_in_dit.training.trainer import Trainer

if TYPE_CHECKING:
    from dit_in_dit import Model


@dataclass(eq=False, repr=False)
class Run(Generator[Event, None, None]):
    """Train into the folder `out`: an iterator of events. With `resume`, continue the run in that folder,
    whose config may differ in the keys of `changes.CHANGEABLE`, such as train.steps.

    The processes that a launcher (torchrun, Slurm) starts share the run. Their number may change when a run resumes.
    A notebook shows the loss curve.

    Args:
        stop: on its request, the run saves a checkpoint and ends.
        until: save a checkpoint and end after this step; a later call with `resume` continues.
        deterministic: bit-identical results on CUDA too, but slower. train.reduction=fixed implies it.
        data: images in place of data.source: a folder or a name (of a resumed run: their new place), or an object as
            for `data.coerce.as_source`, such as a dataset with `__len__` and `__getitem__`.
        model: a `NestedDiT`, or a module with the same `forward`, in place of the config's model; its weights are kept.
        optimizer: a function of parameter groups (`params`, and `scale` for the learning rate) that replaces
            train.optimizer. The schedule sets `lr` of the groups.
        loss: a subclass of `diffusion.objective.Objective`, whose `loss` is minimised.
        callbacks: functions of an `Event`, called before the event is yielded; their errors are raised unchanged.

    These objects take precedence over the config. Checkpoints record their class names, and a run resumes with the same
    classes only.

    Raises:
        UserError: the data or the folder cannot be used, the config is not that of the resumed run, another process
            trains the run, or training diverged.
        ProcessLostError: another process of the run ended or does not answer.

    >>> dataset = [(np.full((32, 32, 3), 60 * label, np.uint8), label) for label in (0, 1, 2, 3) * 4]
    >>> config = dd.preset("emoji", num_classes=4, **tiny)
    >>> [event.kind for event in dd.train(config, "runs/mine", data=dataset)]
    ['start', 'step', 'held_out', 'samples', 'checkpoint']
    >>> run = dd.train(config, "runs/other", data=dataset).run()  # with a progress bar
    >>> pictures = run.load().sample(num=4)
    """

    config: RunConfig
    out: str | Path
    _: KW_ONLY
    resume: bool = False
    device: str = "auto"
    stop: StopRequest | None = None
    until: int | None = None
    deterministic: bool = False
    data: Any = None
    model: NestedDiT | None = None
    optimizer: Callable[[Groups], Optimizer] | None = None
    loss: Callable[[DiffusionConfig], Objective] | None = None
    callbacks: Sequence[Callable[[Event], object]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.config, RunConfig) or not str(self.out):
            raise UserError("train takes a config, such as preset('emoji'), and a folder for the run")
        if not isinstance(self.callbacks, Sequence) or not all(map(callable, self.callbacks)):
            raise UserError("callbacks must be a list of functions of an Event")
        if self.until is not None:
            check_whole(self.until, "until", 1, 10**12)
        self.folder = Path(self.out)
        if self.data is not None:
            self.data = as_source(self.data, self.config)
        if isinstance(self.data, str) and not self.resume:
            self.config = replace(self.config, data=replace(self.config.data, source=self.data))
        self._events = copy(self)._train()  # of a copy: without a cycle, an abandoned run frees its lock at once
        weakref.finalize(self, self._events.close)  # also when Python ends, while the modules still work

    def send(self, value: None) -> Event:
        """The next event, after the callbacks."""
        event = self._events.send(value)
        if event.kind == "start":  # the stored config has train.steps in place of train.epochs
            self.config = read_config(self.folder)
        for callback in self.callbacks:
            try:
                callback(event)
            except StopIteration as error:  # it would end a loop over the events without a word
                raise RuntimeError("a callback raised StopIteration") from error
        return event

    def throw(self, *error: Any) -> Event:
        """Raise an error inside the training loop, which then ends."""
        return self._events.throw(*error)

    def run(self) -> Run:
        """Train to the end with a progress bar; returns this run."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if getgeneratorstate(self._events) == GEN_CLOSED:
            raise UserError(f"this run has ended: train(config, {str(self.out)!r}, resume=True) continues it")
        live = None if find_spec("ipywidgets") else False  # without this package a notebook has the bar as text
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with closing(self), Progress(*columns, console=Console(stderr=True, force_jupyter=live)) as bar:
            task = bar.add_task("", total=None)
            for event in self:
                if event.kind not in ("checkpoint", "unsaved"):  # which may be of an earlier step
                    text = progress_text(event) if event.kind == "step" else None
                    bar.update(task, total=self.config.train.steps, completed=event.step, description=text)
        return self

    def load(self, device: str = "auto") -> Model:
        """The model of the newest checkpoint."""
        return dit_in_dit.load(self.folder, device)

    def __repr__(self) -> str:
        return f"run {self.folder}, {self.config.train.steps} steps"

    def _repr_png_(self) -> bytes | None:
        try:
            return figure_png(plots.draw_loss(arms.arms([logs.read_run(self.folder)])), colours=256)
        except UserError:  # no step is logged yet, or matplotlib is not installed
            return None

    def _train(self) -> Generator[Event, None, None]:
        device, resume, run = pick_device(self.device), self.resume, self.folder
        resumed = resume and checkpoint.has_any(run)
        given = self.data if isinstance(self.data, Source) else None
        config, chosen = self.config, self.config.train.compile == "auto"
        if chosen and resumed:  # compiled as it was: the last bits depend on it
            config = replace(config, train=replace(config.train, compile=read_config(run).train.compile))
        config = count_auto_classes(resolve_auto(config, device), given)
        if self.model is None:
            check_plugin_parts(config.model)
            moments = 0 if self.optimizer else moments_per_weight(config.model, config.train.optimizer)
            cost.check_fits(config.model, device, moments, averages=1 + len(config.train.further_averages))
        recorded = checkpoint.recorded_data(run) if resumed else None
        source, record = find_source(config, self.data, recorded)  # may take minutes: done before other processes wait
        config = config.resolve_epochs(source.train_size)
        balanced_order(config, source)  # its error comes before the folder is made
        same_bits = self.deterministic or config.train.reduction == "fixed"
        with deterministic_algorithms(device, on=same_bits):  # before any tensor is on the device
            world = join_group(device, config.train.timeout)
            own: dict[str, Any] = {"model": self.model, "make_optimizer": self.optimizer, "make_loss": self.loss}
            trainer = Trainer(config, source, device, world, fresh=not resumed, fall_back=chosen, **own)
            with world.watched(), ExitStack() as held:
                if not resume:
                    world.on_main(lambda: create_run(run, config))
                stored = world.on_main(lambda: read_config(run))  # before the lock, which needs the folder of a run
                world.on_main(lambda: held.enter_context(lock_run(run)))
                last = min(self.until or config.train.steps, config.train.steps)
                session = Session(trainer, run, self.stop or StopRequest(), last, record)
                passed_over = session.resume(stored) if resume else ()
                yield session.start(passed_over=passed_over, unrecorded=resumed and not recorded)
                yield from session.events()


train = Run
