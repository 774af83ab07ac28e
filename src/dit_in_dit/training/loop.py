"""The training loop, a generator of events: the caller decides what to print, draw or stop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch.optim import Optimizer

from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.run_data import find_source
from dit_in_dit.data.source import Source
from dit_in_dit.data.sources import count_auto_classes
from dit_in_dit.inspection import cost
from dit_in_dit.inspection.plugin_parts import check_plugin_parts
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create_run, lock_run, read_config
from dit_in_dit.runtime.deterministic import deterministic as deterministic_algorithms
from dit_in_dit.runtime.device import pick_device, resolve_precision
from dit_in_dit.training.distributed import Process, join_group
from dit_in_dit.training.interrupt import StopRequest
from dit_in_dit.training.optimizer import Groups
from dit_in_dit.training.session import Event, Session
from dit_in_dit.training.trainer import Trainer


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    stop: StopRequest | None = None,
    until: int | None = None,
    deterministic: bool = False,
    data: str | Source | None = None,
    model: NestedDiT | None = None,
    optimizer: Callable[[Groups], Optimizer] | None = None,
) -> Generator[Event, None, None]:
    """Train into the folder `out` and yield events; with `resume`, continue the run in that folder.

    The processes that a launcher (torchrun, Slurm) starts share the run. Their number may change when a run resumes.

    Args:
        stop: on its request, the run saves a checkpoint and ends.
        until: save a checkpoint and end after this step; a later call with `resume` continues.
        deterministic: bit-identical results on CUDA too, but slower. train.reduction=fixed implies it.
        data: new place of a resumed run's data, whose content must be unchanged. Or a `Source` that replaces
            data.source.
        model: a `NestedDiT`, or a module with the same `forward`, in place of the config's model; its weights are kept.
        optimizer: a function of parameter groups (`params`, and `scale` for the learning rate) that replaces
            train.optimizer. The schedule sets `lr` of the groups.

    `data`, `model` and `optimizer` take precedence over the config. Checkpoints record their class names, and a run
    resumes with the same classes only.

    Raises:
        UserError: the data or the folder cannot be used, the config is not that of the resumed run, another process
            trains the run, or training diverged.
        ProcessLostError: another process of the run ended or does not answer.
    """
    run, chosen_device = Path(out), pick_device(device)
    config = count_auto_classes(resolve_precision(config, chosen_device))
    if model is None:
        check_plugin_parts(config.model)
        cost.check_fits(config.model, chosen_device, moments=0 if optimizer else 2)
    resumed = resume and checkpoint.has_any(run)
    recorded = checkpoint.recorded_data(run) if resumed else None
    source, record = find_source(config, data, recorded)  # may take minutes: done before other processes wait
    same_bits = deterministic or config.train.reduction == "fixed"
    with deterministic_algorithms(chosen_device, on=same_bits):  # before any tensor is on the device
        world = join_group(chosen_device, config.train.timeout)
        trainer = Trainer(
            config, source, chosen_device, world, fresh=not resumed, model=model, make_optimizer=optimizer
        )
        with world.watched():
            if not resume:
                world.on_main(lambda: create_run(run, config))
            stored = world.on_main(lambda: read_config(run))  # before the lock, which needs the folder of a run
            with _held(run, world):
                last = min(until or config.train.steps, config.train.steps)
                session = Session(trainer, run, stop or StopRequest(), last, record)
                passed_over = session.restore(stored) if resume else ()
                yield session.start(passed_over=passed_over, unrecorded=resumed and not recorded)
                yield from session.events()


@contextmanager
def _held(run: Path, world: Process) -> Iterator[None]:
    """Hold `lock_run` on rank 0; an error of the lock is raised on every rank."""
    with ExitStack() as stack:
        world.on_main(lambda: stack.enter_context(lock_run(run)))
        yield
