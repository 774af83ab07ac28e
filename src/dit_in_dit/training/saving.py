"""Checkpoints of a run in training, written while training waits or, with train.save=async, by a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.checkpoint import SaveError
from dit_in_dit.runs.jsonl import Lines
from dit_in_dit.runs.tensors import file_order
from dit_in_dit.training.event import Event
from dit_in_dit.training.trainer import Trainer

Write = Callable[..., Path]


class Saver:
    """Saves the checkpoints of a run. All processes call its methods together; rank 0 writes.

    With train.save=async the state is copied to host memory at the step of the checkpoint, and a thread of rank 0 syncs
    the log, then writes, verifies and renames the checkpoint, while training continues. At most one write is in flight.
    The copies stay allocated: they take as much host memory as the checkpoint, up to twice as much on CUDA, where
    PyTorch allocates pinned memory in powers of two.
    """

    def __init__(self, trainer: Trainer, run: Path, log: Lines, data: dict[str, str]) -> None:
        self.trainer, self.run, self.log, self.data, self.world = trainer, run, log, data, trainer.world
        self.saved = -1  # the last step that has a checkpoint
        self.in_flight: int | None = None  # step of the checkpoint that the thread writes; the same on every rank
        self.written: Future[Path] | None = None  # on rank 0
        self.copies: tuple[dict[str, Tensor], ...] = ({}, {})  # on rank 0: of the state and of the average

    def save(self, *, steady: bool = False, last: bool = False) -> Iterator[Event]:
        """Save a checkpoint, or begin to. If it cannot be written, the next interval tries again.

        Args:
            steady: mark a regular checkpoint, whose step follows from the config and not from a stop.
            last: the run ends here: wait for the write, and raise its SaveError.
        """
        yield from self.finished(wait=True)
        trainer = self.trainer
        tensors, step = (trainer.state(), trainer.averaged_state()), trainer.step
        write = partial(checkpoint.save, self.run, trainer.config, step, classes=trainer.source.classes)
        write = partial(write, steady=steady, data=self.data, objects=trainer.objects)
        try:
            # The log lines before a checkpoint must be on disk. If they cannot be written, no process gathers tensors.
            if trainer.config.train.save == "async" and not last:
                self.world.on_main(self.log.settle)
                self._begin(write, tensors)
                return
            self.world.on_main(self.log.keep)
            if not self.world.is_main:
                self._send(tensors)
            path = self.world.on_main(lambda: write(*tensors))
        except SaveError as error:
            if last:
                raise
            yield Event("unsaved", step, {"why": str(error)})
        else:
            yield self._saved(step, path)

    def finished(self, *, wait: bool = False) -> Iterator[Event]:
        """The event of the write in flight once it has ended; with `wait`, wait for its end."""
        if (step := self.in_flight) is None:
            return
        try:
            path = self.world.on_main(lambda: self._result(wait))
        except SaveError as error:
            self.in_flight = None
            yield Event("unsaved", step, {"why": str(error)})
        else:
            if path is not None:
                self.in_flight = None
                yield self._saved(step, path)

    def close(self) -> None:
        """Wait for the write in flight, whatever ended the run: no thread writes into a run that is no longer
        locked."""
        while self.written and not self.written.done():
            with suppress(KeyboardInterrupt):
                self.written.exception()

    def _saved(self, step: int, path: Path) -> Event:
        self.saved = step
        return Event("checkpoint", step, {"path": str(path)})

    def _result(self, wait: bool) -> Path | None:
        assert self.written is not None
        return self.written.result() if wait or self.written.done() else None

    def _begin(self, write: Write, tensors: tuple[Mapping[str, Tensor], ...]) -> None:
        """Copy the state, and start the thread that writes the copies."""
        self.in_flight = self.trainer.step
        if not self.world.is_main:
            self._send(tensors)
            return
        for source, copies in zip(tensors, self.copies, strict=True):
            for name in file_order(source):
                tensor = source[name].contiguous()  # gathered from all processes if the model is sharded
                if name not in copies:
                    copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                copies[name].copy_(tensor, non_blocking=tensor.is_cuda)  # the stream runs it before later steps
        copied = torch.cuda.current_stream().record_event() if self.trainer.device.type == "cuda" else None

        def work() -> Path:
            if copied:
                copied.synchronize()
            self.log.sync()
            return write(*self.copies)

        thread = ThreadPoolExecutor(1, "checkpoint")
        self.written = thread.submit(work)
        thread.shutdown(wait=False)  # the thread ends with its work: none is left when workers fork

    def _send(self, tensors: tuple[Mapping[str, Tensor], ...]) -> None:
        """Send this process's parts of sharded tensors to rank 0, in the order in which rank 0 reads the tensors."""
        if self.trainer.sharded:
            for each in tensors:
                for name in file_order(each):
                    each[name]
