"""The lines of a run: steps are read from the device some time after they were made, so that no step waits for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dit_in_dit.runs.jsonl import Clock, Log

FLUSH_SECONDS = 0.5  # losses stay on the device this long before they are read and logged


class Step(NamedTuple):
    """A step read from the device: its number, its values by name, the loss of each example (N,)."""

    step: int
    numbers: dict[str, float]
    each: Tensor


class StepLog:
    """`log.jsonl` and `timing.jsonl`, which one process writes, and the steps that are still on the device."""

    def __init__(self, run: Path, *, writes: bool, global_batch: int) -> None:
        self.log = Log(run / "log.jsonl" if writes else None)
        self.clock = Clock(run / "timing.jsonl" if writes else None)
        self.global_batch = global_batch
        self.pending: list[tuple[int, dict[str, Tensor | float], Tensor]] = []

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Close the files at the end."""
        try:
            yield
        finally:
            self.clock.lines.close()
            self.log.lines.close()

    def add(self, step: int, values: dict[str, Tensor | float], each: Tensor) -> None:
        """Keep a step until it is read."""
        self.pending.append((step, values, each))

    def is_due(self) -> bool:
        """Whether steps have waited long enough."""
        return self.clock.waited() > FLUSH_SECONDS

    def read(self) -> tuple[list[Step], float]:
        """The steps that wait, and images per second since the last were read."""
        steps, self.pending = self.pending, []
        if not steps:
            return [], 0.0
        speed = self.clock.write(steps[-1][0], len(steps) * self.global_batch)
        numbers = _read([values for _, values, _ in steps])
        return [Step(step, found, each) for (step, _, each), found in zip(steps, numbers, strict=True)], speed

    def drop(self) -> None:
        """Forget the steps that wait, and time from here: the run has gone back."""
        self.pending.clear()
        self.clock.start()

    def start_clock(self) -> None:
        """Time from here, if no step waits: only training is timed."""
        if not self.pending:
            self.clock.start()


def _read(steps: list[dict[str, Tensor | float]]) -> list[dict[str, float]]:
    """The numbers of several steps, copied from the device together."""
    tensors = [value for values in steps for value in values.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return [
        {name: next(numbers) if isinstance(value, Tensor) else value for name, value in values.items()}
        for values in steps
    ]


def is_finite(numbers: dict[str, float]) -> bool:
    """Whether a step's loss and gradient are finite; else it was skipped."""
    return math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])


def finite_or_name(number: float) -> float | str:
    """A number as the log has it: JSON knows no nan and no inf, so these stand as words."""
    return number if math.isfinite(number) else str(number)
