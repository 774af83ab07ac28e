"""Steps skipped because loss or gradient is not finite, and the way back after too many in a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from dit_in_dit.config.errors import UserError

ROLL_BACKS = 3  # times in a row that a run goes back
REMEDY = "lower train.learning_rate, lengthen train.warmup or set train.precision=float32"


class DivergedError(Exception):
    """Too many steps in a row were skipped; `step` is the last of them, `problem` says what was seen."""

    def __init__(self, step: int, problem: str) -> None:
        super().__init__(step, problem)
        self.step, self.problem = step, problem


@dataclass
class Divergence:
    """Counts of a run's skipped steps and of its ways back; a checkpoint keeps them.

    Attributes:
        shift: steps of examples that a rolled back run has passed over.
        rolled_back: times that the run went back.
        tries: times that it went back since the last checkpoint that was due.
        streak: steps in a row, up to this one, that were skipped.
    """

    shift: int = 0
    rolled_back: int = 0
    tries: int = 0
    streak: int = 0

    @classmethod
    def read(cls, state: Mapping[str, Tensor]) -> Divergence:
        """The counts in a checkpoint's tensors; 0 where an older one has none."""
        return cls(**{f.name: int(state.get(f"run.{f.name}", 0)) for f in fields(cls)})

    def tensors(self) -> dict[str, Tensor]:
        """The counts as a checkpoint has them."""
        return {f"run.{name}": torch.tensor(value) for name, value in asdict(self).items()}

    def count(self, *, finite: bool) -> None:
        """Count a step: finite, or skipped."""
        self.streak = 0 if finite else self.streak + 1

    def end_tries(self) -> None:
        """Begin the tries anew: the run has reached a checkpoint that was due."""
        self.tries = 0

    def check_way_back(self, diverged: DivergedError, on_divergence: str, has_checkpoint: Callable[[], bool]) -> str:
        """The reason why the run goes back.

        Raises:
            UserError: it must stop: train.on_divergence says so, it went back too often, or there is no checkpoint.
        """
        problem = f"step {diverged.step}: {diverged.problem}: training diverged, {self.streak} steps in a row"
        if on_divergence == "stop":
            raise UserError(f"{problem}; {REMEDY}, or set train.on_divergence=roll_back")
        if self.tries == ROLL_BACKS:
            raise UserError(f"{problem}, also after going back {self.tries} times; {REMEDY}")
        if not has_checkpoint():
            raise UserError(f"{problem}, and there is no checkpoint to go back to; {REMEDY}")
        return problem

    def after(self, step: int, to: int) -> Divergence:
        """The counts of a run that diverged at `step`, went back `to` an earlier one and passes over the examples
        between them."""
        return replace(
            self, shift=self.shift + step - to, rolled_back=self.rolled_back + 1, tries=self.tries + 1, streak=0
        )
