"""Steps skipped for a non-finite loss or gradient, and the roll-back after too many in a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from dit_in_dit.config.errors import UserError

ROLL_BACKS = 3  # most roll-backs between two regular checkpoints
REMEDY = "lower train.learning_rate, lengthen train.warmup or set train.precision=float32"


class DivergedError(Exception):
    """Too many steps in a row were skipped. `step` is the last of these; `problem` has its loss and gradient norm."""

    def __init__(self, step: int, problem: str) -> None:
        super().__init__(step, problem)
        self.step, self.problem = step, problem


@dataclass
class Divergence:
    """Counts of skipped steps and roll-backs of a run; checkpoints store them."""

    shift: int = 0  # number of steps whose examples roll-backs left out
    rolled_back: int = 0  # number of roll-backs
    tries: int = 0  # number of roll-backs since the last regular checkpoint
    streak: int = 0  # number of consecutive skipped steps up to this one

    @classmethod
    def read(cls, state: Mapping[str, Tensor]) -> Divergence:
        """The counts in a checkpoint's tensors; 0 if an older checkpoint has none."""
        return cls(**{f.name: int(state.get(f"run.{f.name}", 0)) for f in fields(cls)})

    def tensors(self) -> dict[str, Tensor]:
        """The counts as tensors for a checkpoint."""
        return {f"run.{name}": torch.tensor(value) for name, value in asdict(self).items()}

    def check_way_back(self, diverged: DivergedError, on_divergence: str, has_checkpoint: Callable[[], bool]) -> str:
        """Reason for a roll-back; UserError with train.on_divergence=stop, too many roll-backs, or no checkpoint."""
        problem = f"step {diverged.step}: {diverged.problem}: training diverged, {self.streak} steps in a row"
        if on_divergence == "stop":
            raise UserError(f"{problem}; {REMEDY}, or set train.on_divergence=roll_back")
        if self.tries == ROLL_BACKS:
            raise UserError(f"{problem}, even after {self.tries} roll-backs; {REMEDY}")
        if not has_checkpoint():
            raise UserError(f"{problem}, and there is no checkpoint to go back to; {REMEDY}")
        return problem

    def after(self, step: int, to: int) -> Divergence:
        """Counts after a roll-back from `step` to the step `to`; the examples of the steps between are left out."""
        return replace(
            self, shift=self.shift + step - to, rolled_back=self.rolled_back + 1, tries=self.tries + 1, streak=0
        )
