"""The training loop, a generator of facts: the caller decides what to show, draw or stop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch.optim import Optimizer

from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.run_data import find_source
from dit_in_dit.data.source import Source
from dit_in_dit.inspection import cost
from dit_in_dit.inspection.plugin_parts import check_plugin_parts
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create, lock_run, read_config
from dit_in_dit.runtime.deterministic import deterministic as deterministic_algorithms
from dit_in_dit.runtime.device import pick_device, resolve_precision
from dit_in_dit.training.distributed import Process, join
from dit_in_dit.training.interrupt import Stop
from dit_in_dit.training.optimizer import Groups
from dit_in_dit.training.session import Event, Session
from dit_in_dit.training.trainer import Trainer


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    stop: Stop | None = None,
    until: int | None = None,
    deterministic: bool = False,
    data: str | Source | None = None,
    model: NestedDiT | None = None,
    optimizer: Callable[[Groups], Optimizer] | None = None,
) -> Generator[Event, None, None]:
    """Train into the folder `out`, yielding facts; with `resume`, continue the run that is there.

    Under a launcher (torchrun, Slurm) its processes share the run, whatever their number was before.

    Args:
        stop: when it is asked to stop, the run saves a checkpoint and ends.
        until: end with a checkpoint after this step, to go on another time.
        deterministic: the same bits at every run and resume on CUDA too; always with train.reduction=fixed. Slower.
        data: where the resumed run's data are now, if not where its config says; they must be the same. Or a source of
            one's own, instead of data.source.
        model: trained instead of the config's, from the weights that it has: `NestedDiT` or a module with its forward.
        optimizer: from groups of parameters (`params`, and `scale` of their rate), instead of train.optimizer. The
            schedule sets the groups' `lr`.

    `data`, `model` and `optimizer` win over the config. Checkpoints name their classes; a run resumes with the same.

    Raises:
        UserError: the data or the folder cannot be used, the config is not the resumed run's, another process
            trains it, or training diverged.
        LostError: another process of the run ended or does not answer.
    """
    run, place = Path(out), pick_device(device)
    config = resolve_precision(config, place)
    if model is None:
        check_plugin_parts(config.model)
        cost.check_fits(config.model, place, moments=0 if optimizer else 2)
    resumed = resume and checkpoint.has_any(run)
    noted = checkpoint.noted_data(run) if resumed else None
    source, noting = find_source(config, data, noted)  # before the others wait: of many files it takes minutes
    same_bits = deterministic or config.train.reduction == "fixed"
    with deterministic_algorithms(place, on=same_bits):  # before anything lies on the device
        world = join(place, config.train.timeout)
        trainer = Trainer(config, source, place, world, fresh=not resumed, model=model, make_optimizer=optimizer)
        with world.watched():
            if not resume:
                world.led(lambda: create(run, config))
            stored = world.led(lambda: read_config(run))  # first: where no run is, there is nothing to hold
            with _held(run, world):
                last = min(until or config.train.steps, config.train.steps)
                session = Session(trainer, run, stop or Stop(), last, noting)
                passed_over = session.restore(stored) if resume else ()
                parameters = sum(p.numel() for p in trainer.model.parameters())
                values = {"device": str(place), "precision": config.train.precision, "parameters": parameters}
                values |= {"processes": world.size, "passed_over": passed_over, "begun": trainer.begun}
                values |= {"unrecorded": resumed and not noted}
                yield Event("start", trainer.step, {**values, "classes": source.classes, "skipped": source.skipped})
                yield from session.facts()


@contextmanager
def _held(run: Path, world: Process) -> Iterator[None]:
    """`lock_run` by the process that leads; its error is raised in all."""
    with ExitStack() as stack:
        world.led(lambda: stack.enter_context(lock_run(run)))
        yield
