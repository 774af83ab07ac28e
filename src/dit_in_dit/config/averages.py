"""Names of the averages of the weights that a run keeps, and the rules between their keys.

The first decay of `train.ema` is the run's average, and has no name of its own. The others are named by their decay
(`0.9996`) or by their relative length (`length=0.1`).
"""

from __future__ import annotations

from collections.abc import Sequence

from dit_in_dit.config.errors import UserError

LENGTH = "length="
SHORTEST, LONGEST = 0.005, 0.28  # relative lengths end at 1 / sqrt(12) = 0.289, the plain mean of all steps


def average_name(first: float, text: str) -> str | bool:
    """The name of the average that a user calls `text`, such as `0.9996` or `length=0.10`; True: the run's first, of
    decay `first`. Text that names no average stays as it is, and is refused where averages are looked up."""
    try:
        number = float(text.removeprefix(LENGTH))
    except ValueError:
        return text
    return f"{LENGTH}{number}" if text.startswith(LENGTH) else number == first or str(number)


def weights_name(averaged: bool | str) -> str:
    """Words for the weights that `averaged` chooses: averaged, trained, or the average's name."""
    return f"average {averaged}" if isinstance(averaged, str) else "averaged" if averaged else "trained"


def check_averages(decays: Sequence[float], lengths: Sequence[float] | None, snapshots: int, checkpoints: int) -> None:
    """Check the rules between train.ema, ema_lengths, ema_snapshot_every and checkpoint_every. Raises UserError."""
    for name, numbers in (("train.ema", decays), ("train.ema_lengths", lengths)):
        if numbers is not None and (not numbers or len(set(numbers)) < len(numbers)):
            raise UserError(f"{name} must list one number or several different ones: got {list(numbers)}")
    if snapshots and not lengths:
        raise UserError(f"train.ema_snapshot_every keeps train.ema_lengths: set them, or leave out {snapshots}")
    if snapshots % checkpoints:
        rule = "train.ema_snapshot_every must be a multiple of train.checkpoint_every"
        raise UserError(f"{rule}: got {snapshots}, {checkpoints}")
