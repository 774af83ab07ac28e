"""A run in progress: steps, checkpoints, evaluations and roll-backs, as events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.run_data import check_unchanged
from dit_in_dit.runs import checkpoint
from dit_in_dit.training.batches import Examples, Packed, end_workers, load_batches
from dit_in_dit.training.changes import check_changes, record_changes
from dit_in_dit.training.divergence import DivergedError
from dit_in_dit.training.event import Event
from dit_in_dit.training.interrupt import Interrupted, StopRequest
from dit_in_dit.training.saving import Saver
from dit_in_dit.training.step_log import StepLog, is_finite, number_or_name
from dit_in_dit.training.terms import check_references
from dit_in_dit.training.trainer import Trainer
from dit_in_dit.training.utilization import Utilization

NAMED = 8  # most examples named in the log line of a skipped step


class Session:
    """A run from its current step to step `last`, in one of the run's processes."""

    def __init__(self, trainer: Trainer, run: Path, stop: StopRequest, last: int, data: dict[str, str]) -> None:
        self.trainer, self.run, self.stop, self.last = trainer, run, stop, last
        self.data = data = {**data, **trainer.terms.references()}
        self.config, self.how, self.world = trainer.config, trainer.config.train, trainer.world
        usage = Utilization(self.config, trainer.device, self.world.size, trainer.objects)
        self.lines = StepLog(run, writes=self.world.is_main, global_batch=self.config.global_batch, usage=usage)
        self.saver = Saver(trainer, run, self.lines.log.lines, data)
        self.batches: Iterator[Packed | str] = iter(())
        self.changed = ""  # a line about config keys that this resume changed

    def resume(self, stored: RunConfig) -> tuple[str, ...]:
        """`restore` a run whose config is `stored`, and record how the config changes; errors as in `changes`."""
        changes = check_changes(self.run, stored, self.config)
        skipped = self.restore()
        if changes:
            logged = max((line["step"] for line in self.lines.log.lines.stored), default=0)
            record = partial(record_changes, self.run, stored, self.config, changes, self.trainer.step, logged)
            self.changed = self.world.on_main(record)
        return skipped

    def restore(self, *, steady: bool = False) -> tuple[str, ...]:
        """Restore the run's newest good checkpoint, if there is one; with `steady`, its newest regular checkpoint.
        Returns the paths of newer, damaged checkpoints, which were skipped. UserError if classes, data or objects given
        to train() are not those of the run."""
        trainer, run = self.trainer, self.run
        if not self.world.on_main(lambda: checkpoint.has_any(run)):
            return ()
        saved = self.world.on_main(lambda: checkpoint.newest(run, steady=steady))
        if tuple(saved.manifest["classes"]) != tuple(trainer.source.classes):
            raise UserError(f"{self.data['place']} has other classes than the run {run}: restore the data")
        _check_objects(trainer.objects, saved.manifest.get("objects", {}), run)
        self.world.on_main(lambda: check_unchanged(self.data, saved.manifest.get("data"), str(run)))
        check_references(self.data, saved.manifest.get("data"), run)
        try:
            trainer.restore(saved.trained(), saved.averaged(), saved.step)
        except (KeyError, RuntimeError):  # the weights of a user's class have changed since the save
            raise saved.misfit() from None
        self.saver.saved = trainer.step
        return tuple(map(str, saved.passed_over))

    def start(self, **values: Any) -> Event:
        """The event `start`; the given `values` are added to the event's own."""
        trainer = self.trainer
        parameters = sum(weight.numel() for weight in trainer.model.parameters())
        values |= {"device": str(trainer.device), "precision": self.how.precision, "parameters": parameters}
        values |= {"processes": self.world.size, "begun": trainer.begun, "changed": self.changed}
        values |= {"classes": trainer.source.classes, "skipped": trainer.source.skipped}
        return Event("start", trainer.step, values)

    def events(self) -> Iterator[Event]:
        """Events until step `last`, or until a request to stop."""
        try:
            yield from self._train()
        finally:
            self._end_workers()
            self.saver.close()
            self.lines.close()

    def _train(self) -> Iterator[Event]:
        try:
            yield from self._overdue()
            while self.trainer.step < self.last:
                try:
                    yield from self._steps()
                except DivergedError as diverged:
                    yield from self.saver.finished(wait=True)
                    yield self._roll_back(diverged)
        except Interrupted:
            pass
        if self.trainer.step < self.last or self.last < self.how.steps:
            yield from self._stop()

    def _end_workers(self) -> None:
        batches, self.batches = self.batches, iter(())
        end_workers(batches)

    def _steps(self) -> Iterator[Event]:
        trainer, how = self.trainer, self.how
        examples = Examples(trainer.source, self.config, self.world.rank, self.world.size)
        first, last = ((step + trainer.divergence.shift) * examples.per_step for step in (trainer.step, self.last))
        on_cuda = trainer.device.type == "cuda"
        self.batches = iter(load_batches(examples, first, last, self.config.data.workers, pin=on_cuda))
        while trainer.step < self.last:
            with self._waiting():
                batches = [_whole(next(self.batches)) for _ in range(examples.per_step)]
            values = trainer.update(batches)
            step = trainer.step
            self.lines.pending.append((step, values, trainer.each))
            asked, flush = self.world.agree(self.stop.signal, self.lines.is_due())
            if asked:
                raise Interrupted
            evaluate, draw = self._due(step)
            save = _due(how.checkpoint_every, step, how.steps)
            if evaluate or save or draw or flush:
                yield from self._flush()
                yield from self.saver.finished()
            if evaluate:
                yield self._evaluate()
            if draw:
                yield self._samples()
            if save and (not trainer.divergence.streak or step == how.steps):  # no roll-back may end within a streak
                trainer.divergence.tries = 0
                yield from self.saver.save(steady=True, last=step >= self.last)
            self.lines.start_clock()

    def _waiting(self) -> AbstractContextManager[None]:
        """A wait that a stop request ends; only in a single process, because other processes would be left waiting."""
        return self.stop.waiting() if self.world.size == 1 else nullcontext()

    def _due(self, step: int) -> tuple[bool, bool]:
        """Whether a held-out evaluation, and whether a sample grid, is due after this step."""
        evaluate = _due(self.how.evaluate_every, step, self.how.steps) and self.trainer.held_out is not None
        return evaluate, _due(self.how.sample_every, step, self.how.steps)

    def _overdue(self) -> Iterator[Event]:
        """Evaluations and samples that were due at the restored step, but that the interruption prevented."""
        step = self.trainer.step
        evaluate, draw = self._due(step) if step else (False, False)
        line = {"step": step, "held_out": {}}
        if evaluate and not self.world.on_main(lambda: self.lines.log.has(self.trainer.divergence.rolled_back, line)):
            yield self._evaluate()
        if draw:
            yield self._samples()

    def _flush(self) -> Iterator[Event]:
        """Read, log and yield the steps that wait on the device; DivergedError after too many skipped in a row."""
        steps, speeds = self.lines.read()
        divergence = self.trainer.divergence
        for step, numbers, each in steps:
            divergence.streak = 0 if is_finite(numbers) else divergence.streak + 1
            if not divergence.streak:
                self._note({"step": step, **numbers})
                yield Event("step", step, {**numbers, **speeds})
                continue
            why = self._skipped(step, numbers, each)
            self._note({"step": step, "skipped": True, "why": why})
            yield Event("skipped", step, why)
            if divergence.streak > self.how.skip_most:
                raise DivergedError(step, f"loss {why['loss']}, gradient norm {why['grad_norm']}")

    def _skipped(self, step: int, numbers: dict[str, float], each: Tensor) -> dict[str, Any]:
        """Record of a skipped step: its examples, and numbers and images of those with a non-finite loss."""
        first = (step - 1 + self.trainer.divergence.shift) * self.config.global_batch
        bad = [first + int(row) for row in (~each.isfinite()).nonzero().flatten()[:NAMED]]
        examples = Examples(self.trainer.source, self.config)
        return {
            "loss": str(numbers["loss"]),
            "grad_norm": str(numbers["grad_norm"]),
            "examples": [first, first + self.config.global_batch - 1],
            "not_finite": bad,
            "images": [examples.image_of(index) for index in bad],
        }

    def _note(self, line: dict[str, Any]) -> None:
        self.lines.log.write(self.trainer.divergence.rolled_back, line)

    def _evaluate(self) -> Event:
        with self._waiting():
            errors = self.trainer.evaluate()
        words = {t: {name: number_or_name(error) for name, error in kinds.items()} for t, kinds in errors.items()}
        self._note({"step": self.trainer.step, "held_out": words})
        return Event("held_out", self.trainer.step, errors)

    def _samples(self) -> Event:
        model = self.trainer.averaged()
        return Event("samples", self.trainer.step, model=model if self.world.is_main else None)

    def _stop(self) -> Iterator[Event]:
        """Save the current step, unless training has just diverged: then a resume from the last checkpoint repeats the
        divergence."""
        yield from self.saver.finished(wait=True)
        try:
            yield from self._flush()
        except DivergedError:
            pass
        else:
            self.last = self.trainer.step
            if self.trainer.step not in (0, self.saver.saved):
                yield from self.saver.save(last=True)
        yield Event("stopped", self.trainer.step, {"signal": self.stop.signal})

    def _roll_back(self, diverged: DivergedError) -> Event:
        """Go back to the last regular checkpoint and continue with later examples: the examples before the divergence
        are left out (as in PaLM, Chowdhery et al. 2022, section 5.1)."""
        trainer, step, before = self.trainer, diverged.step, self.trainer.divergence
        has_checkpoint = partial(self.world.on_main, partial(checkpoint.has_any, self.run))
        problem = before.check_way_back(diverged, self.how.on_divergence, has_checkpoint)
        self.restore(steady=True)
        trainer.divergence = before.after(step, trainer.step)
        values = {"to": trainer.step, "shift": trainer.divergence.shift}
        self.lines.log.write(before.rolled_back, {"step": step, "rollback": values})
        self.lines.pending.clear()
        self.lines.start_clock()
        return Event("rolled_back", step, {**values, "why": problem})


def _check_objects(passed: Mapping[str, str], recorded: Mapping[str, str], run: Path) -> None:
    """Check that train() received the classes that the checkpoint records. Raises UserError."""
    for name in ("model", "optimizer", "loss"):
        if passed.get(name) != recorded.get(name):
            before, now = (names.get(name, "the config's") for names in (recorded, passed))
            raise UserError(f"{run} was trained with {name} {before}: got {now}; give the first one to train()")


def _whole(batch: Packed | str) -> Packed:
    """Return the batch, or raise the UserError of a loader worker: an error raised there would print a traceback."""
    if isinstance(batch, str):
        raise UserError(batch)
    return batch


def _due(every: int, step: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)
