"""The training loop, a generator of facts: the caller decides what to show, draw or stop."""

from __future__ import annotations

import atexit
import math
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig, first_difference
from dit_in_dit.data.run_data import check_unchanged, locate, record
from dit_in_dit.data.source import open_source
from dit_in_dit.inspection import cost
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create, hold, read_config
from dit_in_dit.runs.jsonl import Clock, Log
from dit_in_dit.runs.tensors import order
from dit_in_dit.runtime.deterministic import deterministic as deterministic_algorithms
from dit_in_dit.runtime.device import pick_device, settled
from dit_in_dit.training.batches import Batch, Examples, end_workers, image_number, load
from dit_in_dit.training.distributed import World, join
from dit_in_dit.training.interrupt import Interrupted, Stop
from dit_in_dit.training.trainer import Trainer

FLUSH_SECONDS = 0.5  # losses stay on the device this long before they are read and logged: no wait per step
ROLL_BACKS = 3  # times in a row that a run goes back
NAMED = 8  # examples named in the line of a skipped step


@dataclass(frozen=True)
class Fact:
    """Something that happened.

    kind: start (what runs on what, the damaged checkpoints passed over), step (loss, gradient norm in all and in each
    part, learning rate), skipped (a step whose loss or gradient was not finite: its examples), rolled_back (to which
    step, and why), held_out (denoising error by time), checkpoint (its path), unsaved (why one could not be written),
    samples (due: draw with `model`, the averaged one; where the process leads), stopped (as it was asked to; the last).
    """

    kind: str
    step: int
    values: dict[str, Any] = field(default_factory=dict)
    model: NestedDiT | None = None


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    stop: Stop | None = None,
    until: int | None = None,
    deterministic: bool = False,
    data: str | None = None,
) -> Generator[Fact, None, None]:
    """Train into the folder `out`, yielding facts; with `resume`, continue the run that is there.

    Under a launcher (torchrun, Slurm) its processes share the run, whatever their number was before.

    Args:
        stop: when it is asked to stop, the run saves a checkpoint and ends.
        until: end with a checkpoint after this step, to go on another time.
        deterministic: the same bits at every run and resume on CUDA too; always with train.reduction=fixed. Slower.
        data: where the resumed run's data are now, if not where its config says; they must be the same.

    Raises:
        UserError: the data or the folder cannot be used, the config is not the resumed run's, another process
            trains it, or training diverged.
        LostError: another process of the run ended or does not answer.
    """
    run, place = Path(out), pick_device(device)
    config = settled(config, place)
    cost.check_fits(config.model, place)
    resumed = resume and checkpoint.has_any(run)
    noted = checkpoint.noted_data(run) if resumed else None
    place_of_data = replace(config.data, source=data) if data else locate(config.data, noted)
    source = open_source(place_of_data, config.model)
    noting = record(source, place_of_data)  # before the others wait: of many files it takes minutes
    same_bits = deterministic or config.train.reduction == "fixed"
    with deterministic_algorithms(place, on=same_bits):  # before anything lies on the device
        world = join(place, config.train.timeout)
        trainer = Trainer(config, source, place, world, fresh=not resumed)
        with world.watched():
            if not resume:
                world.led(lambda: create(run, config))
            stored = world.led(lambda: read_config(run))  # first: where no run is, there is nothing to hold
            with _held(run, world):
                last = min(until or config.train.steps, config.train.steps)
                course = _Course(trainer, run, stop or Stop(), last, noting)
                passed_over = course.restore(stored) if resume else ()
                parameters = sum(p.numel() for p in trainer.model.parameters())
                values = {"device": str(place), "precision": config.train.precision, "parameters": parameters}
                values |= {"processes": world.size, "passed_over": passed_over, "begun": trainer.begun}
                values |= {"unrecorded": resumed and not noted}
                yield Fact("start", trainer.step, {**values, "classes": source.classes, "skipped": source.skipped})
                yield from course.facts()


@contextmanager
def _held(run: Path, world: World) -> Iterator[None]:
    """`hold` by the process that leads; its error is raised in all."""
    with ExitStack() as stack:
        world.led(lambda: stack.enter_context(hold(run)))
        yield


class _DivergedError(Exception):
    """Too many steps in a row were skipped."""

    def __init__(self, step: int, numbers: str) -> None:
        super().__init__(step, numbers)
        self.step, self.numbers = step, numbers


class _Course:
    """The way of one run from the step it is at to step `last`, in every process of its world."""

    def __init__(self, trainer: Trainer, run: Path, stop: Stop, last: int, data: dict[str, str]) -> None:
        self.trainer, self.run, self.stop, self.last, self.data = trainer, run, stop, last, data
        self.config, self.how, self.world = trainer.config, trainer.config.train, trainer.world
        self.log = Log(run / "log.jsonl" if self.world.leads else None)
        self.clock = Clock(run / "timing.jsonl" if self.world.leads else None)
        self.batches: Iterator[Batch | str] = iter(())
        self.pending: list[tuple[int, dict[str, Tensor | float], Tensor]] = []  # steps not read from the device yet
        self.saved = -1  # the last step that has a checkpoint

    def restore(self, stored: RunConfig, *, steady: bool = False) -> tuple[str, ...]:
        """Bring the trainer to the run's newest good (and steady) checkpoint, if it has one; the damaged ones that were
        newer."""
        trainer, run = self.trainer, self.run
        if differing := first_difference(stored, self.config):
            raise UserError(
                f"{run} was started with another config: {differing}; resume it as it was, or use another --out"
            )
        if not self.world.led(lambda: checkpoint.has_any(run)):
            return ()
        found = self.world.led(lambda: checkpoint.newest(run, steady=steady))
        if tuple(found.manifest["classes"]) != tuple(trainer.source.classes):
            raise UserError(f"{self.data['place']} has other classes than when {run} was started")
        noted = found.manifest.get("data")
        self.world.led(lambda: check_unchanged(self.data, noted, str(run)))
        trainer.restore(found.trained(), found.averaged(), found.step)
        self.saved = trainer.step
        return tuple(map(str, found.passed_over))

    def facts(self) -> Iterator[Fact]:
        """Until step `last`, or until somebody asks to stop."""
        atexit.register(self._end_workers)  # where nobody drops this generator before Python ends
        with closing(self.log.lines), closing(self.clock.lines):
            try:
                yield from self._way()
            finally:
                self._end_workers()
                atexit.unregister(self._end_workers)

    def _way(self) -> Iterator[Fact]:
        try:
            yield from self._owed()
            while self.trainer.step < self.last:
                try:
                    yield from self._steps()
                except _DivergedError as diverged:
                    yield self._roll_back(diverged)
        except Interrupted:
            pass
        if self.trainer.step < self.last or self.last < self.how.steps:
            yield from self._stop()

    def _end_workers(self) -> None:
        batches, self.batches = self.batches, iter(())
        end_workers(batches)

    def _steps(self) -> Iterator[Fact]:
        trainer, how = self.trainer, self.how
        examples = Examples(trainer.source, self.config, self.world.rank, self.world.size)
        first, last = ((step + trainer.shift) * examples.per_step for step in (trainer.step, self.last))
        on_cuda = trainer.device.type == "cuda"
        self.batches = iter(load(examples, first, last, self.config.data.workers, pin=on_cuda))
        while trainer.step < self.last:
            with self._waiting():
                batches = [_whole(next(self.batches)) for _ in range(examples.per_step)]
            values = trainer.update(batches)
            step = trainer.step
            self.pending.append((step, values, trainer.each))
            asked, flush = self.world.agree(self.stop.signal, self.clock.waited() > FLUSH_SECONDS)
            if asked:
                raise Interrupted
            evaluate, draw = self._due(step)
            save = _due(how.checkpoint_every, step, how.steps)
            if evaluate or save or draw or flush:
                yield from self._flush()
            if evaluate:
                yield self._evaluate()
            if draw:
                yield self._samples()
            if save and (not trainer.streak or step == how.steps):  # nobody goes back into a streak
                trainer.tries = 0
                yield self._save(steady=True)
            if not self.pending:
                self.clock.start()  # only training is timed

    def _waiting(self) -> AbstractContextManager[None]:
        """A wait that a signal cuts short, where no other process would be left waiting."""
        return self.stop.waiting() if self.world.size == 1 else nullcontext()

    def _due(self, step: int) -> tuple[bool, bool]:
        """Whether the held-out error, and a picture, is due after this step."""
        evaluate = _due(self.how.evaluate_every, step, self.how.steps) and self.trainer.held_out is not None
        return evaluate, _due(self.how.sample_every, step, self.how.steps)

    def _owed(self) -> Iterator[Fact]:
        """What the restored step was to give, and did not come to."""
        step = self.trainer.step
        evaluate, draw = self._due(step) if step else (False, False)
        line = {"step": step, "held_out": {}}
        if evaluate and not self.world.led(lambda: self.log.has(self.trainer.rolled_back, line)):
            yield self._evaluate()
        if draw:
            yield self._samples()

    def _flush(self) -> Iterator[Fact]:
        """Read, log and tell the steps that wait on the device; _DivergedError at the last of too many bad ones."""
        steps, self.pending = self.pending, []
        if not steps:
            return
        speed = self.clock.write(steps[-1][0], len(steps) * self.config.global_batch)
        for (step, _, each), numbers in zip(steps, _read([values for _, values, _ in steps]), strict=True):
            if math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"]):
                self.trainer.streak = 0
                self._note({"step": step, **numbers})
                yield Fact("step", step, {**numbers, "images_per_second": speed})
                continue
            self.trainer.streak += 1
            found = self._skipped(step, numbers, each)
            self._note({"step": step, "skipped": True, "why": found})
            yield Fact("skipped", step, found)
            if self.trainer.streak > self.how.skip_most:
                raise _DivergedError(step, f"loss {found['loss']}, gradient norm {found['grad_norm']}")

    def _skipped(self, step: int, numbers: dict[str, float], each: Tensor) -> dict[str, Any]:
        """What a skipped step saw: its examples, and those whose own loss was not finite, with their images."""
        first = (step - 1 + self.trainer.shift) * self.config.global_batch
        bad = [first + int(row) for row in (~each.isfinite()).nonzero().flatten()[:NAMED]]
        size = self.trainer.source.train_size
        return {
            "loss": str(numbers["loss"]),
            "grad_norm": str(numbers["grad_norm"]),
            "examples": [first, first + self.config.global_batch - 1],
            "not_finite": bad,
            "images": [image_number(self.config.seed, index, size) for index in bad],
        }

    def _note(self, line: dict[str, Any]) -> None:
        self.log.write(self.trainer.rolled_back, line)

    def _evaluate(self) -> Fact:
        with self._waiting():
            errors = self.trainer.evaluate()
        words = {t: {name: _finite_or_name(error) for name, error in kinds.items()} for t, kinds in errors.items()}
        self._note({"step": self.trainer.step, "held_out": words})
        return Fact("held_out", self.trainer.step, errors)

    def _samples(self) -> Fact:
        model = self.trainer.averaged()
        return Fact("samples", self.trainer.step, model=model if self.world.leads else None)

    def _save(self, *, steady: bool = False) -> Fact:
        """A checkpoint; where there is no room for one, the next interval tries again, and the last step gives up.
        A steady one is a function of the config: not made because somebody stopped the run."""
        trainer = self.trainer
        state, ema = trainer.state(), trainer.averaged_state()

        def write() -> Path:
            config, classes, data = self.config, trainer.source.classes, self.data
            return checkpoint.save(self.run, config, trainer.step, state, ema, classes, steady=steady, data=data)

        try:
            # No checkpoint without the lines before it; and where these cannot be kept, nobody gathers a part.
            self.world.led(self.log.lines.keep)
            if trainer.sharded and not self.world.leads:
                for tensors in (state, ema):  # process 0 writes; the others give it their parts, in the same order
                    for name in order(tensors):
                        tensors[name]
            path = self.world.led(write)
        except checkpoint.SaveError as error:
            if trainer.step >= self.last:
                raise
            return Fact("unsaved", trainer.step, {"why": str(error)})
        self.saved = trainer.step
        return Fact("checkpoint", trainer.step, {"path": str(path)})

    def _stop(self) -> Iterator[Fact]:
        """Save where the run is, unless it has just gone astray: then what is saved already leads there again."""
        try:
            yield from self._flush()
        except _DivergedError:
            pass
        else:
            self.last = self.trainer.step
            if self.trainer.step not in (0, self.saved):
                yield self._save()
        yield Fact("stopped", self.trainer.step, {"signal": self.stop.signal})

    def _roll_back(self, diverged: _DivergedError) -> Fact:
        """Go back to the last checkpoint, and on from there with the examples after those that led astray (as PaLM,
        Chowdhery et al. 2022, section 5.1)."""
        trainer, step = self.trainer, diverged.step
        problem = f"step {step}: {diverged.numbers}: training diverged, {trainer.streak} steps in a row"
        remedy = "lower train.learning_rate, lengthen train.warmup or set train.precision=float32"
        if self.how.on_divergence == "stop":
            raise UserError(f"{problem}; {remedy}, or set train.on_divergence=roll_back")
        shift, rolled_back, tries = trainer.shift + step, trainer.rolled_back, trainer.tries
        if tries == ROLL_BACKS:
            raise UserError(f"{problem}, also after going back {tries} times; {remedy}")
        if not self.world.led(lambda: checkpoint.has_any(self.run)):
            raise UserError(f"{problem}, and there is no checkpoint to go back to; {remedy}")
        self.restore(self.config, steady=True)
        trainer.shift, trainer.rolled_back = shift - trainer.step, rolled_back
        values = {"to": trainer.step, "shift": trainer.shift}
        self._note({"step": step, "rollback": values})
        trainer.rolled_back, trainer.tries, trainer.streak = rolled_back + 1, tries + 1, 0
        self.pending.clear()
        self.clock.start()
        return Fact("rolled_back", step, {**values, "why": problem})


def _whole(batch: Batch | str) -> Batch:
    """The batch, or the UserError that a worker met: raised there, it would arrive as a traceback's text."""
    if isinstance(batch, str):
        raise UserError(batch)
    return batch


def _read(steps: list[dict[str, Tensor | float]]) -> list[dict[str, float]]:
    """The numbers of several steps, copied from the device together."""
    tensors = [value for values in steps for value in values.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return [
        {name: next(numbers) if isinstance(value, Tensor) else value for name, value in values.items()}
        for values in steps
    ]


def _finite_or_name(number: float) -> float | str:
    """A number as the log has it: JSON knows no nan and no inf, so these stand as words."""
    return number if math.isfinite(number) else str(number)


def _due(every: int, step: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)
