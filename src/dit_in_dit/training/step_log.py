"""Log lines of a run. Values stay on the device for a while and are read together, so that no step waits for
the device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dit_in_dit.runs.jsonl import Clock, Log
from dit_in_dit.training.utilization import Utilization

FLUSH_SECONDS = 0.5  # losses stay on the device this long before they are read and logged


class Step(NamedTuple):
    """Values of a step, read from the device: its number, scalars by name, and the loss of each example (N,)."""

    step: int
    numbers: dict[str, float]
    each: Tensor


class StepLog:
    """`log.jsonl` and `timing.jsonl`, written by one process, and the steps whose values are still on the device."""

    def __init__(self, run: Path, *, writes: bool, global_batch: int, usage: Utilization) -> None:
        self.log = Log(run / "log.jsonl" if writes else None)
        self.clock = Clock(run / "timing.jsonl" if writes else None, usage.read)
        self.global_batch = global_batch
        self.pending: list[tuple[int, dict[str, Tensor | float], Tensor]] = []  # to be read later

    def close(self) -> None:
        """Close the files."""
        self.clock.lines.close()
        self.log.lines.close()

    def is_due(self) -> bool:
        """Whether steps have waited for FLUSH_SECONDS."""
        return self.clock.waited() > FLUSH_SECONDS

    def read(self) -> tuple[list[Step], dict[str, float]]:
        """Read the waiting steps; also returns images per second since the previous read, and `Utilization`."""
        steps, self.pending = self.pending, []
        if not steps:
            return [], {}
        speeds = self.clock.write(steps[-1][0], len(steps) * self.global_batch)
        numbers = _read([values for _, values, _ in steps])
        return [Step(step, scalars, each) for (step, _, each), scalars in zip(steps, numbers, strict=True)], speeds

    def start_clock(self) -> None:
        """Restart the clock if no step waits: only training is timed."""
        if not self.pending:
            self.clock.start()


def _read(steps: list[dict[str, Tensor | float]]) -> list[dict[str, float]]:
    """Scalars of several steps, copied from the device together."""
    tensors = [value for values in steps for value in values.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return [
        {name: next(numbers) if isinstance(value, Tensor) else value for name, value in values.items()}
        for values in steps
    ]


def is_finite(numbers: dict[str, float]) -> bool:
    """Whether a step's loss and gradient norm are finite; otherwise the step was skipped."""
    return math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])


def number_or_name(number: float) -> float | str:
    """A number for the log; nan and inf, which JSON lacks, become strings."""
    return number if math.isfinite(number) else str(number)
